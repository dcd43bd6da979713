"""What a sweep needs of the memory, estimated before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from ulsad_jax.runs import training
from ulsad_jax.trunks import features
from ulsad_jax.trunks.pyramid import feature_shape

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Item = TypeVar("Item")
GIB = 2**30
# Of a parameter: itself, two moments, the gradient. New ones take the old ones' place.
COPIES = 4
# Of what a layer returns: for the way back itself, what its normalisation keeps, and
# the gradient.
ACTIVATIONS = 3


class Budget(NamedTuple):
    """What may be used, in bytes.

    Attributes:
        device: of each device, by the members.
        host: by features.
    """

    device: float
    host: float


def find_budget(sweep: ConfigDict) -> Budget:
    """What a config allows; where it says 0, half of a device, a quarter of the host.

    A CPU's devices share the host's memory.
    """
    host = features.host_bytes()
    device = features.device_bytes() or host / jax.device_count()
    return Budget(
        sweep.device_memory * GIB or device / 2, sweep.host_memory * GIB or host / 4
    )


def estimate_member(config: ConfigDict) -> int:
    """Bytes that a member takes of its device during a step.

    Parameters with both moments and gradients, what every layer returns for a batch,
    and two batches: the one in use and the one on its way.
    """
    size, batch = tuple(config.image_size), config.train.batch_size
    model = training.make_model(config)
    inputs = (
        jax.ShapeDtypeStruct((batch, *feature_shape(size)), jnp.float32),
        jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8),
    )

    def forward(key: jax.Array, *inputs: jax.Array) -> Any:
        variables = model.init(key, *inputs, train=True)
        _, kept = model.apply(
            variables,
            *inputs,
            train=True,
            capture_intermediates=True,
            mutable=["batch_stats", "intermediates"],
        )
        return variables, kept["intermediates"]

    variables, returned = jax.eval_shape(forward, jax.random.key(0), *inputs)
    return (
        COPIES * _count_bytes(variables)
        + ACTIVATIONS * _count_bytes(returned)
        + 2 * _count_bytes(inputs)
    )


def cut_waves(
    items: Sequence[Item],
    *,
    item_bytes: int,
    source: Callable[[Item], tuple[Hashable, int]],
    devices: int,
    budget: Budget,
) -> list[list[Item]]:
    """Cuts members into waves that fit, without changing their order.

    Args:
        items: members of one program.
        item_bytes: of each, on its device.
        source: of an item, what it shares of the host's memory, and its bytes.
        devices: how many there are.
        budget: of each device and of the host; a single member is always let in.
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


def _count_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
