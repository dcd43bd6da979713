"""What each loss term is worth on the batch that training begins with."""

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

from ulsad_jax.methods.ulsad import loss_check
from ulsad_jax.methods.ulsad.losses import TOTAL, make_loss_fn
from ulsad_jax.methods.ulsad.networks import NETWORKS, Outputs
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import training
from ulsad_jax.trunks import features

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from ml_collections import ConfigDict


def inspect(config: ConfigDict, *, step: int = 0) -> dict[str, Any]:
    """Measures every loss term on the batch that training begins with.

    Features are extracted for this batch alone, and standardised by it; the weights are
    those that training begins with.

    Args:
        config: of a run; of several categories, the first is looked at.
        step: updates so far, for terms with a schedule.

    Returns:
        A document for JSON: `category`, `images`, `step`, and `terms`, which has for
        each term, and for "total", the `value` before weighting, the `weight`, the
        `share` of the total, the `gradient_norm` of the weighted term for each network
        and `findings`, a list. Numbers that are not finite are null, and among the
        findings. `error` says what training cannot begin with, `warning` which outputs
        nothing trains; both may be "".

    Raises:
        UserError: as for training.
    """
    config_lib.validate(config)
    config = config_lib.resolve(config)
    loss_fn = make_loss_fn(config.losses)
    category = experiment.list_categories(config)[0]
    x, image = _first_batch(config, category)
    outputs, pull = _run_networks(config, category, x, image)
    values, gradients = loss_check.differentiate(loss_fn, outputs, step)
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
    """What a person reads of `inspect`'s document."""
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
    config: ConfigDict, category: str
) -> tuple[Float[np.ndarray, "b h/8 w/8 c"], UInt8[np.ndarray, "b h w 3"]]:
    """Standardised features and images of the first batch of training."""
    train, size = experiment.open_data(config, category).train, config.train.batch_size
    training.steps_per_epoch(len(train), size)  # there is a batch
    order = training.epoch_order(
        len(train), seed=config.seed, category=category, epoch=0
    )
    first = dataclasses.replace(
        train,
        records=[train.records[i] for i in order[:size]],
        positions=[train.positions[i] for i in order[:size]],
    )
    trunk = experiment.load_trunk(config)
    extractor = features.make_extractor(training.make_pyramid(config), trunk.variables)
    with contextlib.closing(first.batches(size)) as batches:
        raw, image = features.extract(extractor, batches, size)
    statistics = features.channel_statistics(raw, whiten=config_lib.whitens(config))
    return statistics.standardize(raw), image


def _run_networks(
    config: ConfigDict,
    category: str,
    x: Float[np.ndarray, "b h/8 w/8 c"],
    image: UInt8[np.ndarray, "b h w 3"],
) -> tuple[Outputs, Callable[..., dict[str, jax.Array]]]:
    """The outputs that training begins with.

    Returns:
        The outputs, and `pull({output: gradient}) -> {network: gradient norm}`.
    """
    model = training.make_model(config)
    state = training.init_state(
        model,
        training.make_optimizer(**config.optimizer),
        training.initial_key(config.seed, category),
        features=jax.ShapeDtypeStruct(x.shape, x.dtype),
        image=jax.ShapeDtypeStruct(image.shape, image.dtype),
    )

    @jax.jit
    def run(variables, x, image):
        def forward(params):
            outputs, _ = model.apply(
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

    trained, pull = run(state.variables, x, image)
    return {"features": jnp.asarray(x), **trained}, lambda g: measure(pull, g)


def _warn(untrained: list[str], step: int) -> str:
    """A sentence about outputs that nothing trains at a step, or ""."""
    if not untrained:
        return ""
    return (
        f"{loss_check.describe_untrained(untrained)} (At step {step}; a term with a "
        "schedule may train it later: see --step.)"
    )


def _describe(
    value: float, weight: float, total: float, norms: dict[str, jax.Array]
) -> dict[str, Any]:
    """One term's part of the document."""
    # Of a total that is not finite nobody has a share.
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
