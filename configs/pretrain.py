"""The recipe of the built-in trunk: 80 minutes on two CPU cores, beside other work."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the recipe that made ulsad_jax/weights/resnet18.safetensors."""
    config = ConfigDict()
    # Of the scenes, the initial weights, the views and the order.
    config.seed = 0
    # A key of ulsad_jax.models.resnet.ARCHITECTURES.
    config.architecture = "resnet18"

    config.scenes = scenes = ConfigDict()
    scenes.count = 6144  # drawn at the start; 0.1 MB each in memory
    scenes.size = 144  # pixels a side
    # Side of the views cut from a scene, in pixels; a multiple of 16.
    config.view_size = 128

    config.batch_size = 8  # scenes a step, of two views each
    config.num_steps = 16000
    config.learning_rate = 1e-3
    config.weight_decay = 0.02
    config.checkpoint_every = 250

    # Weights of the losses; see ulsad_jax/pretraining/objectives.py.
    config.objectives = objectives = ConfigDict()
    objectives.contrast = 1.8
    objectives.novelty = 2.0
    objectives.defects = 8.0
    # Of the contrast: lower looks at the most similar positions alone.
    config.temperature = 0.1
    return config
