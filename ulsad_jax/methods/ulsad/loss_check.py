"""Tries the loss terms of a config before anything is read or trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.ulsad.losses import TOTAL, make_loss_fn
from ulsad_jax.methods.ulsad.networks import NETWORKS, Outputs
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks.pyramid import feature_shape

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from ml_collections import ConfigDict

    from ulsad_jax.methods.ulsad.losses import LossFn

TRAINED = tuple(name for names in NETWORKS.values() for name in names)
SCORED = ("local", "predicted_global", "global_")  # what anomaly maps are made of
# Updates at which terms are tried: a schedule may begin, or end, with nothing.
STEPS = (0, 10, 100, 1_000, 10_000, 100_000)


def check(config: ConfigDict) -> str:
    """Tries every term on two drawn images' worth of outputs.

    Returns:
        Warnings, a line each, or "": of outputs which nothing trains, terms which train
        nothing, and terms in which an example's loss depends on the others.

    Raises:
        UserError: see `losses.make_loss_fn`; a term whose shape, values or gradients
            cannot be trained with.
    """
    loss_fn = make_loss_fn(config.losses)
    outputs = draw_outputs(config)
    untrained, idle, coupled = set(SCORED), set(config.losses), set()
    for step in STEPS:
        values, gradients = differentiate(loss_fn, outputs, step)
        if error := find_not_finite(values, gradients, "on random outputs"):
            raise UserError(error)
        untrained &= set(find_untrained(gradients[TOTAL]))
        idle -= {n for n, g in gradients.items() if any(map(jnp.any, g.values()))}
        coupled |= find_coupled(loss_fn, outputs, values, step)
        if not untrained | idle:
            break
    warnings = [describe_untrained(untrained)] if untrained else []
    warnings += [
        f"Loss term {name!r} has no gradient on random outputs: it trains nothing."
        for name in sorted(idle)
    ]
    warnings += [
        f"Loss term {name!r} gives an example another loss beside others than alone: "
        "it will depend on how batches are filled up and split over devices. Compute "
        "each example by itself."
        for name in sorted(coupled)
    ]
    return "\n".join(warnings)


def draw_outputs(config: ConfigDict) -> Outputs:
    """Outputs for two images, normally distributed, without running any network.

    As in reality, a feature channel is 0 everywhere, and what passes a ReLU is often 0:
    there a root or a logarithm has no finite gradient.
    """
    height, width = config.image_size
    grid = (2, *feature_shape((height, width)))
    shapes = dict.fromkeys(("features", "local", "predicted_global", "global_"), grid)
    shapes["local_code"] = (2, height // 32, width // 32, config.model.local_width)
    shapes["global_code"] = (2, 64)
    rng = np.random.default_rng(0)
    outputs = {
        name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    outputs["features"][..., 0] = 0
    clipped = ["global_code"]
    if config.model.output_activation == "relu":
        clipped += ["local", "predicted_global"]
    for name in clipped:
        outputs[name] = np.maximum(outputs[name], 0)
    return jax.tree.map(jnp.asarray, Outputs(**outputs))


def differentiate(
    loss_fn: LossFn, outputs: Outputs, step: int | Int[Array, ""]
) -> tuple[dict[str, float], dict[str, dict[str, jax.Array]]]:
    """The total's and every term's value, and its gradient for each output.

    Args:
        loss_fn: see `losses.make_loss_fn`.
        outputs: of the networks.
        step: updates so far.

    Returns:
        {term: value before weighting} and {term: {output: gradient}}.
    """

    def measure(trained, features, step):
        total, means = loss_fn({"features": features, **trained}, step=step)
        return means | {TOTAL: total}

    @jax.jit
    def run(trained, features, step):
        # One by one: a gradient that is not finite would spoil all in one pass.
        gradients = {
            name: jax.grad(lambda *args, name=name: measure(*args)[name])(
                trained, features, step
            )
            for name in jax.eval_shape(measure, trained, features, step)
        }
        return measure(trained, features, step), gradients

    trained = {name: outputs[name] for name in TRAINED}
    # XLA would compute at length with what is not an argument.
    values, gradients = run(trained, outputs["features"], step)
    return {name: float(v) for name, v in values.items()}, gradients


def find_not_finite(
    values: Mapping[str, float],
    gradients: Mapping[str, Mapping[str, Float[Array, "..."]]],
    where: str,
) -> str:
    """A message about the first term that training would come to grief with, or "".

    Args:
        values: see `differentiate`.
        gradients: see `differentiate`.
        where: what the terms were computed on.
    """
    for name, value in values.items():
        if name == TOTAL:
            continue
        if not math.isfinite(value):
            return (
                f"Expected a finite value of loss term {name!r} {where}, found "
                f"{value}. Look for a division, a logarithm or a power of what may be "
                "0 or negative."
            )
        bad = [key for key, g in gradients[name].items() if not jnp.isfinite(g).all()]
        if bad:
            return (
                f"Expected a finite gradient of loss term {name!r} {where}, found nan "
                f"or inf with respect to {', '.join(bad)}, although its value is "
                f"{value:.4g}. The gradients of sqrt, log and norms are infinite at 0, "
                "and jnp.where does not hide that: add a small number inside, as in "
                "jnp.sqrt(x**2 + 1e-6)."
            )
    return ""


def find_coupled(
    loss_fn: LossFn, outputs: Outputs, values: Mapping[str, float], step: int
) -> set[str]:
    """The terms that are not the mean of what they are for each example alone.

    Args:
        loss_fn: see `losses.make_loss_fn`.
        outputs: of the networks.
        values: of the terms on all examples.
        step: updates so far.
    """

    def alone(example, step):
        return loss_fn(jax.tree.map(lambda x: x[None], example), step=step)[1]

    # The step is an argument, so that the program that is kept serves all of them.
    means = jax.jit(jax.vmap(alone, in_axes=(0, None)))(dict(outputs), step)
    return {
        name
        for name, each in means.items()
        if not np.isclose(values[name], each.mean(), rtol=1e-3, atol=1e-6)
    }


def find_untrained(gradient: Mapping[str, Float[Array, "..."]]) -> list[str]:
    """The outputs, of those that maps are made of, whose gradient is 0 everywhere."""
    return [name for name in SCORED if not jnp.any(gradient[name] != 0)]


def describe_untrained(names: set[str] | list[str]) -> str:
    """A sentence that says which outputs and networks are not trained."""
    parts = []
    for network, outputs in NETWORKS.items():
        scored = [name for name in outputs if name in SCORED]
        missing = [name for name in scored if name in names]
        if missing:
            whole = "all of " if missing == scored else ""
            parts.append(f"{whole}the {network} network ({', '.join(missing)})")
    return (
        f"No loss term trains {' and '.join(parts)}: anomaly maps made of it tell "
        "nothing."
    )
