"""Combines ULSAD's trained networks and names their outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.methods.ulsad.autoencoder import GlobalAutoencoder
from ulsad_jax.methods.ulsad.local import LocalReconstructor
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8


class Outputs(TypedDict):
    """Outputs of the networks, float32, from which loss terms and scores are computed.

    Shapes are those for images of h x w pixels and a trunk with c channels. A compiled
    program omits the outputs that it does not use.

    Attributes:
        features: x, the standardised features of the image (constant),
            [b, h/8, w/8, c].
        local: r, the local reconstruction of x, [b, h/8, w/8, c].
        predicted_global: p, the local network's prediction of g, [b, h/8, w/8, c].
        global_: g, the global autoencoder's output, [b, h/8, w/8, c].
        local_code: the local network's smallest grid, after batch norm, [b, h/32, w/32,
            local_width].
        global_code: the vector between the autoencoder's encoder and decoder, after
            batch norm and ReLU, [b, 64].
    """

    features: jax.Array
    local: jax.Array
    predicted_global: jax.Array
    global_: jax.Array
    local_code: jax.Array
    global_code: jax.Array


# The outputs of each network, by its name among the parameters.
NETWORKS = {
    "local": ("local", "predicted_global", "local_code"),
    "global": ("global_", "global_code"),
}


class Networks(nn.Module):
    """The local reconstructor and the global autoencoder.

    Attributes:
        local_width: number of channels, see `LocalReconstructor.width`.
        output_activation: name, see `LocalReconstructor.output_activation`.
        dtype: computation type of both networks.
        axis_name: name of the `jax.pmap` axis over which the batch is split, or None.
    """

    local_width: int = 1536
    output_activation: str = "relu"
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "b h/8 w/8 c"],
        image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"],
        *,
        train: bool,
    ) -> Outputs:
        """Runs both networks.

        Args:
            features: standardised features of the image.
            image: uint8 in 0..255 or float in 0..1.
            train: True to use batch statistics in batch norm; `batch_stats` must then
                be mutable.

        Raises:
            UserError: the features are not on the grid of the autoencoder's output.
        """
        grid, expected = features.shape[1:3], tuple(n // 8 for n in image.shape[1:3])
        if grid != expected:
            raise UserError(
                f"Expected features on an eighth of the image's grid, {expected}, as "
                f"ULSAD's networks need, found {grid}. Set config.trunk.image_size to "
                f"{expected[0] / grid[0]:g} times the height and "
                f"{expected[1] / grid[1]:g} times the width that the trunk sees now, "
                "or take another config.trunk.architecture."
            )
        channels = features.shape[-1]
        local, local_code = LocalReconstructor(
            self.local_width,
            self.output_activation,
            self.dtype,
            self.axis_name,
            name="local",
        )(features, train=train)
        global_, global_code = GlobalAutoencoder(
            channels, self.dtype, self.axis_name, name="global"
        )(image, train=train)
        return Outputs(
            features=features,
            local=local[..., :channels],
            predicted_global=local[..., channels:],
            global_=global_,
            local_code=local_code,
            global_code=global_code,
        )
