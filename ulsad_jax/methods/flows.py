"""Implements methods of normalizing flows: FastFlow of levels, CFLOW of positions.

A flow is an invertible function from features to as many normal variables. Where these
are far from 0, the features are unlikely.

Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing
Flows", 2021, arXiv 2111.07677. Gudovskiy, Ishizaka & Kozuka, "CFLOW-AD: Real-Time
Unsupervised Anomaly Detection with Localization via Conditional Normalizing Flows",
WACV 2022, arXiv 2107.12571.
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

from ulsad_jax.methods import descent
from ulsad_jax.methods.base import (
    LEVELS,
    TOTAL,
    Batch,
    Method,
    Spec,
    State,
    count_bytes,
)
from ulsad_jax.nn.flow import Flow, Step, encode_positions
from ulsad_jax.nn.layers import resize
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.rules import BOOLEAN, NOT_NEGATIVE, POSITIVE, Rule, at_least

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from ulsad_jax.nn.flow import Output

    Levels = list[Float[Array, "b h w c"]]  # in the order of their names

EPSILON = 1e-5  # added to variances, as in PyTorch
FASTFLOW_CLAMP, CFLOW_CLAMP = 2.0, 1.9  # `Step.clamp`
CFLOW_RATIO = 2.0  # `Step.ratio`


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
    def __call__(self, levels: Levels) -> list[Output]:
        """Returns what `Flow` returns, for each level."""
        outputs = []
        for i, x in enumerate(levels):
            normed = LevelNorm(name=f"norms_{i}")(x)
            outputs.append(self.make_flow(name=f"flows_{i}")(normed))
        return outputs


@dataclasses.dataclass(frozen=True)
class _FlowMethod(Method):
    """Base class of both methods."""

    takes: ClassVar[str] = LEVELS

    def check(self, spec: Spec) -> str:
        """Checks that every level has channels to split in two.

        Raises:
            UserError: a level has one channel alone.
        """
        short = [k for k, x in spec.batch.features.items() if x.shape[-1] < 2]
        if short:
            raise UserError(
                "Expected outputs of the trunk with two channels or more, one half of "
                "which says how a flow changes the other, found one in "
                f"{', '.join(short)}. Choose others with --config.trunk.layers=..."
            )
        return ""


@dataclasses.dataclass(frozen=True)
class FastFlow(_FlowMethod):
    """FastFlow; the map is the mean over the levels of how unlikely a position is.

    Attributes:
        steps: number of a flow's steps.
        ratio: number of hidden channels in a step, as a share of half of the level's.
        conv3x3_only: True for 3 x 3 convolutions in all steps, False for 1 x 1 in every
            second one.
        learning_rate: Adam's.
        weight_decay: L2 decay, which is added to the gradient.
    """

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

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Draws the initial weights and initialises Adam."""
        levels = list_levels(spec.batch)
        return descent.init(self._network, self._make_optimizer(), key, levels)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes one step of Adam on the negative log-likelihood of the levels."""
        del key

        def loss_fn(outputs: list[Output]):
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
        make_step = functools.partial(
            Step,
            ratio=self.ratio,
            clamp=FASTFLOW_CLAMP,
            rotate=False,
            dtype=jnp.dtype(self.dtype),
        )
        return FlowOfLevels(functools.partial(Flow, kernels, make_step))

    def _make_optimizer(self) -> optax.GradientTransformation:
        return descent.make_optimizer(
            learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )


@dataclasses.dataclass(frozen=True)
class Cflow(_FlowMethod):
    """CFLOW; the map is the sum over the levels of how unlikely a position is.

    The features of each position are variables by themselves, under the condition of
    where the position is. `highest`, in the model, are the levels' highest
    log-likelihoods in the last update.

    Attributes:
        steps: number of a flow's steps.
        condition: number of channels of the code of a position.
        positions: number of positions, of all images of a batch, in a step of Adam; if
            a level has fewer, a step takes all of them.
        learning_rate: Adam's.
    """

    published_epochs: ClassVar[float | None] = 200
    rules: ClassVar[Mapping[str, Rule]] = {
        "methods.cflow.steps": at_least(1),
        "methods.cflow.condition": Rule(
            lambda v: isinstance(v, int) and v > 0 and v % 4 == 0, "a multiple of 4"
        ),
        "methods.cflow.positions": at_least(1),
        "methods.cflow.learning_rate": POSITIVE,
    }

    steps: int = 8
    condition: int = 128
    positions: int = 256
    learning_rate: float = 2e-4

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Draws the initial weights and initialises each level's Adam."""
        states = {}
        for i, (name, x) in enumerate(sorted(spec.batch.features.items())):
            key_of_level, shapes = jax.random.fold_in(key, i), self._shapes(x)
            states[name] = descent.init(
                self._flow, self._make_optimizer(), key_of_level, *shapes
            )
        highest = dict.fromkeys(states, jnp.zeros(()))
        return _join(jnp.zeros((), jnp.int32), states, highest)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes steps of Adam on positions in a random order, level by level.

        The loss is the mean of those before each step.
        """
        states, losses, highest = {}, {}, {}
        for i, (name, x) in enumerate(sorted(batch.features.items())):
            own = State(state.step, state.model["flows"][name], state.training[name])
            order = jax.random.permutation(jax.random.fold_in(key, i), x[..., 0].size)
            states[name], found = self.take_steps(own, x, order)
            losses[name], highest[name] = found[TOTAL].mean(), found["highest"].max()
        total = average_levels(losses, batch)
        return _join(state.step + 1, states, highest), {TOTAL: total}

    def take_steps(
        self, state: State, x: Float[Array, "b h w c"], order: Int[Array, " bhw"]
    ) -> tuple[State, dict[str, Float[Array, " steps"]]]:
        """Takes the steps of one level.

        Args:
            state: state of the level's flow.
            x: level.
            order: order of its positions, those of the first image being 0, 1, ...

        Returns:
            The state after the last step; and of each step, the loss before it and the
            `highest` log-likelihood.
        """
        axis = self.axis_name
        shares = 1 if axis is None else jax.lax.axis_size(axis)
        count = min(max(self.positions // shares, 1), len(order))
        steps = len(order) // count
        codes = jnp.asarray(encode_positions(*x.shape[1:3], self.condition))
        codes, x = (a.reshape(-1, a.shape[-1]) for a in (codes, x))

        def loss_fn(output: Output):
            found = find_log_likelihoods(output)
            highest = jax.lax.stop_gradient(found).max()
            if axis is not None:
                highest = jax.lax.pmax(highest, axis)
            return -nn.log_sigmoid(found).mean(), {"highest": highest}

        def take_step(state: State, rows: Int[Array, " n"]):
            inputs = x[rows], codes[rows % len(codes)]
            optimizer = self._make_optimizer()
            return descent.step(self._flow, optimizer, loss_fn, state, axis, *inputs)

        rows = order[: steps * count].reshape(steps, count)
        return jax.lax.scan(take_step, state, rows)

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns the loss."""
        del step
        valid = batch.valid[:, None, None]
        losses = {
            name: -nn.log_sigmoid(found).mean(where=valid)
            for name, found in self._find_all(model, batch).items()
        }
        return {TOTAL: average_levels(losses, batch)}

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the map `conditional`, in which 0 is likely.

        It is the sum over the levels of 1 less a likelihood, as a share of the highest
        one that was found in training.
        """
        size, total = batch.image.shape[1:3], 0.0
        for name, found in self._find_all(model, batch).items():
            unlikely = 1 - jnp.exp(found - model["highest"][name])
            total += resize(unlikely[..., None], size, aligned=True)[..., 0]
        return {"conditional": total}

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory of a step, see `descent.estimate_bytes`."""
        shapes = map(self._shapes, spec.batch.features.values())
        flows = sum(descent.estimate_bytes(self._flow, *own) for own in shapes)
        return flows + 2 * count_bytes(spec.batch)

    def _find_all(
        self, model: Any, batch: Batch
    ) -> dict[str, Float[Array, "b height width"]]:
        """Returns the log-likelihoods of all positions, by level."""
        found = {}
        for name, x in sorted(batch.features.items()):
            shape = *x.shape[:3], self.condition
            codes = jnp.broadcast_to(encode_positions(*shape[1:]), shape)
            output = self._flow.apply(model["flows"][name], x, codes)
            found[name] = find_log_likelihoods(output)
        return found

    def _shapes(self, x: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
        """Returns the shapes of a flow's inputs in a step, for those of a level."""
        count = min(self.positions, math.prod(x.shape[:3]))
        channels = x.shape[-1], self.condition
        return [jax.ShapeDtypeStruct((count, c), jnp.float32) for c in channels]

    @property
    def _flow(self) -> Flow:
        make_step = functools.partial(
            Step,
            ratio=CFLOW_RATIO,
            clamp=CFLOW_CLAMP,
            rotate=True,
            dtype=jnp.dtype(self.dtype),
        )
        return Flow((1,) * self.steps, make_step)

    def _make_optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)


