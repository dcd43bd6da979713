"""Measures the loss terms on the first training batch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ulsad_jax.methods.base import TOTAL
from ulsad_jax.methods.ulsad import loss_check
from ulsad_jax.methods.ulsad.method import Ulsad
from ulsad_jax.methods.ulsad.networks import NETWORKS, Outputs
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import data, setup, steps
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import features, sources

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from ml_collections import ConfigDict


def inspect(config: ConfigDict, *, step: int = 0) -> dict[str, Any]:
    """Measures every loss term on the first training batch, with the initial weights.

    Features are extracted only for this batch, and standardised with its own
    statistics.

    Args:
        config: config of a run; if it has several categories, the first is used.
        step: number of updates so far, which terms with a schedule receive.

    Returns:
        A document for JSON: `category`, `images`, `step`, and `terms`, which has for
        each term, and for "total", the `value` before weighting, the `weight`, the
        `share` of the total, the `gradient_norm` of the weighted term for each network
        and `findings`, a list. Numbers that are not finite are null and are listed in
        `findings`. `error` is a message if training is not possible, and `warning` one
        about outputs that no term trains; both may be empty.

    Raises:
        UserError: the config or the data are not valid, or the method has no loss
            terms.
    """
    config_lib.validate(config)
    config = config_lib.resolve(config)
    made = setup.make(config)
    branches = made.method, *(m for _, m in getattr(made.method, "branches", ()))
    found = [method for method in branches if isinstance(method, Ulsad)]
    if not found:
        raise UserError(
            f"Expected config.method to be one with loss terms, 'ulsad', found "
            f"{config.method!r}. Inspect a run of ULSAD."
        )
    made = dataclasses.replace(made, method=found[0])
    loss_fn = made.method.loss_fn
    category = data.list_categories(config)[0]
    x, image = _first_batch(config, made, category)
    outputs, pull = _run_networks(config, made, category, x, image)
    values, gradients = loss_check.differentiate(loss_fn, outputs, image, step)
    norms = {name: pull(gradient) for name, gradient in gradients.items()}
    weights = {name: entry["weight"] for name, entry in config.losses.items()}
    where = f"on the first batch of {category!r}"
    error = loss_check.find_not_finite(values, gradients, where)
    untrained = loss_check.find_untrained(gradients[TOTAL])
    return {
        "category": category,
        "images": len(image),
        "step": step,
        "terms": {
            name: _describe(values[name], weight, values[TOTAL], norms[name])
            for name, weight in (*weights.items(), (TOTAL, 1.0))
        },
        "error": error,
        "warning": "" if error else _warn(untrained, step),
    }


def table(document: dict[str, Any]) -> str:
    """Returns the document from `inspect` as a text table."""
    head = ("term", "value", "weight", "share", *(f"grad {n}" for n in NETWORKS), "")
    rows = [head]
    for name, term in document["terms"].items():
        share = term["share"]
        rows.append(
            (
                name,
                _number(term["value"]),
                f"{term['weight']:g}",
                "-" if share is None else f"{100 * share:.1f} %",
                *(_number(term["gradient_norm"][network]) for network in NETWORKS),
                ", ".join(term["findings"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{document['category']}, first batch of {document['images']} images, step "
        f"{document['step']}"
    ]
    for name, *cells in rows:
        numbers = [c.rjust(w) for c, w in zip(cells[:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *numbers, cells[-1]]).rstrip())
    return "\n".join([*lines, *filter(None, [document["warning"]])])


def _first_batch(
    config: ConfigDict, made: setup.Setup, category: str
) -> tuple[Float[np.ndarray, "b gh gw c"], UInt8[np.ndarray, "b h w 3"]]:
    """Returns standardised features and images of the first training batch."""
    train, size = data.open_data(config, category).train, config.train.batch_size
    steps.steps_per_epoch(len(train), size, whole_only=True)  # raises without one
    order = steps.epoch_order(len(train), seed=config.seed, category=category, epoch=0)
    first = dataclasses.replace(
        train,
        records=[train.records[i] for i in order[:size]],
        positions=[train.positions[i] for i in order[:size]],
    )
    trunk = setup.load_trunk(config)
    extractor = features.make_extractor(made.pyramid, trunk.variables)
    with contextlib.closing(first.batches(size)) as batches:
        image, raw = sources.extract(extractor, batches, size)
    statistics = features.channel_statistics(raw, whiten=made.whiten)
    return statistics.standardize(raw), image


def _run_networks(
    config: ConfigDict,
    made: setup.Setup,
    category: str,
    x: Float[np.ndarray, "b gh gw c"],
    image: UInt8[np.ndarray, "b h w 3"],
) -> tuple[Outputs, Callable[..., dict[str, jax.Array]]]:
    """Runs the networks with their initial weights.

    Returns:
        The outputs, and `pull({output: gradient}) -> {network: gradient norm}`.
    """
    networks = made.method.networks
    key = steps.initial_key(config.seed, category)
    variables = steps.make_init(made.method, made.spec(len(image)))(key).model

    @jax.jit
    def run(variables, x, image):
        def forward(params):
            outputs, _ = networks.apply(
                variables | {"params": params},
                x,
                image,
                train=True,
                mutable=["batch_stats"],
            )
            return {name: outputs[name] for name in loss_check.TRAINED}

        return jax.vjp(forward, variables["params"])

    @jax.jit
    def measure(pull, gradient):
        (by_network,) = pull(gradient)
        return {name: optax.tree.norm(by_network[name]) for name in NETWORKS}

    trained, pull = run(variables, x, image)
    return {"features": jnp.asarray(x), **trained}, lambda g: measure(pull, g)


def _warn(untrained: list[str], step: int) -> str:
    """Returns a sentence about outputs that no term trains, or an empty string."""
    if not untrained:
        return ""
    return (
        f"{loss_check.describe_untrained(untrained)} (At step {step}; a term with a "
        "schedule may train it later: see --step.)"
    )


def _describe(
    value: float, weight: float, total: float, norms: dict[str, jax.Array]
) -> dict[str, Any]:
    """Returns the entry of one term in the document."""
    # Shares of a total that is 0 or not finite are undefined.
    share = weight * value / total if total and math.isfinite(total) else math.nan
    norms = {network: abs(weight) * float(norms[network]) for network in NETWORKS}
    findings = []
    if not math.isfinite(value):
        findings.append("value not finite")
    elif not all(map(math.isfinite, norms.values())):
        findings.append("gradient not finite")
    elif not any(norms.values()):
        findings.append("weight 0" if not weight else "no gradient")
    if value == 0:
        findings.append("value 0")
    return {
        "value": _finite(value),
        "weight": weight,
        "share": _finite(share),
        "gradient_norm": {network: _finite(norm) for network, norm in norms.items()},
        "findings": findings,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"
