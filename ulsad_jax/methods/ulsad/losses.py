"""Defines the loss terms, and builds the loss function of a config from them.

A term is a pure function `term(outputs, **hyperparameters) -> per-example losses
[b]` of the networks' `Outputs`. The config names each term and gives it a weight:

    config.losses.attention = {"term": "attention", "weight": 1.0, "cosine_weight": 0.5}
    config.losses.mine = {"term": "my_package.my_file:my_term", "weight": 0.1}

A term with a keyword argument `step`, `image` or `key` receives the number of updates
so far, the images of the batch (uint8 [b, h, w, 3]), or a random key of its own for the
step.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ulsad_jax.methods.base import TOTAL
from ulsad_jax.methods.ulsad.networks import Outputs
from ulsad_jax.runtime import registry
from ulsad_jax.runtime.errors import UserError, sentence, suggest
from ulsad_jax.runtime.nested import flatten

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, UInt8

    LossTerm = Callable[..., Float[Array, " b"]]
    LossFn = Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
    Numbers = Mapping[str, Mapping[str, float | Float[Array, ""]]]

COSINE_EPSILON = 1e-8
GIVEN = ("step", "image", "key")  # keyword arguments that training passes to terms
# Errors of JAX where Python needs the value of a traced array.
_WITHOUT_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def distance(
    a: Float[Array, "*n c"], b: Float[Array, "*n c"], *, cosine_weight: float
) -> Float[Array, "*n"]:
    """Returns mean_C (a - b)^2 + cosine_weight * (1 - cos(a, b)) at each position.

    This is d_lambda in the paper. Norms are clamped at 1e-8, as in PyTorch's
    `cosine_similarity`, so that a zero vector has cosine 0 and a finite gradient.
    """
    squared = jnp.square(a - b).mean(-1)
    return squared + cosine_weight * (1 - _cosine(a, b))


def attention(
    queries: Float[Array, "b h w c"], keys: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Returns A(q, k) = softmax(q k^T / sqrt(c)) k over all positions.

    There are no learned projections.
    """
    b, h, w, c = queries.shape
    q = queries.reshape(b, h * w, c)
    k = keys.reshape(b, h * w, c)
    weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) / c**0.5, axis=-1)
    return jnp.einsum("bqk,bkc->bqc", weights, k).reshape(b, h, w, c)


def local_term(outputs: Outputs, *, cosine_weight: float = 0.5) -> Float[Array, " b"]:
    """Returns d(x, r): the error of the local network's reconstruction of the features.

    With `cosine_weight` 0 and no other term, training is that of DFR.
    """
    x, r = outputs["features"], outputs["local"]
    return distance(x, r, cosine_weight=cosine_weight).mean((1, 2))


def attention_term(
    outputs: Outputs, *, cosine_weight: float = 0.5
) -> Float[Array, " b"]:
    """Returns d(A(x, x), A(g, x)): g must attend to x as x attends to itself."""
    x, g = outputs["features"], outputs["global_"]
    d = distance(attention(x, x), attention(g, x), cosine_weight=cosine_weight)
    return d.mean((1, 2))


def consistency_term(
    outputs: Outputs, *, cosine_weight: float = 0.5
) -> Float[Array, " b"]:
    """Returns d(g, p): the difference between the global output and its prediction.

    Its gradient trains both networks.
    """
    g, p = outputs["global_"], outputs["predicted_global"]
    return distance(g, p, cosine_weight=cosine_weight).mean((1, 2))


TERMS: dict[str, LossTerm] = {
    "local": local_term,
    "attention": attention_term,
    "consistency": consistency_term,
}

# The published terms, as in configs/default.py.
PUBLISHED = {
    name: {"term": name, "weight": 1.0, "cosine_weight": 0.5} for name in TERMS
}


def find_changed(losses: Mapping[str, Any]) -> list[str]:
    """Returns the fields of `config.losses` that are not as published, by their paths.

    Args:
        losses: `config.losses`.
    """
    found, published = (dict(flatten(x, "losses.")) for x in (losses, PUBLISHED))
    names = sorted(found.keys() | published.keys())
    return [name for name in names if found.get(name) != published.get(name)]


