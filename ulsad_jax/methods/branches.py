"""Joins several methods to one: the branches of a detector.

Each branch keeps its own state. Maps and scores of all branches are those of the whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from ulsad_jax.methods import base
from ulsad_jax.methods.base import IMAGES, TOTAL, Batch, Method, Spec, State
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Branches(Method):
    """Base class of joined methods; `combine` makes a class for given methods.

    A branch with a number of passes of its own is updated in the first passes only.
    Passes over the training images are in order and complete if all branches ask for
    that; otherwise they are shuffled and leave out an incomplete last batch.

    Attributes:
        branches: (name, method) of each branch.
    """

    # The methods by their references, in the order of the branches.
    kinds: ClassVar[Mapping[str, type[Method]]] = {}

    branches: tuple[tuple[str, Method], ...] = ()

    @classmethod
    def from_config(cls, config: ConfigDict, name: str) -> Branches:
        """Makes every branch from its fields of the config."""
        del name
        names = map(base.short_name, cls.kinds)
        made = (
            (own, kind.from_config(config, own))
            for own, kind in zip(names, cls.kinds.values(), strict=True)
        )
        return cls(dtype=config.train.dtype, branches=tuple(made))

    def check(self, spec: Spec) -> str:
        """Checks every branch; returns their warnings, one per line."""
        warnings = (method.check(spec) for _, method in self._methods())
        return "\n".join(filter(None, warnings))

    def adapt(self, batch: Batch) -> Branches:
        """Adapts every branch to the training images."""
        branches = tuple((name, method.adapt(batch)) for name, method in self.branches)
        return dataclasses.replace(self, branches=branches)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial states, with the number of updates of each branch."""
        states = {name: m.init(key, spec) for name, m in self._methods()}
        per_epoch = base.count_batches(
            spec.num_images,
            spec.batch.image.shape[0],
            whole_only=not self.sees_every_image,
        )
        updates = {
            name: jnp.asarray(m.num_epochs * per_epoch, jnp.int32)
            for name, m in self._methods()
            if m.num_epochs is not None
        }
        return _join(states, updates)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Updates every branch that has not had all of its updates."""
        states, losses, updates = {}, {}, state.training["updates"]
        for name, method in self._methods():
            update = functools.partial(method.update, batch=batch, key=key)
            if name in updates:
                update = _stop_after(updates[name], update)
            states[name], losses[name] = update(_pick(state, name))
        return _join(states, updates), _merge(losses)

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns the losses of all branches; `TOTAL` is the sum of theirs."""
        return _merge(
            {name: m.losses(model[name], batch, step) for name, m in self._methods()}
        )

    def finish(self, state: State) -> State:
        """Finishes every branch."""
        states = {name: m.finish(_pick(state, name)) for name, m in self._methods()}
        return _join(states, state.training["updates"])

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the maps of all branches."""
        return _union(m.maps(model[name], batch) for name, m in self._methods())

    def scores(self, model: Any, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Returns the scores of all branches."""
        return _union(m.scores(model[name], batch) for name, m in self._methods())

    def trace(self, numbers: Mapping[str, Any]) -> Branches:
        """Returns the branches, each with the traced numbers that it accepts."""
        traced = []
        for name, method in self.branches:
            own = {k: v for k, v in numbers.items() if method.traceable(k, [0.0])}
            traced.append((name, method.trace(own)))
        return dataclasses.replace(self, branches=tuple(traced))

    @classmethod
    def traceable(cls, field: str, values: list[Any]) -> bool:
        """Returns whether one of the branches can trace a field."""
        return any(kind.traceable(field, values) for kind in cls.kinds.values())

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory of a step, in bytes: the sum of the branches'."""
        return sum(method.estimate_bytes(spec) for _, method in self._methods())

    def _methods(self) -> Iterator[tuple[str, Method]]:
        """Yields the name and the method of each branch."""
        for name, method in self.branches:
            yield name, dataclasses.replace(method, axis_name=self.axis_name)


@functools.cache
def combine(references: tuple[str, ...]) -> type[Branches]:
    """Returns the class of a method with several branches.

    Args:
        references: names of methods, see `base.find`.

    Raises:
        UserError: a method is unknown or named twice, or the methods take different
            features.
    """
    kinds = {reference: base.find(reference) for reference in references}
    takes = {kind.takes for kind in kinds.values()} - {IMAGES}
    text = "+".join(references)
    if len({*map(base.short_name, references)}) < len(references):
        raise UserError(
            f"Expected config.method to name each of its branches once, found {text!r}."
        )
    if len(takes) > 1:
        each = ", ".join(f"{name} takes {kind.takes}" for name, kind in kinds.items())
        raise UserError(
            "Expected the branches of config.method to take the same features, found "
            f"{text!r}: {each}. Leave one out."
        )
    epochs = [kind.num_epochs for kind in kinds.values()]
    published: dict[str, float | None] = {}
    for field in ("published_epochs", "published_updates"):
        own = (getattr(kind, field) for kind in kinds.values())
        published[field] = max(filter(None, own), default=None)
    fields = {
        "kinds": kinds,
        "takes": takes.pop() if takes else IMAGES,
        "num_epochs": None if None in epochs else max(epochs),
        **published,
        "takes_losses": any(kind.takes_losses for kind in kinds.values()),
        "sees_every_image": all(kind.sees_every_image for kind in kinds.values()),
        "splits_model": all(kind.splits_model for kind in kinds.values()),
        "rules": {k: v for kind in kinds.values() for k, v in kind.rules.items()},
        "__doc__": f"Joins the methods {text}.",
    }
    return type("Branches", (Branches,), fields)


def _join(states: Mapping[str, State], updates: Mapping[str, jax.Array]) -> State:
    training = {name: state.training for name, state in states.items()}
    return State(
        step=next(iter(states.values())).step,
        model={name: state.model for name, state in states.items()},
        training={"branches": training, "updates": dict(updates)},
    )


def _pick(state: State, name: str) -> State:
    """Returns the state of a branch."""
    return State(state.step, state.model[name], state.training["branches"][name])


def _stop_after(count: Int[Array, ""], update: Callable) -> Callable:
    """Returns an update that changes only `step` after `count` updates."""

    def run(state: State) -> tuple[State, dict[str, jax.Array]]:
        losses = jax.eval_shape(update, state)[1]
        idle = state.replace(step=state.step + 1), jax.tree.map(jnp.zeros_like, losses)
        return jax.lax.cond(state.step < count, update, lambda _: idle, state)

    return run


def _merge(losses: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """Returns all losses by name, and the sum of the totals if there is one."""
    totals = [own[TOTAL] for own in losses.values() if TOTAL in own]
    merged = _union(
        {k: v for k, v in own.items() if k != TOTAL} for own in losses.values()
    )
    return {TOTAL: sum(totals), **merged} if totals else merged


def _union(tables: Iterator[Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """Returns the entries of all tables, whose names have to differ."""
    found: dict[str, jax.Array] = {}
    for table in tables:
        if twice := found.keys() & table.keys():
            raise UserError(
                "Expected branches of config.method whose results have different "
                f"names, found {', '.join(sorted(twice))} twice. Leave one out."
            )
        found |= table
    return found
