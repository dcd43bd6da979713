"""Implements reverse distillation (RD): a student decodes a teacher's levels.

Deng & Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding", CVPR
2022, arXiv 2201.10703. The trunk is the teacher.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from ulsad_jax.methods import descent
from ulsad_jax.methods.base import (
    FROM_RUN,
    LEVELS,
    TOTAL,
    Batch,
    Method,
    Spec,
    State,
)
from ulsad_jax.nn.layers import BatchNorm, Conv, ConvTranspose
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.rules import BELOW_ONE, POSITIVE, Rule
from ulsad_jax.scoring.calibration import enlarge_and_blur
from ulsad_jax.trunks import base as trunks
from ulsad_jax.trunks.resnet import ResNet

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from ml_collections import ConfigDict

    Levels = Sequence[Float[Array, "b h w c"]]  # from the largest to the smallest

UP, DOWN = "upsample", "downsample"  # to twice and to half the height and width
SHORTEST = 1e-8  # length that shorter vectors are taken to have, as in PyTorch

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default, whose fan-in is that of the convolution that is transposed.
torch_uniform = nn.initializers.variance_scaling(1.0 / 3.0, "fan_out", "uniform")


class Kind(NamedTuple):
    """The kind of a teacher's blocks, which the student's have, too.

    Attributes:
        bottleneck: True for blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions, False for
            blocks of two 3 x 3.
        blocks: numbers of the decoder's blocks, from the smallest level up; the
            embedding has the first number of blocks.
        width: number of channels of a bottleneck's 3 x 3 convolution, for 256 channels
            of the block.
    """

    bottleneck: bool = False
    blocks: tuple[int, int, int] = (2, 2, 2)
    width: int = 64


RESNET18 = Kind()


class Block(nn.Module):
    """A residual block.

    Attributes:
        features: number of output channels.
        kind: kind of the block.
        conv: see `_make_conv`.
        resample: `UP`, `DOWN`, or "" to keep the size.
    """

    features: int
    kind: Kind
    conv: Callable
    resample: str = ""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow features"]:
        """Adds the block's response to its input, or to a projection of it."""
        plan = ((3, self.resample, self.features), (3, "", self.features))
        if self.kind.bottleneck:
            width = self.features * self.kind.width // 256
            plan = ((1, "", width), (3, self.resample, width), (1, "", self.features))
        y = x
        for i, (kernel, resample, features) in enumerate(plan, start=1):
            y = self.conv(y, features, kernel, resample, f"conv{i}", f"bn{i}")
            if i < len(plan):
                y = nn.relu(y)
        if how := self.resample:
            x = self.conv(x, self.features, 1, how, f"{how}_0", f"{how}_1")
        return nn.relu(x + y)


class Embedding(nn.Module):
    """Bottleneck: fuses the levels to one embedding, half as high and wide as the last.

    Attributes:
        kind: kind of the blocks.
        conv: see `_make_conv`.
    """

    kind: Kind
    conv: Callable

    @nn.compact
    def __call__(self, levels: Levels) -> Float[Array, "b h w c"]:
        """Returns the embedding, which has twice the channels of the last level."""
        early, middle, late = levels
        channels = late.shape[-1]
        early = nn.relu(self.conv(early, middle.shape[-1], 3, DOWN, "conv1", "bn1"))
        early = nn.relu(self.conv(early, channels, 3, DOWN, "conv2", "bn2"))
        middle = nn.relu(self.conv(middle, channels, 3, DOWN, "conv3", "bn3"))
        x = jnp.concatenate([early, middle, late.astype(middle.dtype)], axis=-1)
        for i in range(self.kind.blocks[0]):
            resample = "" if i else DOWN
            name = f"bn_layer_{i}"
            x = Block(2 * channels, self.kind, self.conv, resample, name=name)(x)
        return x


class Decoder(nn.Module):
    """Student: decodes the embedding to the levels.

    Attributes:
        channels: numbers of channels of the levels, from the smallest level up.
        kind: kind of the blocks.
        conv: see `_make_conv`.
    """

    channels: tuple[int, int, int]
    kind: Kind
    conv: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Levels:
        """Returns the levels."""
        levels = []
        plan = zip(self.channels, self.kind.blocks, strict=True)
        for i, (channels, count) in enumerate(plan, start=1):
            for j in range(count):
                resample = "" if j else UP
                name = f"layer{i}_{j}"
                x = Block(channels, self.kind, self.conv, resample, name=name)(x)
            levels.insert(0, x.astype(jnp.float32))
        return levels


class Student(nn.Module):
    """The embedding and the decoder.

    Attributes:
        kind: kind of the blocks.
        dtype: computation type.
        axis_name: name of the `jax.pmap` axis, see `BatchNorm`.
    """

    kind: Kind
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, levels: Levels, *, train: bool) -> Levels:
        """Returns the student's levels, in the teacher's shapes."""
        conv = _make_conv(train, self.dtype, self.axis_name)
        channels = tuple(x.shape[-1] for x in reversed(levels))
        x = Embedding(self.kind, conv, name="bottleneck")(levels)
        return Decoder(channels, self.kind, conv, name="decoder")(x)


