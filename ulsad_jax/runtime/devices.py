"""Many devices: a batch is split over them, everything else is on each of them.

They may belong to several processes, each of which then deals with its own rows. A
jitted function of arrays placed like this is the function of the whole batch: XLA
finds out what the devices have to tell each other, such as batch norm's moments and
sums of gradients. With one device nothing is split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ulsad_jax.methods.ulsad.networks import Ulsad
from ulsad_jax.runs import training
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt8

    from ulsad_jax.trunks.features import FeatureSource

DATA = "data"  # the mesh's axis, along which batches are split
PMAP = "pmap"
BACKENDS = ("jit", PMAP)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        mesh: all of them along `DATA`.
    """

    mesh: Mesh

    def __len__(self) -> int:
        """How many devices there are."""
        return self.mesh.size

    @property
    def everywhere(self) -> NamedSharding:
        """Of arrays that every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: Any) -> Any:
        """Puts a tree of arrays, of which every process has all, on every device."""

        def put(x: Any) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, self.everywhere, x.__getitem__)

        return jax.tree.map(put, tree)

    def split(self, batch: Float[np.ndarray, "b ..."]) -> Float[Array, "b ..."]:
        """Splits an array along its rows, a multiple of the devices."""
        return self.place(batch[self.own(len(batch))])

    def load(
        self, source: FeatureSource, rows: Int[np.ndarray, " b"]
    ) -> tuple[Float[Array, "b h/8 w/8 c"], UInt8[Array, "b h w 3"]]:
        """Features and images of some rows, as a batch on the devices."""
        features, images = source.batch(rows[self.own(len(rows))])
        return self.place(features), self.place(images)

    def own(self, batch_size: int) -> slice:
        """The rows of a batch that this process's devices have."""
        share = batch_size // jax.process_count()
        start = jax.process_index() * share
        return slice(start, start + share)

    def ask(self, stop: list[int]) -> list[int] | jax.Array:
        """Whether any process was asked to stop: true or false, the same in all.

        Args:
            stop: signals that this process received.

        Returns:
            `stop` itself if there is one process; else the largest signal's number,
            which may still be on its way.
        """
        if jax.process_count() == 1:
            return stop
        mine = np.full(jax.local_device_count(), max(stop, default=0), np.int32)
        return _largest(self.place(mine))

    def place(self, rows: np.ndarray | jax.Array) -> jax.Array:
        """A batch of which every process gives its own rows, unless it is placed."""
        sharding = NamedSharding(self.mesh, PartitionSpec(DATA))
        if isinstance(rows, jax.Array):
            there = rows.sharding.is_equivalent_to(sharding, rows.ndim)
            return rows if there else jax.device_put(rows, sharding)
        return jax.make_array_from_process_local_data(sharding, rows)

    def round_up(self, batch_size: int) -> int:
        """The next batch size that can be split, for batches that may be filled up."""
        return -(-batch_size // len(self)) * len(self)


def find_devices(count: int = 0) -> Devices:
    """The first `count` devices, or all of them for 0.

    Raises:
        UserError: there are fewer, or several processes and not all are wanted.
    """
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if count > len(found):
        raise UserError(
            f"Expected {count} devices, as config.parallel.devices says, found "
            f"{len(found)} ({found[0].device_kind}). Set --config.parallel.devices to "
            f"{len(found)} or less, or to 0 for all."
        )
    if jax.process_count() > 1 and count not in (0, len(found)):
        raise UserError(
            f"Expected all {len(found)} devices of {jax.process_count()} processes to "
            f"be used, found {count} in config.parallel.devices. Set "
            "--config.parallel.devices=0."
        )
    return Devices(Mesh(np.array(found[: count or None]), (DATA,)))


def check_trainable(devices: Devices, batch_size: int, backend: str) -> None:
    """Refuses to train in a way that does not go with the devices.

    Raises:
        UserError: the batch cannot be split evenly, and says which sizes, and how many
            devices, would do; or pmap with several processes.
    """
    n = len(devices)
    if backend == PMAP and jax.process_count() > 1:
        raise UserError(
            "Expected config.parallel.backend to be 'jit', as there are "
            f"{jax.process_count()} processes, found {backend!r}. Set "
            "--config.parallel.backend=jit."
        )
    if batch_size % n:
        below, above = batch_size // n * n, devices.round_up(batch_size)
        fewer = max(k for k in range(1, n) if batch_size % k == 0)
        otherwise = f"--config.parallel.devices to {fewer}"
        if jax.process_count() > 1:
            otherwise = "start fewer processes"
        raise UserError(
            f"Expected config.train.batch_size to be a multiple of the {n} devices, "
            f"found {batch_size}. Set --config.train.batch_size to "
            f"{f'{below} or ' if below else ''}{above}, or {otherwise}."
        )


@jax.jit
def _largest(values: Int[Array, " n"]) -> Int[Array, ""]:
    return values.max()


def make_train_step(
    model: Ulsad,
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    devices: Devices,
    backend: str,
) -> Callable[..., tuple[training.TrainState, dict[str, Float[Array, ""]]]]:
    """The update over all devices: `step(state, features, image)`.

    Args:
        model: the networks.
        loss_fn: see `losses.make_loss_fn`.
        optimizer: see `training.make_optimizer`.
        devices: where the state is whole and the batch is split.
        backend: "jit", or "pmap", which runs the update on every device's share of the
            batch and averages moments, gradients and losses.
    """
    if backend != PMAP:
        return training.make_train_step(
            model, loss_fn, optimizer, sharding=devices.everywhere
        )
    update = jax.pmap(
        training.make_update(model.clone(axis_name=DATA), loss_fn, optimizer),
        axis_name=DATA,
        in_axes=(None, 0, 0),
        out_axes=None,
        devices=list(devices.mesh.devices),
        donate_argnums=0,
    )

    def step(state, features, image):
        shares = [x.reshape(len(devices), -1, *x.shape[1:]) for x in (features, image)]
        return update(state, *shares)

    return step
