"""Splits batches over many devices, and the state of training if that is asked for.

All other arrays are replicated on each device.

The devices may belong to several processes, each of which handles its own rows. A
jitted function of arrays placed like this is the function of the whole batch: XLA
adds the communication between devices, for example for batch norm's moments and
for sums of gradients. With one device nothing is split.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ulsad_jax.runtime import hosts
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

DATA = "data"  # the mesh's axis, along which batches are split
PMAP = "pmap"
BACKENDS = ("jit", PMAP)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        mesh: mesh of all devices along the axis `DATA`.
        shards_state: whether each device holds a share of the state of training only.
    """

    mesh: Mesh
    shards_state: bool = False

    def __len__(self) -> int:
        """Returns the number of devices."""
        return self.mesh.size

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of arrays that are replicated on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: Any) -> Any:
        """Copies a tree of arrays to every device.

        Args:
            tree: arrays that every process holds whole, or that are split over these
                devices.
        """
        return jax.tree.map(lambda x: _put(x, self.everywhere), tree)

    def place_state(self, state: Any) -> Any:
        """Puts a state of training where `choose_places` says, see `replicate`."""
        return jax.tree.map(_put, state, self.choose_places(state))

    def choose_places(self, state: Any) -> Any:
        """Returns the shardings of a state of training, a function of its shapes.

        With `shards_state` each array is split along its largest axis of those that the
        number of devices divides, the first of equal ones. It is whole on every device
        if there is no such axis.

        Args:
            state: tree of arrays or of shapes.
        """
        n = len(self)

        def choose(x: Any) -> NamedSharding:
            axes = [i for i, size in enumerate(x.shape) if size and size % n == 0]
            if not (self.shards_state and axes):
                return self.everywhere
            axis = max(axes, key=lambda i: x.shape[i])
            return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, DATA))

        return jax.tree.map(choose, state)

    def split(self, batch: Float[np.ndarray, "b ..."]) -> Float[Array, "b ..."]:
        """Splits an array along its rows, whose number is a multiple of the devices."""
        return self.place(batch[self.own(len(batch))])

    def own(self, batch_size: int) -> slice:
        """Returns the slice of a batch's rows that this process's devices hold."""
        share = batch_size // jax.process_count()
        start = jax.process_index() * share
        return slice(start, start + share)

    def ask(self, stop: list[int]) -> list[int] | jax.Array:
        """Returns a value that is true if any process was asked to stop.

        It is the same in all processes.

        Args:
            stop: numbers of the signals that this process received.

        Returns:
            `stop` itself with one process; otherwise the largest signal number of all
            processes, int32 [], which may still be being computed.
        """
        if jax.process_count() == 1:
            return stop
        mine = np.full(jax.local_device_count(), max(stop, default=0), np.int32)
        return _largest(self.place(mine))

    def place(self, rows: np.ndarray | jax.Array) -> jax.Array:
        """Returns a batch split over the devices, from the rows of every process.

        Args:
            rows: this process's rows as a NumPy array; or a whole JAX array, which is
                returned as it is if it is split already.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(DATA))
        if isinstance(rows, jax.Array):
            there = rows.sharding.is_equivalent_to(sharding, rows.ndim)
            return rows if there else jax.device_put(rows, sharding)
        return jax.make_array_from_process_local_data(sharding, rows)

    def round_up(self, batch_size: int) -> int:
        """Returns the smallest multiple of the number of devices >= `batch_size`.

        It serves batches that may be padded.
        """
        return -(-batch_size // len(self)) * len(self)


def find_devices(count: int = 0, *, shards_state: bool = False) -> Devices:
    """Returns the first `count` devices, or all of them if `count` is 0.

    Args:
        count: number of devices.
        shards_state: see `Devices`.

    Raises:
        UserError: there are fewer devices, or there are several processes and `count`
            excludes some of their devices.
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
    return Devices(Mesh(np.array(found[: count or None]), (DATA,)), shards_state)


def check_trainable(devices: Devices, batch_size: int, backend: str) -> None:
    """Checks that training is possible on the devices.

    Args:
        devices: devices of the run.
        batch_size: number of images in a batch.
        backend: one of `BACKENDS`.

    Raises:
        UserError: the batch cannot be split evenly (the message suggests batch sizes
            and numbers of devices), or pmap is used with several processes or with a
            state that is split.
    """
    n = len(devices)
    if backend == PMAP and devices.shards_state:
        raise UserError(
            "Expected config.parallel.backend to be 'jit', as config.parallel."
            f"shard_state is set, found {backend!r}. Set --config.parallel.backend=jit "
            "or --config.parallel.shard_state=False."
        )
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


@contextmanager
def without_mesh() -> Iterator[None]:
    """Runs a block or a function outside of a caller's `jax.set_mesh`.

    Within such a mesh JAX would refuse arrays of our mesh.
    """
    with jax.set_mesh(None):
        yield


def ignore_mesh(function: Callable) -> Callable:
    """Returns a function to jit that is traced as if no mesh were set.

    Otherwise JAX refuses arrays of our mesh within a caller's `jax.set_mesh`.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return function(*args)

    return run


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Returns an array with a sharding, from one as `Devices.replicate` takes."""
    if isinstance(x, jax.Array):
        if x.sharding == sharding:  # programs are compiled anew for equivalent ones
            return x
        if not x.is_fully_replicated:
            return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


@jax.jit
def _largest(values: Int[Array, " n"]) -> Int[Array, ""]:
    return values.max()


def host_bytes() -> int:
    """Returns the memory of the machine or its container in bytes.

    With several hosts it is the smallest of their memories.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    own = total if text == "max" else min(total, int(text))
    least = hosts.gather(np.int32([own // 2**20])).min()  # the same in all processes
    return int(least) * 2**20


def device_bytes() -> int:
    """Returns the memory of a device in bytes; 0 if it is the host's, as on CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 0)
