"""The small system: EfficientNet-Lite0's features, narrow networks, no download."""

from ml_collections import ConfigDict

from configs import default


def get_config(category: str = "all") -> ConfigDict:
    """Returns the small system; set `dataset.name` and `dataset.root` yourself.

    Args:
        category: see `default.get_config`.
    """
    config = default.get_config(category)
    config.method = "ulsad+padim"
    # On most data the global map adds more noise than it finds: docs/results.md.
    config.score.fusion = "scores"
    config.score.weights["global"] = 0.0
    config.trunk.architecture = "tf_efficientnet_lite0"
    config.trunk.source = "builtin"
    config.model.local_width = 384
    config.model.output_activation = "identity"  # whitened features have both signs
    config.optimizer.learning_rate = 1e-3
    config.train.num_epochs, config.train.num_updates = 0, 400
    config.evaluation.batch_size = 16
    return config
