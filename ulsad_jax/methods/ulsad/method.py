"""Implements ULSAD as a method: two networks, their loss terms, Adam and two maps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax.core import FrozenDict

from ulsad_jax.methods import descent
from ulsad_jax.methods.base import TOTAL, Batch, Method, Spec, State
from ulsad_jax.methods.ulsad import loss_check
from ulsad_jax.methods.ulsad.local import ACTIVATIONS
from ulsad_jax.methods.ulsad.losses import distance, make_loss_fn
from ulsad_jax.methods.ulsad.networks import Networks
from ulsad_jax.runtime.rules import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    at_least,
    one_of,
)
from ulsad_jax.scoring.calibration import enlarge_and_blur

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from ml_collections import ConfigDict

_NONE = FrozenDict()
COSINE_WEIGHT = 0.5  # lambda in the maps, independent of that in the losses


@dataclasses.dataclass(frozen=True)
class Ulsad(Method):
    """ULSAD (Patra & Ben Taieb, TMLR 2024, arXiv 2410.16255).

    Its hyperparameters are the config's `model`, `losses` and `optimizer`.

    Attributes:
        model: keyword arguments of `networks.Networks`.
        terms: loss terms, see `losses.make_loss_fn`.
        optimizer: keyword arguments of `descent.make_optimizer`.
        numbers: {"losses": {entry: {name: value}}, "optimizer": {name: value}}, traced
            values that replace those of `terms` and `optimizer`.
    """

    published_epochs: ClassVar[float | None] = 200
    takes_losses: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule]] = {
        "model.local_width": Rule(
            lambda v: isinstance(v, int) and v >= 4 and v % 4 == 0,
            "a multiple of 4 from 4 up",
        ),
        "model.output_activation": one_of(*ACTIVATIONS),
        "optimizer.learning_rate": POSITIVE,
        "optimizer.b1": BELOW_ONE,
        "optimizer.b2": BELOW_ONE,
        "optimizer.eps": POSITIVE,
        "optimizer.weight_decay": NOT_NEGATIVE,
        # Batch norm over the autoencoder's single code needs two images.
        "train.batch_size": at_least(2),
    }

    model: FrozenDict = _NONE
    terms: FrozenDict = _NONE
    optimizer: FrozenDict = _NONE
    numbers: FrozenDict = _NONE

    @classmethod
    def from_config(cls, config: ConfigDict, name: str) -> Ulsad:
        """Makes ULSAD from a config's `model`, `losses` and `optimizer`."""
        del name
        return cls(
            dtype=config.train.dtype,
            model=_freeze(config.model),
            terms=_freeze(config.losses),
            optimizer=_freeze(config.optimizer),
        )

    @functools.cached_property
    def networks(self) -> Networks:
        """The local reconstructor and the global autoencoder."""
        return Networks(
            **self.model, dtype=jnp.dtype(self.dtype), axis_name=self.axis_name
        )

    @functools.cached_property
    def loss_fn(self) -> Callable:
        """The weighted sum of the loss terms, see `losses.make_loss_fn`."""
        return make_loss_fn(self.terms)

    def check(self, spec: Spec) -> str:
        """Checks the loss terms on random outputs, see `loss_check.check`."""
        return loss_check.check(self.networks, self.terms, spec)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Draws the initial weights and initialises the optimizer."""
        shapes = spec.batch.features, spec.batch.image
        optimizer = self._make_optimizer()
        return descent.init(self.networks, optimizer, key, *shapes, train=True)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes one step of Adam on the weighted sum of the terms."""
        loss_fn = functools.partial(
            self.loss_fn,
            step=state.step,
            image=batch.image,
            key=key,
            numbers=self.numbers.get("losses"),
        )
        return descent.step(
            self.networks,
            self._make_optimizer(),
            loss_fn,
            state,
            self.axis_name,
            batch.features,
            batch.image,
            train=True,
        )

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns the total, and every term before weighting, in inference mode."""
        total, terms = self.loss_fn(
            self._run(model, batch),
            batch.valid,
            step=step,
            image=batch.image,
            key=jax.random.key(0),  # the same noise for every checkpoint
            numbers=self.numbers.get("losses"),
        )
        return {TOTAL: total, **terms}

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the maps `local` and `global`.

        `local` is d(x, r), the reconstruction error of the features
        (structural anomalies); `global` is d(g, p), the difference between the global
        output and its local prediction (logical anomalies).
        """
        outputs = self._run(model, batch)
        pairs = {
            "local": ("features", "local"),
            "global": ("global_", "predicted_global"),
        }
        return {
            name: enlarge_and_blur(
                distance(outputs[a], outputs[b], cosine_weight=COSINE_WEIGHT),
                batch.image.shape[1:3],
            )
            for name, (a, b) in pairs.items()
        }

    def trace(self, numbers: Mapping[str, Any]) -> Ulsad:
        """Returns ULSAD with traced numbers of the optimizer or of loss terms."""
        traced: dict[str, Any] = {"optimizer": {}, "losses": {}}
        for field, value in numbers.items():
            group, *entry, name = field.split(".")
            target = traced[group].setdefault(entry[0], {}) if entry else traced[group]
            target[name] = value
        return dataclasses.replace(self, numbers=FrozenDict(traced))

    @classmethod
    def traceable(cls, field: str, values: list[Any]) -> bool:
        """Returns whether a field is the optimizer's, a weight, or a float of a term.

        An integer of a term may be a shape or a count, and needs a program of its own.
        """
        match field.split("."):
            case "losses", _, name:
                return name == "weight" or any(isinstance(v, float) for v in values)
            case group, *_:
                return group == "optimizer"

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory of a step, see `descent.estimate_bytes`."""
        shapes = spec.batch.features, spec.batch.image
        return descent.estimate_bytes(self.networks, *shapes, train=True)

    def _run(self, model: Any, batch: Batch) -> Mapping[str, jax.Array]:
        """Returns the networks' outputs in inference mode."""
        return self.networks.apply(model, batch.features, batch.image, train=False)

    def _make_optimizer(self) -> optax.GradientTransformation:
        return descent.make_optimizer(
            **{**self.optimizer, **self.numbers.get("optimizer", {})}
        )


METHODS = {"ulsad": Ulsad}


def _freeze(fields: Mapping[str, Any]) -> FrozenDict:
    """Returns the same fields, hashable."""

    def freeze(value: Any) -> Any:
        if hasattr(value, "items"):
            return FrozenDict({k: freeze(v) for k, v in value.items()})
        return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value

    return freeze(fields)
