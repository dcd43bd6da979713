"""Defines an architecture of trunks: one file of this package or of the user's own.

A module of this package declares its architectures by name, and a config names one;
it names the user's own as "module:attribute":

    TRUNKS = {"mine": Architecture(Mine, grid="early", layers="early+late")}
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ulsad_jax.runtime import registry
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

FIELD = "config.trunk.architecture"
AUTO, BUILTIN = "auto", "builtin"  # values of config.trunk's fields
WEIGHTS = Path(__file__).parents[1] / "weights"  # folder of the files of `builtin`


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A Linen module and its properties.

    Attributes:
        make: function that returns the module, given the keywords `dtype`, its
            computation type, and `folded`, True if its variables are those that `fold`
            returns. The module takes images, uint8 in 0..255 or float in 0..1
            [b, h, w, 3], and returns its outputs by name, {name: [b, gh, gw, c]}.
        grid: name of the output whose grid the features have; the other outputs are
            resized to it.
        layers: names of the outputs used as features, joined with "+", if the config
            says "auto".
        levels: the same for methods that take levels; those of `layers` if empty.
        whiten: True to decorrelate the features, if the config says "auto".
        channels: number of channels that the features are pooled to; None to keep all.
        multiple: number of pixels that the sides of an image must be a multiple of.
        fold: function that maps published variables to those of inference, for example
            with batch norm folded into convolutions.
        unused: prefixes of the names of published arrays that the module does not use.
        builtin: .safetensors file in PyTorch's names that is included with it, or None.
    """

    make: Callable[..., nn.Module]
    grid: str
    layers: str
    levels: str = ""
    whiten: bool = False
    channels: int | None = None
    multiple: int = 32
    fold: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    unused: tuple[str, ...] = ()
    builtin: Path | None = None


def collect() -> Mapping[str, Architecture]:
    """Returns the architectures of this package by name."""
    return registry.collect("ulsad_jax.trunks", "TRUNKS")


def find(reference: str) -> Architecture:
    """Returns the architecture that a config names.

    Args:
        reference: name of an architecture, or "module:attribute".

    Raises:
        UserError: there is no such object, or it is not an `Architecture`.
    """
    found = registry.find(reference, collect(), field=FIELD)
    if not isinstance(found, Architecture):
        raise UserError(
            f"Expected {FIELD} = {reference!r} to be an Architecture of "
            f"ulsad_jax.trunks.base, found {type(found).__name__}. Name the variable "
            "that holds one."
        )
    return found


def resolve(trunk: ConfigDict, *, levels: bool = False) -> tuple[str, bool]:
    """Returns the names of the outputs used as features, and whether to whiten them.

    Args:
        trunk: `config.trunk`. Its "auto" means the values of the architecture.
        levels: True for a method that takes levels.
    """
    best = find(trunk.architecture)
    layers = (levels and best.levels) or best.layers
    return (
        layers if trunk.layers == AUTO else trunk.layers,
        best.whiten if trunk.whiten == AUTO else trunk.whiten == "always",
    )


def draw(reference: str, key: jax.Array) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Runs an architecture with initial weights on a small image.

    Args:
        reference: name of an architecture; see `find`.
        key: random key of the weights.

    Returns:
        Its outputs by name, and its variables as they are published.
    """
    architecture = find(reference)
    side = 2 * architecture.multiple
    module = architecture.make(dtype=jnp.float32, folded=False)
    return module.init_with_output(key, jnp.zeros((1, side, side, 3)))


@functools.cache
def shapes(reference: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the shapes of the results of `draw`, without computing them."""
    return jax.eval_shape(functools.partial(draw, reference), jax.random.key(0))


def check_layers(reference: str, layers: str) -> None:
    """Checks the names of the outputs used as features.

    Args:
        reference: name of an architecture; see `find`.
        layers: names of outputs, joined with "+".

    Raises:
        UserError: a name is unknown or repeated; the message lists the trunk's outputs.
    """
    names, (outputs, _) = layers.split("+"), shapes(reference)
    if len({*names} & outputs.keys()) < len(names):
        raise UserError(
            f"Expected config.trunk.layers to be {AUTO!r}, or outputs of {reference} "
            f"({', '.join(outputs)}), each once, joined with +, found {layers!r}. Set "
            "it with --config.trunk.layers=..."
        )
