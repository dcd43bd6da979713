"""Implements methods of normalizing flows: FastFlow, of whole levels.

A flow is an invertible function from features to as many normal variables. Where these
are far from 0, the features are unlikely.

Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing
Flows", 2021, arXiv 2111.07677. A step of a flow is that of the library FrEIA.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from ulsad_jax.methods import descent
from ulsad_jax.methods.base import LEVELS, TOTAL, Batch, Method, Spec, State
from ulsad_jax.nn.layers import Conv, resize
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.rules import BOOLEAN, NOT_NEGATIVE, POSITIVE, Rule, at_least

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    Levels = list[Float[Array, "b h w c"]]  # in the order of their names
    Outputs = list[tuple[Float[Array, "b h w c"], Float[Array, "b h w"]]]

FIXED = "fixed"  # variables that are drawn, and not trained
EPSILON = 1e-5  # added to variances, as in PyTorch
CLAMP = 2.0  # FastFlow's `Step.clamp`


class Step(nn.Module):
    """One step of a flow: an affine coupling, a scale and offset, and a permutation.

    The first half of the channels says how the second one is scaled and shifted.

    Attributes:
        kernel: height and width of the kernels of both convolutions.
        ratio: number of hidden channels, in channels of the input of the first one.
        clamp: bound of the logarithms by which the second half is scaled.
        dtype: computation type of the convolutions.
    """

    kernel: int
    ratio: float
    clamp: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w"]]:
        """Returns the variables, and the positions' part in the log-determinant."""
        channels = x.shape[-1]
        first, second = jnp.split(x, [channels - channels // 2], axis=-1)
        answer = 0.1 * self._ask(first, 2 * second.shape[-1])
        log_scale, shift = jnp.split(answer, 2, axis=-1)
        log_scale = self.clamp * jnp.tanh(log_scale)
        second = second * jnp.exp(log_scale) + shift

        initial = nn.initializers.constant(2 * math.log(math.expm1(5)))  # a scale of 1
        scale = 0.2 * nn.softplus(self.param("global_scale", initial, channels) / 2)
        offset = self.param("global_offset", nn.initializers.zeros, channels)
        x = jnp.concatenate([first, second], axis=-1) * scale + offset
        log_determinant = log_scale.sum(-1) + jnp.log(scale).sum()
        return self._mix(x), log_determinant

    def _ask(
        self, x: Float[Array, "b h w i"], outputs: int
    ) -> Float[Array, "b h w outputs"]:
        """Returns the answer of two convolutions."""
        size, padding = (self.kernel, self.kernel), self.kernel // 2
        hidden = max(int(self.ratio * x.shape[-1]), 1)
        for i, features in ((0, hidden), (2, outputs)):
            conv = Conv(
                features, size, padding=padding, dtype=self.dtype, name=f"subnet_{i}"
            )
            x = conv(nn.relu(x) if i else x)
        return x.astype(jnp.float32)

    def _mix(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Puts the channels into an order that is drawn once."""

        def draw():
            return jax.random.permutation(self.make_rng("params"), x.shape[-1])

        return x[..., self.variable(FIXED, "order", draw).value]


class Flow(nn.Module):
    """Steps of a flow, one after another.

    Attributes:
        kernels: the steps' kernels, see `Step`.
        ratio: see `Step`.
        clamp: see `Step`.
        dtype: see `Step`.
    """

    kernels: tuple[int, ...]
    ratio: float
    clamp: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w"]]:
        """Returns the normal variables, and the positions' part in the log-determinant.

        The logarithm of the determinant of the flow's Jacobian is the sum over the
        positions. It is float32 for every `dtype`.
        """
        total = jnp.zeros(x.shape[:3])
        for i, kernel in enumerate(self.kernels):
            step = Step(kernel, self.ratio, self.clamp, self.dtype, name=f"steps_{i}")
            x, log_determinant = step(x)
            total += log_determinant
        return x, total


class LevelNorm(nn.Module):
    """Layer norm of an image's whole level, with a weight and a bias for each value."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalises every image's level."""
        axes, shape = (1, 2, 3), x.shape[1:]
        x = x - x.mean(axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + EPSILON)
        weight = self.param("scale", nn.initializers.ones, shape)
        return x * weight + self.param("bias", nn.initializers.zeros, shape)


class FlowOfLevels(nn.Module):
    """A norm and a flow for each level.

    Attributes:
        make_flow: makes the flow of a level, given its name.
    """

    make_flow: Callable[..., Flow]

    @nn.compact
    def __call__(self, levels: Levels) -> Outputs:
        """Returns what `Flow` returns, for each level."""
        outputs = []
        for i, x in enumerate(levels):
            normed = LevelNorm(name=f"norms_{i}")(x)
            outputs.append(self.make_flow(name=f"flows_{i}")(normed))
        return outputs


@dataclasses.dataclass(frozen=True)
class FastFlow(Method):
    """FastFlow; the map is the mean over the levels of how unlikely a position is.

    Attributes:
        steps: number of a flow's steps.
        ratio: number of hidden channels in a step, as a share of half of the level's.
        conv3x3_only: True for 3 x 3 convolutions in all steps, False for 1 x 1 in every
            second one.
        learning_rate: Adam's.
        weight_decay: L2 decay, which is added to the gradient.
    """

    takes: ClassVar[str] = LEVELS
    published_epochs: ClassVar[float | None] = 500
    rules: ClassVar[Mapping[str, Rule]] = {
        "methods.fastflow.steps": at_least(1),
        "methods.fastflow.ratio": POSITIVE,
        "methods.fastflow.conv3x3_only": BOOLEAN,
        "methods.fastflow.learning_rate": POSITIVE,
        "methods.fastflow.weight_decay": NOT_NEGATIVE,
    }

    steps: int = 8
    ratio: float = 1.0
    conv3x3_only: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5

    def check(self, spec: Spec) -> str:
        """Checks that every level can be split, see `check_levels`."""
        check_levels(spec)
        return ""

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Draws the initial weights and initialises Adam."""
        levels = list_levels(spec.batch)
        return descent.init(self._network, self._make_optimizer(), key, levels)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes one step of Adam on the negative log-likelihood of the levels."""
        del key

        def loss_fn(outputs: Outputs):
            return measure(outputs).mean(), {}

        return descent.step(
            self._network,
            self._make_optimizer(),
            loss_fn,
            state,
            self.axis_name,
            list_levels(batch),
        )

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns the loss."""
        del step
        losses = measure(self._network.apply(model, list_levels(batch)))
        return {TOTAL: losses.mean(where=batch.valid)}

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the map `flow`, from -1 (likely) to 0.

        It is the mean over the levels of -exp(-m / 2), where m is the mean square of
        a position's normal variables.
        """
        size, maps = batch.image.shape[1:3], []
        for z, _ in self._network.apply(model, list_levels(batch)):
            unlikely = -jnp.exp(-jnp.square(z).mean(-1, keepdims=True) / 2)
            maps.append(resize(unlikely, size)[..., 0])
        return {"flow": sum(maps) / len(maps)}

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory of a step, see `descent.estimate_bytes`."""
        return descent.estimate_bytes(self._network, list_levels(spec.batch))

    @property
    def _network(self) -> FlowOfLevels:
        small = 3 if self.conv3x3_only else 1
        kernels = tuple(small if i % 2 else 3 for i in range(self.steps))
        settings = kernels, self.ratio, CLAMP, jnp.dtype(self.dtype)
        return FlowOfLevels(functools.partial(Flow, *settings))

    def _make_optimizer(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay), optax.adam(self.learning_rate)
        )


METHODS = {"fastflow": FastFlow}


def list_levels(batch: Batch) -> Levels:
    """Returns the levels, in the order of their names."""
    return [x for _, x in sorted(batch.features.items())]


def check_levels(spec: Spec) -> None:
    """Checks that every level has channels to split in two.

    Raises:
        UserError: a level has one channel alone.
    """
    short = [k for k, x in spec.batch.features.items() if x.shape[-1] < 2]
    if short:
        raise UserError(
            "Expected outputs of the trunk with two channels or more, one half of "
            "which says how a flow changes the other, found one in "
            f"{', '.join(short)}. "
            "Choose others with --config.trunk.layers=..."
        )


def measure(outputs: Outputs) -> Float[Array, " b"]:
    """Returns each image's negative log-likelihood, summed over the levels.

    It is up to a constant, and to be minimised.
    """
    losses = [
        jnp.square(z).sum((1, 2, 3)) / 2 - log_determinant.sum((1, 2))
        for z, log_determinant in outputs
    ]
    return sum(losses)
