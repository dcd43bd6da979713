"""A trunk of one's own: everything that makes one is in this file."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ulsad_jax.nn.layers import Conv
from ulsad_jax.trunks.base import Architecture


class Toy(nn.Module):
    """Strided convolutions; the first output has 3 x 8 channels on an eighth.

    Attributes:
        stride: of the first layer, in all 4 times as much.
        dtype: computation type.
        folded: changes nothing: there is no batch norm.
    """

    stride: int = 2
    dtype: DTypeLike = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(self, image):
        x = image / 255 if image.dtype == jnp.uint8 else image
        outputs = {}
        strides = {"half": self.stride, "fine": 4, "coarse": 2}
        for i, (name, stride) in enumerate(strides.items(), start=1):
            conv = Conv(8 * i, (5, 5), stride, padding=2, dtype=self.dtype, name=name)
            outputs[name] = x = nn.relu(conv(x))
        return {"fine": outputs["fine"], "coarse": outputs["coarse"]}


TOY = Architecture(Toy, grid="fine", layers="fine+coarse", whiten=True)
# Features on a 16th of the image; of images whose sides are multiples of 128.
COARSE = Architecture(functools.partial(Toy, 4), "fine", "fine", multiple=128)
