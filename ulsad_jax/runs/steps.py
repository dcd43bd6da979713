"""Makes the parts of a training step: image order, random keys and jitted update."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.core import FrozenDict

from ulsad_jax.methods.base import Batch, Method, Spec, State, count_batches
from ulsad_jax.runtime import compilation
from ulsad_jax.runtime.devices import DATA, PMAP, Devices, ignore_mesh
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks.features import ChannelStatistics

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from ml_collections import ConfigDict

    Step = Callable[
        [State, Batch, jax.Array], tuple[State, dict[str, Float[Array, ""]]]
    ]


def category_seed(category: str) -> int:
    """Returns a seed that depends only on the category's name."""
    return zlib.crc32(category.encode()) & 0x7FFFFFFF


def initial_key(seed: int, category: str) -> jax.Array:
    """Returns the random key for a category's initial weights and updates."""
    return jax.random.fold_in(jax.random.key(seed), category_seed(category))


def make_spec(
    batch_size: int,
    image_size: tuple[int, int],
    features: Any,
    num_images: int = 0,
    num_updates: int = 0,
) -> Spec:
    """Returns the shapes of the training data.

    Args:
        batch_size: number of images in a batch.
        image_size: (height, width) in pixels.
        features: shapes of one image's features, see `pyramid.feature_shapes`; or None.
        num_images: number of training images; 0 if it is not known.
        num_updates: number of updates of a complete training; 0 if it is not known.
    """
    shape = jax.ShapeDtypeStruct
    if isinstance(features, dict):
        features = FrozenDict(features)  # `make_init` is cached by the spec
    batch = Batch(
        image=shape((batch_size, *image_size, 3), np.uint8),
        features=jax.tree.map(
            lambda x: shape((batch_size, *x.shape[1:]), x.dtype), features
        ),
        valid=shape((batch_size,), np.bool_),
        index=shape((batch_size,), np.int32),
    )
    return Spec(batch, num_images, num_updates)


@functools.cache  # compiled once, for all seeds
def make_init(
    method: Method, spec: Spec, devices: Devices | None = None
) -> Callable[[jax.Array], State]:
    """Returns a jitted `init(key)`, see `Method.init`.

    Args:
        method: method whose state it returns.
        spec: shapes of the training batches.
        devices: devices over which the state is split, if they say so; otherwise it is
            made on the first one.
    """

    def init(key):
        state = method.init(key, spec)
        if devices is None or not devices.shards_state:
            return state
        places = devices.choose_places(state)
        return jax.lax.with_sharding_constraint(state, places)

    return jax.jit(init, compiler_options=compilation.run_once())


def place_model(method: Method, devices: Devices, model: Any) -> Any:
    """Puts a model where prediction reads it: whole on every device, or split.

    Args:
        method: method whose model it is.
        devices: devices of the run.
        model: `State.model` of a finished state.
    """
    place = devices.place_state if method.splits_model else devices.replicate
    return place(model)


@functools.lru_cache
def make_train_step(method: Method, devices: Devices, backend: str) -> Step:
    """Returns a jitted `step(state, batch, key)` over all devices.

    The step donates the buffers of `state`. The key of each update is derived from
    `key` and the number of updates so far. Equal arguments return the same function,
    which is compiled once.

    Args:
        method: method whose update it runs.
        devices: devices over which the batch is split, and the state, if
            `Devices.shards_state` says so; it is replicated otherwise.
        backend: "jit", or "pmap", which runs the update on every device's share of the
            batch and averages moments, gradients and losses.
    """
    if backend != PMAP:
        update = make_update(method)
        if devices.shards_state:
            update = _shard_state(update, devices)
        return jax.jit(
            ignore_mesh(update),
            donate_argnums=0,
            out_shardings=(
                None if devices.shards_state else devices.everywhere,
                devices.everywhere,
            ),
        )
    update = jax.pmap(
        make_update(dataclasses.replace(method, axis_name=DATA)),
        axis_name=DATA,
        in_axes=(None, 0, None),
        out_axes=None,
        devices=list(devices.mesh.devices),
        donate_argnums=0,
    )

    def step(state, batch, key):
        shares = jax.tree.map(
            lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch
        )
        return update(state, shares, key)

    return step


