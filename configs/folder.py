"""Your own folder of images: `--config=configs/folder.py:<folder>`."""

from ml_collections import ConfigDict

from configs import small


def get_config(root: str = "") -> ConfigDict:
    """Returns the small system on a folder (docs/data.md)."""
    config = small.get_config()
    config.dataset.name = "folder"
    config.dataset.root = root
    return config