METHODS = {"fastflow": FastFlow, "cflow": Cflow}


def list_levels(batch: Batch) -> Levels:
    """Returns the levels, in the order of their names."""
    return [x for _, x in sorted(batch.features.items())]


def measure(outputs: list[Output]) -> Float[Array, " b"]:
    """Returns each image's negative log-likelihood, summed over the levels.

    It is up to a constant, and to be minimised.
    """
    losses = [
        jnp.square(z).sum((1, 2, 3)) / 2 - log_determinant.sum((1, 2))
        for z, log_determinant in outputs
    ]
    return sum(losses)


def find_log_likelihoods(output: Output) -> Float[Array, "..."]:
    """Returns each position's log-likelihood, divided by the number of channels."""
    z, log_determinant = output
    squares = jnp.square(z).mean(-1) / 2
    return log_determinant / z.shape[-1] - squares - math.log(2 * math.pi) / 2


def average_levels(
    losses: Mapping[str, Float[Array, ""]], batch: Batch
) -> Float[Array, ""]:
    """Returns the mean over all levels' positions of losses that are means of each."""
    sizes = {name: math.prod(x.shape[1:3]) for name, x in batch.features.items()}
    return sum(losses[name] * n for name, n in sizes.items()) / sum(sizes.values())


def _join(
    step: Int[Array, ""],
    states: Mapping[str, State],
    highest: Mapping[str, Float[Array, ""]],
) -> State:
    """Returns the state of all levels."""
    flows = {name: state.model for name, state in states.items()}
    training = {name: state.training for name, state in states.items()}
    return State(step, {"flows": flows, "highest": dict(highest)}, training)