def make_loss_fn(config: Mapping[str, Mapping[str, Any]]) -> LossFn:
    """Makes the loss function of `config.losses`.

    Args:
        config: entries by name. Each entry has a `term` (a key of `TERMS`, or
            "module:function"), a `weight`, and the keyword arguments of the term.

    Returns:
        `loss_fn(outputs, valid=None, *, step=0, image=None, key=None, numbers=None)`,
        which returns (total, {entry: mean loss}): the weighted total, and each term
        before weighting. `valid` [b] excludes padded rows. `step` (number of updates so
        far), `image` (images of the batch) and `key` are passed to the terms that take
        them; every term gets a different key. `numbers` {entry: {name: number}}
        replaces weights and hyperparameters. All of them may be traced.

    Raises:
        UserError: no entry; an unknown term; a hyperparameter that the term does not
            take.
    """
    if not config:
        raise UserError(
            "Expected at least one entry in config.losses, found none. Known terms: "
            f"{', '.join(TERMS)}; your own are written module:function."
        )
    entries = {name: _resolve(name, fields) for name, fields in config.items()}

    def loss_fn(
        outputs: Outputs,
        valid: Bool[Array, " b"] | None = None,
        *,
        step: int | Int[Array, ""] = 0,
        image: UInt8[Array, "b h w 3"] | None = None,
        key: jax.Array | None = None,
        numbers: Numbers | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        batch = outputs["features"].shape[0]
        mask = jnp.ones(batch) if valid is None else valid.astype(jnp.float32)
        means = {}
        total = jnp.zeros(())
        for i, (name, entry) in enumerate(_replace(entries, numbers or {}).items()):
            own = None if key is None else jax.random.fold_in(key, i)
            given = {"step": step, "image": image, "key": own}
            per_example = entry.call(name, outputs, given)
            means[name] = (per_example * mask).sum() / jnp.maximum(mask.sum(), 1)
            total += entry.weight * means[name]
        return total, means

    return loss_fn


def takes(entry: Mapping[str, Any], keyword: str) -> bool:
    """Returns whether the term of an entry takes a keyword argument of `GIVEN`.

    Args:
        entry: entry of `config.losses`.
        keyword: "step", "image" or "key".
    """
    term = registry.find(entry["term"], TERMS, field="config.losses")
    return keyword in inspect.signature(term).parameters


class _Entry(NamedTuple):
    """An entry of `config.losses`, with its term resolved."""

    reference: str
    term: LossTerm
    weight: float | Float[Array, ""]
    hyperparameters: dict[str, Any]

    def call(
        self, name: str, outputs: Outputs, given: Mapping[str, Any]
    ) -> Float[Array, " b"]:
        """Returns the term's losses; it gets the items of `given` that it takes.

        Raises:
            UserError: the term uses an unknown output, fails, or does not return one
                floating-point number per example.
        """
        asked = inspect.signature(self.term).parameters
        extra = {key: value for key, value in given.items() if key in asked}
        try:
            found = self.term(outputs, **self.hyperparameters, **extra)
        except KeyError as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"Expected loss term {name!r} to use outputs of the networks "
                f"({', '.join(outputs)}), found {error} in {place.filename}, line "
                f"{place.lineno}. Correct the name."
                f"{suggest(str(error.args[0]), outputs)}"
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(self._explain(error, name)) from error
        self._check(found, name, (outputs["features"].shape[0],))
        return found

    def _explain(self, error: Exception, name: str) -> str:
        """Returns a message about an error in the term: error, place and remedy."""
        frames = traceback.extract_tb(error.__traceback__)
        file = self.term.__code__.co_filename if hasattr(self.term, "__code__") else ""
        place = ([f for f in frames if f.filename == file] or frames)[-1]
        found = (
            "a value asked of what has none until the step runs, as outputs and the "
            "numbers that a sweep varies. Use neither `if`, int() nor float() on them, "
            "nor shapes made of them; jnp.where chooses"
            if isinstance(error, _WITHOUT_VALUE)
            else error
        )
        return (
            f"Expected loss term {name!r} ({self.reference}) to compute one loss an "
            f"example, found {type(error).__name__} in {place.filename}, line "
            f"{place.lineno}: {sentence(found)} Correct the term, or the numbers it "
            f"has from config.losses.{name} ({self.hyperparameters})."
        )

    def _check(self, found: Any, name: str, shape: tuple[int]) -> None:
        """Rejects results other than one floating-point number per example."""
        expected = (
            f"Expected loss term {name!r} ({self.reference}) to return one loss an "
            f"example, shape {shape}, float32, found"
        )
        if not isinstance(found, jax.Array | np.ndarray | np.generic):
            raise UserError(
                f"{expected} {type(found).__name__}. Return a jax.numpy array."
            )
        if found.shape != shape:
            raise UserError(
                f"{expected} shape {found.shape}. Average over positions and channels, "
                "not over the batch."
            )
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise UserError(
                f"{expected} {found.dtype}, which has no gradient. Compute with "
                "floating-point numbers: a comparison or a count alone trains nothing."
            )


def _replace(entries: Mapping[str, _Entry], numbers: Numbers) -> dict[str, _Entry]:
    """Returns the entries with other weights and hyperparameters.

    Raises:
        UserError: an entry or a hyperparameter is unknown.
    """
    if unknown := sorted(numbers.keys() - entries.keys()):
        raise UserError(
            f"Expected numbers of entries in config.losses ({', '.join(entries)}), "
            f"found {', '.join(unknown)}. Correct the names."
            f"{suggest(unknown[0], entries)}"
        )
    replaced = dict(entries)
    for name, given in numbers.items():
        entry = entries[name]
        weight = given.get("weight", entry.weight)
        others = {key: value for key, value in given.items() if key != "weight"}
        hyperparameters = entry.hyperparameters | others
        _check_hyperparameters(name, entry.reference, entry.term, hyperparameters)
        replaced[name] = entry._replace(weight=weight, hyperparameters=hyperparameters)
    return replaced


def _cosine(a: Float[Array, "*n c"], b: Float[Array, "*n c"]) -> Float[Array, "*n"]:
    # The clamp is inside the root: a root's gradient at zero is infinite.
    norm_a = jnp.sqrt(jnp.maximum(jnp.square(a).sum(-1), COSINE_EPSILON**2))
    norm_b = jnp.sqrt(jnp.maximum(jnp.square(b).sum(-1), COSINE_EPSILON**2))
    return (a * b).sum(-1) / (norm_a * norm_b)


def _resolve(name: str, entry: Mapping[str, Any]) -> _Entry:
    """Reads the function, weight and hyperparameters of one config entry."""
    if not hasattr(entry, "keys"):
        raise UserError(
            f"Expected config.losses.{name} to be a dictionary, found {entry!r}. Write "
            f'it as {{"term": {str(entry)!r}, "weight": 1.0}}.'
        )
    hyperparameters = dict(entry)
    if missing := [key for key in ("term", "weight") if key not in hyperparameters]:
        raise UserError(
            f"Expected config.losses.{name} to have `term` and `weight`, found only "
            f"{sorted(hyperparameters)}. Add {', '.join(map(repr, missing))}."
        )
    reference, weight = hyperparameters.pop("term"), hyperparameters.pop("weight")
    for key, value in (("weight", weight), *hyperparameters.items()):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"Expected config.losses.{name}.{key} to be a finite number, found "
                f"{value!r}. Correct it in the config file, or with "
                f"--config.losses.{name}.{key}=..."
            )
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise UserError(
            f"Expected config.losses.{name}.weight to be a number, found {weight!r}. "
            "Correct it in the config file."
        )
    if name == TOTAL:
        raise UserError(
            f"Expected another name than config.losses.{name}, under which the "
            "weighted sum of all terms is reported. Rename the entry."
        )
    term = registry.find(reference, TERMS, field=f"config.losses.{name}.term")
    _check_hyperparameters(name, reference, term, hyperparameters)
    return _Entry(reference, term, weight, hyperparameters)


