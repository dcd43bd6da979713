"""A small system on drawn images: minutes on two CPU cores, no download."""

from ml_collections import ConfigDict

from configs import default


def get_config(category: str = "assembly") -> ConfigDict:
    """Returns the built-in trunk, narrow networks and few epochs."""
    config = default.get_config(category)
    config.dataset.name = "synthetic"
    config.trunk.architecture = "resnet18_drawn"
    config.trunk.source = "builtin"
    config.model.local_width = 384
    config.train.num_epochs = 12
    config.optimizer.learning_rate = 1e-3  # there are only 144 updates
    config.evaluation.batch_size = 16
    config.evaluation.original_resolution = True
    return config
