"""Makes the method and the feature pyramid that a config describes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ulsad_jax.methods import base as methods
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import steps
from ulsad_jax.trunks import weights as trunk_weights
from ulsad_jax.trunks.pyramid import FeaturePyramid, feature_shapes

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from ulsad_jax.methods.base import Method, Spec
    from ulsad_jax.trunks.weights import Trunk


@dataclasses.dataclass(frozen=True)
class Setup:
    """A method and the network that computes its features.

    Attributes:
        method: method to train.
        pyramid: frozen network; None for a method that takes only images.
        image_size: (height, width) in pixels of the method's images and maps.
        input_size: (height, width) in pixels at which images enter.
        whiten: True to whiten features, see `features.channel_statistics`.
    """

    method: Method
    pyramid: FeaturePyramid | None
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    whiten: bool

    @property
    def features(self) -> Any:
        """Shapes of one image's features; None without features."""
        return self.pyramid and feature_shapes(self.pyramid, self.input_size)

    def spec(self, batch_size: int, num_images: int = 0, num_updates: int = 0) -> Spec:
        """Returns the shapes of the training data, see `steps.make_spec`."""
        counts = num_images, num_updates
        return steps.make_spec(batch_size, self.image_size, self.features, *counts)


def make(config: ConfigDict) -> Setup:
    """Makes the method and the pyramid of a config.

    Args:
        config: resolved config.

    Raises:
        UserError: the method is unknown, or does not take a field of the config.
    """
    method, size = methods.make(config), tuple(config.image_size)
    pyramid = None
    if method.takes != methods.IMAGES:
        pyramid = FeaturePyramid(
            config.trunk.architecture,
            jnp.dtype(config.train.dtype),
            config.trunk.layers,
            levels=method.takes == methods.LEVELS,
            image_size=size,
        )
    input_size, whiten = config_lib.input_size(config), config_lib.whitens(config)
    return Setup(method, pyramid, size, input_size, whiten)


def check(made: Setup, config: ConfigDict) -> str:
    """Returns the warnings of `Method.check`, before any data is read."""
    return made.method.check(made.spec(config.train.batch_size))


def load_trunk(config: ConfigDict) -> Trunk | None:
    """Loads the trunk of a config; returns None for a method that takes only images."""
    fields = trunk_fields(config)
    return fields and trunk_weights.load_trunk(**fields)


def trunk_fields(config: ConfigDict) -> dict[str, Any] | None:
    """Returns the arguments of `weights.load_trunk`; None if there is no trunk."""
    if not config_lib.needs_trunk(config):
        return None
    fields = config.trunk.to_dict()
    # These choose features of the whole trunk.
    for name in ("image_size", "layers", "whiten"):
        fields.pop(name)
    is_drawn = config.trunk.source == "random"
    return fields | {"seed": config.seed if is_drawn else 0}