def _check_hyperparameters(
    name: str, reference: str, term: LossTerm, given: Mapping[str, Any]
) -> None:
    """Rejects unknown and missing hyperparameters of a term."""
    try:
        parameters = list(inspect.signature(term).parameters.values())
    except (TypeError, ValueError) as error:
        raise UserError(
            f"Expected config.losses.{name}.term = {reference!r} to be importable as a "
            f"function, found: {error}. Name a function."
        ) from error
    if not parameters or parameters[0].kind in (
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    ):
        raise UserError(
            f"Expected config.losses.{name}.term = {reference!r} to take the networks' "
            f"outputs first, found {inspect.signature(term)}. Write it as "
            "def term(outputs, *, ...)."
        )
    accepted = parameters[1:]
    anything = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {p.name: p for p in accepted if p.kind not in anything}
    for key in GIVEN:
        if named.pop(key, None) and key in given:
            raise UserError(
                f"Expected config.losses.{name} without `{key}`, which training gives "
                f"{reference}, found {given[key]!r}. Remove it, or rename the term's "
                "own."
            )
    needed = {key for key, p in named.items() if p.default is p.empty}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted)
    unknown = set() if takes_any else given.keys() - named.keys()
    if unknown or needed - given.keys():
        raise UserError(
            f"Expected config.losses.{name} to hold what {reference} takes "
            f"({', '.join(named) or 'nothing'}; without a default: "
            f"{', '.join(needed) or 'none'}), found {sorted(given)}. Add, remove or "
            "rename them."
            f"{suggest(min(unknown, default=''), named)}"
        )
