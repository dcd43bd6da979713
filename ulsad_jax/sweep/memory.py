"""Estimates the memory of a sweep before compilation, and cuts it into waves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax

from ulsad_jax.runtime.devices import device_bytes, host_bytes

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Item = TypeVar("Item")
GIB = 2**30


class Budget(NamedTuple):
    """Memory that a sweep may use, in bytes.

    Attributes:
        device: memory of each device, used by the members.
        host: memory of the host, used by features.
    """

    device: float
    host: float


def find_budget(sweep: ConfigDict) -> Budget:
    """Returns the budget that a config sets; 0 means a default.

    The default is half of a device's memory and a quarter of the host's. The devices of
    a CPU share the host's memory.
    """
    host = host_bytes()
    device = device_bytes() or host / jax.device_count()
    return Budget(
        sweep.device_memory * GIB or device / 2, sweep.host_memory * GIB or host / 4
    )


def cut_waves(
    items: Sequence[Item],
    *,
    item_bytes: int,
    source: Callable[[Item], tuple[Hashable, int]],
    devices: int,
    budget: Budget,
) -> list[list[Item]]:
    """Cuts members into waves that fit in memory, without changing their order.

    Args:
        items: members of one program.
        item_bytes: device memory of one member, in bytes.
        source: function from a member to a key of its features, which members can
            share, and their size in host memory, in bytes.
        devices: number of devices.
        budget: memory of each device and of the host; a wave has at least one member,
            even if that exceeds the budget.
    """
    most = devices * max(1, int(budget.device // item_bytes))
    waves: list[list[Item]] = []
    held: dict[Hashable, int] = {}
    for item in items:
        key, size = source(item)
        fits = sum({**held, key: size}.values()) <= budget.host
        if not waves or len(waves[-1]) == most or not fits:
            waves.append([])
            held = {}
        held[key] = size
        waves[-1].append(item)
    return waves
