"""Checks loss terms on random outputs before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.base import TOTAL
from ulsad_jax.methods.ulsad.losses import make_loss_fn, takes
from ulsad_jax.methods.ulsad.networks import NETWORKS, Outputs
from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt8

    from ulsad_jax.methods.base import Spec
    from ulsad_jax.methods.ulsad.losses import LossFn
    from ulsad_jax.methods.ulsad.networks import Networks

TRAINED = tuple(name for names in NETWORKS.values() for name in names)
SCORED = ("local", "predicted_global", "global_")  # outputs used in anomaly maps
# Numbers of updates to check at: a term with a schedule may be 0 at first or later.
STEPS = (0, 10, 100, 1_000, 10_000, 100_000)


def check(
    networks: Networks, terms: Mapping[str, Mapping[str, Any]], spec: Spec
) -> str:
    """Checks every term on random outputs for two images.

    Args:
        networks: networks whose outputs the terms take.
        terms: entries of `config.losses`, see `losses.make_loss_fn`.
        spec: shapes of the training batches.

    Returns:
        Warnings, one per line, or an empty string. They concern outputs that no term
        trains, terms without a gradient, and terms in which the loss of one example
        depends on the others.

    Raises:
        UserError: an entry is not valid (see `losses.make_loss_fn`), or the shape,
            values or gradients of a term make training impossible.
    """
    loss_fn = make_loss_fn(terms)
    outputs, image = draw_outputs(networks, spec)
    untrained, idle, coupled = set(SCORED), set(terms), set()
    drawn = {name for name, entry in terms.items() if takes(entry, "key")}
    for step in STEPS:
        values, gradients = differentiate(loss_fn, outputs, image, step)
        if error := find_not_finite(values, gradients, "on random outputs"):
            raise UserError(error)
        untrained &= set(find_untrained(gradients[TOTAL]))
        idle -= {n for n, g in gradients.items() if any(map(jnp.any, g.values()))}
        coupled |= find_coupled(loss_fn, outputs, image, values, step) - drawn
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


def draw_outputs(
    networks: Networks, spec: Spec
) -> tuple[Outputs, UInt8[Array, "2 h w 3"]]:
    """Draws normally distributed outputs for two images, without running any network.

    As in real outputs, one feature channel is 0 everywhere, and outputs of a ReLU are
    often 0. There the gradient of a root or a logarithm is not finite.

    Args:
        networks: networks that determine the shapes of the outputs.
        spec: shapes of the training batches.

    Returns:
        Outputs, and uint8 images [2, h, w, 3].
    """
    features, image = (
        jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)
        for x in (spec.batch.features, spec.batch.image)
    )
    shapes, _ = jax.eval_shape(
        lambda *inputs: networks.init_with_output(*inputs, train=True),
        jax.random.key(0),
        features,
        image,
    )
    rng = np.random.default_rng(0)
    outputs = {
        name: rng.standard_normal(shapes[name].shape, np.float32) for name in shapes
    }
    outputs["features"][..., 0] = 0
    clipped = ["global_code"]
    if networks.output_activation == "relu":
        clipped += ["local", "predicted_global"]
    for name in clipped:
        outputs[name] = np.maximum(outputs[name], 0)
    pixels = rng.integers(0, 256, image.shape, np.uint8)
    return jax.tree.map(jnp.asarray, (Outputs(**outputs), pixels))


def differentiate(
    loss_fn: LossFn,
    outputs: Outputs,
    image: UInt8[Array, "b h w 3"],
    step: int | Int[Array, ""],
) -> tuple[dict[str, float], dict[str, dict[str, jax.Array]]]:
    """Returns the values of the total and of every term, and their gradients.

    Args:
        loss_fn: loss function, see `losses.make_loss_fn`.
        outputs: outputs of the networks.
        image: images of the batch, uint8 [b, h, w, 3].
        step: number of updates so far.

    Returns:
        {term: value before weighting} and {term: {output: gradient}}.
    """

    def measure(trained, features, image, step):
        total, means = loss_fn(
            {"features": features, **trained},
            step=step,
            image=image,
            key=jax.random.key(0),
        )
        return means | {TOTAL: total}

    @jax.jit
    def run(*inputs):
        # Separate passes: in a common one NaN of one term would reach the others.
        gradients = {
            name: jax.grad(lambda *args, name=name: measure(*args)[name])(*inputs)
            for name in jax.eval_shape(measure, *inputs)
        }
        return measure(*inputs), gradients

    trained = {name: outputs[name] for name in TRAINED}
    # Passed as arguments: XLA spends long on folding large constants.
    values, gradients = run(trained, outputs["features"], image, step)
    return {name: float(v) for name, v in values.items()}, gradients


def find_not_finite(
    values: Mapping[str, float],
    gradients: Mapping[str, Mapping[str, Float[Array, "..."]]],
    where: str,
) -> str:
    """Returns a message about the first term that is not finite, or an empty string.

    Args:
        values: {term: value}, see `differentiate`.
        gradients: {term: {output: gradient}}, see `differentiate`.
        where: description of the data that the terms were computed on.
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
    loss_fn: LossFn,
    outputs: Outputs,
    image: UInt8[Array, "b h w 3"],
    values: Mapping[str, float],
    step: int,
) -> set[str]:
    """Returns the terms whose value is not the mean of the values of single examples.

    Args:
        loss_fn: loss function, see `losses.make_loss_fn`.
        outputs: outputs of the networks.
        image: images of the batch, uint8 [b, h, w, 3].
        values: {term: value} on all examples.
        step: number of updates so far.
    """

    def alone(example, image, step):
        given = {"step": step, "image": image[None], "key": jax.random.key(0)}
        return loss_fn(jax.tree.map(lambda x: x[None], example), **given)[1]

    # The step is an argument, so that the cached program serves all steps.
    each_alone = jax.jit(jax.vmap(alone, in_axes=(0, 0, None)))
    means = each_alone(dict(outputs), image, step)
    return {
        name
        for name, each in means.items()
        if not np.isclose(values[name], each.mean(), rtol=1e-3, atol=1e-6)
    }


def find_untrained(gradient: Mapping[str, Float[Array, "..."]]) -> list[str]:
    """Returns the outputs used in anomaly maps whose gradient is 0 everywhere."""
    return [name for name in SCORED if not jnp.any(gradient[name] != 0)]


def describe_untrained(names: set[str] | list[str]) -> str:
    """Returns a sentence that names the outputs and networks without a gradient."""
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
