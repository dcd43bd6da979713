"""The published system on MVTec LOCO AD."""

from ml_collections import ConfigDict

from configs import default


def get_config(category: str = "all") -> ConfigDict:
    """Returns it for one category, several ("a,b"), or "all"."""
    config = default.get_config(category)
    config.dataset.name = "mvtec_loco"
    config.evaluation.original_resolution = True
    return config