def _shard_state(update: Step, devices: Devices) -> Step:
    """Returns an update of a state that is split over devices.

    The model is gathered first: computations are those of whole parameters, and only
    their results and what `State.training` holds are split.
    """
    constrain = jax.lax.with_sharding_constraint

    def run(state, batch, key):
        model = constrain(state.model, devices.everywhere)
        state, losses = update(state.replace(model=model), batch, key)
        return constrain(state, devices.choose_places(state)), losses

    return run


def make_update(method: Method) -> Step:
    """Returns the method's update with a different random key at every step."""

    def update(state, batch, key):
        key = jax.random.fold_in(key, state.step)
        if method.axis_name is not None:  # different draws on each device
            key = jax.random.fold_in(key, jax.lax.axis_index(method.axis_name))
        return method.update(state, batch, key)

    return update


def steps_per_epoch(
    count: int, batch_size: int, *, whole_only: bool, validation: int = 0
) -> int:
    """Returns the number of batches in a pass over the training images.

    Args:
        count: number of training images.
        batch_size: number of images in a batch.
        whole_only: True to leave out an incomplete last batch.
        validation: number of validation images, used in the message.

    Raises:
        UserError: there are too few images for one batch.
    """
    if whole_only and count < batch_size:
        advice = ["add images"]
        if validation > 1:
            advice.insert(
                0,
                "lower --config.dataset.validation_fraction, which holds images out "
                "where there is no validation split",
            )
        if count > 1:
            smaller = f"set --config.train.batch_size to {count} or less (from 2 up)"
            advice.insert(0, smaller)
        text = ", or ".join(advice)
        raise UserError(
            f"Expected at least one batch of {batch_size} training images, without "
            f"the {validation} for validation, found {count}. "
            f"{text[0].upper()}{text[1:]}."
        )
    return count_batches(count, batch_size, whole_only=whole_only)


def fill_batch(
    rows: Int[np.ndarray, " n"], batch_size: int
) -> tuple[Int[np.ndarray, " b"], int]:
    """Returns the rows of a batch, repeated to fill it up, and their number before.

    Args:
        rows: rows of the batch, at least one and at most `batch_size`.
        batch_size: number of images in a batch.
    """
    return np.resize(rows, batch_size), len(rows)


def count_epochs(train: ConfigDict, per_epoch: int) -> int:
    """Returns the number of epochs of a complete training.

    Args:
        train: `config.train`.
        per_epoch: number of updates in an epoch.
    """
    return train.num_epochs or -(-train.num_updates // per_epoch)


def epoch_order(
    count: int, *, seed: int, category: str, epoch: int
) -> Int[np.ndarray, " count"]:
    """Returns the order of the training images, a function of the arguments only.

    Args:
        count: number of training images.
        seed: seed of the run.
        category: name of the category.
        epoch: number of the epoch, from 0.
    """
    rng = np.random.default_rng([seed, category_seed(category), epoch])
    return rng.permutation(count)


def model_item(model: Any, statistics: ChannelStatistics | None) -> dict[str, Any]:
    """Returns the checkpoint item that inference reads.

    Args:
        model: `State.model`.
        statistics: statistics of the feature channels; None without features.
    """
    item = {"variables": model}
    if statistics is not None:
        channels = {"mean": statistics.mean, "std": statistics.std}
        if statistics.whitening is not None:
            channels["whitening"] = statistics.whitening
        item["channels"] = channels
    return item


def keeps_shapes(method: Method) -> bool:
    """Returns whether saved models have the shapes of initial ones.

    They may not where a method has an `adapt` or a `finish` of its own.
    """
    kind = type(method)
    return kind.finish is Method.finish and kind.adapt is Method.adapt


def read_model_item(
    item: Mapping[str, Any],
) -> tuple[Any, ChannelStatistics | None]:
    """Returns (model, statistics) from an item that `model_item` made."""
    channels = item.get("channels")
    return item["variables"], channels and ChannelStatistics(**channels)