@dataclasses.dataclass(frozen=True)
class ReverseDistillation(Method):
    """Reverse distillation; the map is the sum of the levels' cosine distances.

    Attributes:
        learning_rate: Adam's.
        b1: Adam's.
        b2: Adam's.
        kind: kind of the student's blocks; from the trunk, if that is a ResNet.
    """

    takes: ClassVar[str] = LEVELS
    published_epochs: ClassVar[float | None] = 200
    rules: ClassVar[Mapping[str, Rule]] = {
        "methods.rd.learning_rate": POSITIVE,
        "methods.rd.b1": BELOW_ONE,
        "methods.rd.b2": BELOW_ONE,
    }

    learning_rate: float = 0.005
    b1: float = 0.5
    b2: float = 0.999
    kind: Kind = dataclasses.field(default=RESNET18, metadata=FROM_RUN)

    @classmethod
    def from_config(cls, config: ConfigDict, name: str) -> ReverseDistillation:
        """Makes the method; the student's blocks are those of a ResNet trunk."""
        made = super().from_config(config, name)
        make = trunks.find(config.trunk.architecture).make
        trunk = make(dtype=jnp.float32, folded=True)
        if not isinstance(trunk, ResNet):
            return made
        kind = Kind(trunk.bottleneck, trunk.blocks, trunk.width)
        return dataclasses.replace(made, kind=kind)

    def check(self, spec: Spec) -> str:
        """Checks that there are three levels, each of half the size of the one before.

        Raises:
            UserError: there are others.
        """
        found = {k: x.shape[1:3] for k, x in spec.batch.features.items()}
        sizes = sorted(found.values(), reverse=True)
        halves = [tuple(n / 2 for n in size) for size in sizes]
        if len(sizes) != 3 or sizes[1:] != halves[:2] or any(n % 2 for n in sizes[2]):
            raise UserError(
                "Expected config.trunk.layers to be three outputs of the trunk, each "
                "half as high and wide as the one before and the last one even, such "
                "as layer1+layer2+layer3 of a ResNet, found "
                + ", ".join(f"{k} of {h} x {w}" for k, (h, w) in found.items())
                + ". Set it with --config.trunk.layers=..."
            )
        return ""

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Draws the initial weights and initialises Adam."""
        levels = order_levels(spec.batch)
        student = self._make_student(self.kind)
        return descent.init(student, self._make_optimizer(), key, levels, train=True)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes one step of Adam on the levels' cosine distances."""
        del key
        levels = order_levels(batch)
        student = self._make_student(read_kind(state.model))

        def loss_fn(decoded):
            return measure(levels, decoded).mean(), {}

        optimizer = self._make_optimizer()
        return descent.step(
            student, optimizer, loss_fn, state, self.axis_name, levels, train=True
        )

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns the loss, in inference mode."""
        del step
        return {TOTAL: measure(*self.decode(model, batch)).mean(where=batch.valid)}

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the map `student`: the sum of the levels' cosine distances."""
        pairs = zip(*self.decode(model, batch), strict=True)
        distances = (1 - cosine(x, y, axis=-1) for x, y in pairs)
        size = batch.image.shape[1:3]
        return {
            "student": sum(enlarge_and_blur(d, size, aligned=True) for d in distances)
        }

    def decode(self, model: Any, batch: Batch) -> tuple[Levels, Levels]:
        """Returns the teacher's levels and the student's, in inference mode."""
        levels = order_levels(batch)
        student = self._make_student(read_kind(model))
        return levels, student.apply(model, levels, train=False)

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory of a step, see `descent.estimate_bytes`."""
        student = self._make_student(self.kind)
        return descent.estimate_bytes(student, order_levels(spec.batch), train=True)

    def _make_student(self, kind: Kind) -> Student:
        return Student(kind, jnp.dtype(self.dtype), self.axis_name)

    def _make_optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate, b1=self.b1, b2=self.b2)


METHODS = {"rd": ReverseDistillation}


def read_kind(model: Any) -> Kind:
    """Returns the kind of the student that a model belongs to.

    Members of a sweep over trunks share one method, whatever its own kind is.
    """
    blocks = model["params"]["decoder"]
    counts = tuple(sum(k.startswith(f"layer{i}_") for k in blocks) for i in (1, 2, 3))
    block = blocks["layer1_0"]
    if "conv3" not in block:
        return Kind(blocks=counts)
    width, features = (block["conv3"]["kernel"].shape[i] for i in (-2, -1))
    return Kind(True, counts, 256 * width // features)


def order_levels(batch: Batch) -> Levels:
    """Returns the teacher's levels."""
    return sorted(batch.features.values(), key=lambda x: x.shape[1], reverse=True)


def measure(levels: Levels, decoded: Levels) -> Float[Array, " b"]:
    """Returns the loss of each image: the sum of the whole levels' cosine distances."""
    pairs = zip(levels, decoded, strict=True)
    return sum(1 - cosine(x, y, axis=(1, 2, 3)) for x, y in pairs)


def cosine(
    x: Float[Array, "b h w c"],
    y: Float[Array, "b h w c"],
    axis: int | tuple[int, ...],
) -> Float[Array, "b ..."]:
    """Returns the cosine of the angle between vectors along one or several axes."""
    squares = (jnp.square(v).sum(axis) for v in (x, y))
    lengths = (jnp.sqrt(jnp.maximum(s, SHORTEST**2)) for s in squares)
    return (x * y).sum(axis) / functools.reduce(jnp.multiply, lengths)


def _make_conv(train: bool, dtype: DTypeLike, axis_name: str | None) -> Callable:
    """Returns a function that applies a convolution and its batch norm.

    Its arguments are the input, the number of output channels, the size of the kernel,
    `UP`, `DOWN` or "", and the names of both layers.
    """

    def conv(x, features, kernel, resample, name, norm):
        if resample == UP:
            layer = ConvTranspose(
                features, 2, 2, 0, False, torch_uniform, dtype, name=name
            )
        else:
            stride = 2 if resample == DOWN else 1
            size, padding = (kernel, kernel), kernel // 2
            layer = Conv(
                features, size, stride, padding, False, he_normal, dtype, name=name
            )
        return BatchNorm(axis_name=axis_name, name=norm)(layer(x), train=train)

    return conv
