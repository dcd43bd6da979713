"""Your own table of images: `--config=configs/table.py:<file.csv>`."""

from ml_collections import ConfigDict

from configs import small


def get_config(root: str = "") -> ConfigDict:
    """Returns the small system on a CSV file (docs/data.md)."""
    config = small.get_config()
    config.dataset.name = "table"
    config.dataset.root = root
    return config
