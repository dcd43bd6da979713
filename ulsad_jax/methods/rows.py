"""Keeps something of each training image until all have been seen."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.base import Batch, Method, Spec, State
from ulsad_jax.runtime import hosts

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Rows(Method):
    """Base class of methods that fit a model to what they kept of every image.

    `describe` says what that is, and `finish` fits the model to `read_seen`. Each of
    several devices has the rows of all images, unless `config.parallel.shard_state`
    splits them.
    """

    num_epochs: ClassVar[int | None] = 1
    sees_every_image: ClassVar[bool] = True

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Reserves a row for each training image."""
        row = jax.eval_shape(self.describe, spec.batch.features, key)
        training = {
            "rows": jnp.zeros((spec.num_images, *row.shape[1:])),
            "seen": jnp.zeros(spec.num_images, bool),
            "key": jax.random.key_data(key),
        }
        return State(jnp.zeros((), jnp.int32), {}, training)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Writes what is kept of each image to its row."""
        new = self.describe(batch.features, key), batch.index, batch.valid
        if self.axis_name is not None:
            new = jax.lax.all_gather(new, self.axis_name, tiled=True)
        values, index, valid = new
        training = state.training
        rows = jnp.where(valid, index, len(training["seen"]))  # padding: no row
        training = training | {
            "rows": training["rows"].at[rows].set(values, mode="drop"),
            "seen": training["seen"].at[rows].set(True, mode="drop"),
        }
        return State(state.step + 1, state.model, training), {}

    def describe(
        self, features: Float[Array, "b h w c"], key: jax.Array
    ) -> Float[Array, "b ..."]:
        """Returns what is kept of each image.

        Args:
            features: standardised features.
            key: random key of the update.
        """
        raise NotImplementedError


def read_seen(state: State) -> Float[Array, "n ..."]:
    """Returns the rows of the images that were seen."""
    rows, seen = state.training["rows"], hosts.gather(state.training["seen"])
    return rows if seen.all() else rows[np.flatnonzero(seen)]
