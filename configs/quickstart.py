"""The small system on drawn images: minutes on two CPU cores, no download."""

from ml_collections import ConfigDict

from configs import small


def get_config(category: str = "panel") -> ConfigDict:
    """Returns the small system at 128 x 128 pixels.

    Args:
        category: "panel", "assembly", or both joined with a comma.
    """
    config = small.get_config(category)
    config.dataset.name = "synthetic"
    config.image_size = (128, 128)
    config.evaluation.original_resolution = True
    return config
