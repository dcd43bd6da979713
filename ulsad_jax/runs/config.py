"""Checks a config once, and keeps it beside the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ulsad_jax.command_line import SELECTIONS
from ulsad_jax.data.layouts import LAYOUTS
from ulsad_jax.methods.ulsad.local import ACTIVATIONS
from ulsad_jax.runtime import files
from ulsad_jax.runtime.devices import BACKENDS
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks.pyramid import LAYERS
from ulsad_jax.trunks.resnet import ARCHITECTURES
from ulsad_jax.trunks.weights import BUILTIN_ARCHITECTURE

# Of config.json. To be raised whenever a field is added or means another thing, so that
# earlier versions refuse what they would misread.
FORMAT = 1
# What runs did that were begun before the field was there, in any format.
_BEFORE = {
    "dataset.white_level": 0.0,
    "evaluation.original_resolution": False,
    "evaluation.write_maps": False,
    "parallel.backend": "jit",
    "parallel.devices": 0,
    "train.feature_memory": 0.5,
    "trunk.layers": "layer2+layer3",
    "trunk.whiten": "never",
}
BEST_TEST_AUROC = SELECTIONS[-1]  # the one that looks at test images
WHITEN = ("auto", "always", "never")
# Fields that say where something is.
PLACE_FIELDS = ("dataset.root", "dataset.cache_dir", "trunk.path")
# Fields that may change between two commands on one work directory: they leave what
# was already trained as it is.
FREE_FIELDS = (
    *("train.num_epochs", "train.checkpoint_every", "evaluation."),
    *("parallel.", "train.feature_memory", *PLACE_FIELDS),
)


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    text: str


def _one_of(*choices: str) -> _Rule:
    return _Rule(lambda v: v in choices, f"one of {', '.join(choices)}")


def _at_least(low: int) -> _Rule:
    return _Rule(lambda v: isinstance(v, int) and v >= low, f"an integer from {low} up")


def is_number(v: Any) -> bool:
    """Whether it is an integer or a float, and not a boolean."""
    return isinstance(v, int | float) and not isinstance(v, bool)


def is_finite(v: Any) -> bool:
    """Tells whether it is a number that is neither infinite nor NaN."""
    return is_number(v) and math.isfinite(v)


_POSITIVE = _Rule(lambda v: is_finite(v) and v > 0, "a finite number above 0")
_NOT_NEGATIVE = _Rule(lambda v: is_finite(v) and v >= 0, "a finite number from 0 up")
_WHITE_LEVEL = _Rule(
    _NOT_NEGATIVE.holds, "a finite number above 0, or 0 if it is not given"
)
_BELOW_ONE = _Rule(lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)")
_SHARE = _Rule(lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1")
_FRACTION = _Rule(lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_NOT_EMPTY = _Rule(lambda v: isinstance(v, str) and v != "", "some text")
_BOOLEAN = _Rule(lambda v: isinstance(v, bool), "True or False")
# JAX would take the remainder of a larger one, without a word.
_SEED = _Rule(
    lambda v: isinstance(v, int) and 0 <= v < 2**32, "an integer from 0 to 4294967295"
)
_IMAGE_SIZE = _Rule(
    lambda v: (
        isinstance(v, tuple | list)
        and len(v) == 2
        and all(isinstance(n, int) and n >= 64 and n % 32 == 0 for n in v)
    ),
    "(height, width), each a multiple of 32 from 64 up, such as (256, 256)",
)

_RULES = {
    "seed": _SEED,
    "image_size": _IMAGE_SIZE,
    "selection": _one_of(*SELECTIONS),
    "calibration": _one_of("quantile", "none"),
    "threshold.image_fpr": _SHARE,
    "threshold.pixel_fpr": _SHARE,
    "dataset.name": _one_of(*LAYOUTS),
    "dataset.cache_dir": _NOT_EMPTY,
    "dataset.category": _NOT_EMPTY,
    "dataset.validation_fraction": _BELOW_ONE,
    "dataset.white_level": _WHITE_LEVEL,
    "trunk.architecture": _one_of(*ARCHITECTURES),
    "trunk.source": _one_of("builtin", "hub", "file", "random"),
    "trunk.layers": _one_of("auto", *LAYERS),
    "trunk.whiten": _one_of(*WHITEN),
    "model.local_width": _Rule(
        lambda v: isinstance(v, int) and v >= 4 and v % 4 == 0,
        "a multiple of 4 from 4 up",
    ),
    "model.output_activation": _one_of(*ACTIVATIONS),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.b1": _BELOW_ONE,
    "optimizer.b2": _BELOW_ONE,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    # Batch norm over the autoencoder's single code needs two images.
    "train.batch_size": _at_least(2),
    "train.num_epochs": _at_least(1),
    "train.checkpoint_every": _at_least(1),
    "train.dtype": _one_of("float32", "bfloat16"),
    "train.feature_memory": _FRACTION,
    "parallel.backend": _one_of(*BACKENDS),
    "parallel.devices": _at_least(0),
    "evaluation.batch_size": _at_least(1),
    "evaluation.pictures_per_type": _at_least(-1),
    "evaluation.original_resolution": _BOOLEAN,
    "evaluation.write_maps": _BOOLEAN,
}


def validate(config: ConfigDict) -> None:
    """Checks every field that has a rule.

    Raises:
        UserError: names the field, the value, the rule and the flag that changes it.
    """
    for field, rule in _RULES.items():
        value = _get(config, field)
        if not rule.holds(value):
            raise UserError(
                f"Expected config.{field} to be {rule.text}, found {value!r}. Set it "
                f"with --config.{field}=..."
            )
    if not config.dataset.root and config.dataset.name != "synthetic":
        raise UserError(
            "Expected config.dataset.root to be the folder of the data set (or a CSV "
            "file for tables), found nothing. Set it with --config.dataset.root=..."
        )
    trunk = config.trunk
    if trunk.source == "builtin" and trunk.architecture != BUILTIN_ARCHITECTURE:
        raise UserError(
            f"Expected config.trunk.architecture to be {BUILTIN_ARCHITECTURE!r}, the "
            f"built-in trunk's, found {trunk.architecture!r}. Set it with "
            f"--config.trunk.architecture={BUILTIN_ARCHITECTURE}, or take another "
            "--config.trunk.source."
        )
    if trunk.source == "file" and not trunk.path:
        raise UserError(
            "Expected config.trunk.path to name a file, as config.trunk.source is "
            '"file", found nothing. Set it with --config.trunk.path=...'
        )


def describe(config: ConfigDict) -> str:
    """All fields but those that say where files are, which hosts may differ in."""
    return repr(
        [f for f in sorted(flatten(config)) if not f[0].startswith(PLACE_FIELDS)]
    )


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which no field is "auto", as a run is made and kept.

    A run goes by what "auto" became when it began. Another rule here needs another
    `FORMAT`, and the present one for files of formats 0 and 1, which may hold "auto".
    """
    resolved = config.copy_and_resolve_references()
    trunk, is_builtin = resolved.trunk, resolved.trunk.source == "builtin"
    if trunk.layers == "auto":
        trunk.layers = "layer2" if is_builtin else "layer2+layer3"
    if trunk.whiten == "auto":
        trunk.whiten = "always" if is_builtin else "never"
    return resolved


def whitens(config: ConfigDict) -> bool:
    """Tells whether the features are whitened, by a config that is resolved."""
    return {"always": True, "never": False}[config.trunk.whiten]


def save(config: ConfigDict, path: Path) -> None:
    """Writes a resolved config as JSON."""
    document = {"format": FORMAT, **config.to_dict()}
    files.replace(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def load(path: Path) -> ConfigDict:
    """Reads a run's config, of this version or an earlier one; returns it resolved.

    Raises:
        UserError: there is none, it is not one of ours, or a later version's.
    """
    try:
        if not isinstance(fields := json.loads(path.read_text()), dict):
            raise ValueError("no fields")
        _check_format(fields.pop("format", 0), path)
        _fill(fields)
        config = ConfigDict(fields | {"image_size": tuple(fields["image_size"])})
        _check_fields(config)
        validate(config)
        return resolve(config)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"Expected the folder of a run, which holds config.json, found none in "
            f"{path.parent}. Give --workdir the folder that train.py wrote."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"Expected {path} to be a config that train.py wrote, found: {error}. "
            "Restore the file, or train anew in another folder."
        ) from error


def _check_format(found: Any, path: Path) -> None:
    """Refuses the format of a version that may mean another thing by its fields."""
    if found not in range(FORMAT + 1):
        raise UserError(
            f"Expected {path} to be of format {FORMAT} or an earlier one, which this "
            f"version of ulsad_jax reads, found format {found}: another version wrote "
            "it. Use that version, or train anew in another folder."
        )


def _fill(fields: dict[str, Any]) -> None:
    """Adds the fields that were not there yet when the run began."""
    for name, value in _BEFORE.items():
        *groups, field = name.split(".")
        group = fields
        for part in groups:
            group = group.setdefault(part, {})
        group.setdefault(field, value)


def _check_fields(config: ConfigDict) -> None:
    known = dict(flatten(config))
    if missing := [name for name in _RULES if name not in known]:
        raise ValueError(f"no config.{', config.'.join(missing)}")


def check_resumable(old: ConfigDict, new: ConfigDict, workdir: Path) -> None:
    """Refuses a config under which the run in `workdir` cannot be continued.

    Args:
        old: the run's, resolved.
        new: this command's, resolved.
        workdir: for the message.

    Raises:
        UserError: lists the fields that differ.
    """
    old_fields, new_fields = dict(flatten(old)), dict(flatten(new))
    lines = [
        f"  config.{name}: the run has {old_fields.get(name, 'no such field')!r}, "
        f"this command {new_fields.get(name, 'no such field')!r}"
        for name in sorted(old_fields.keys() | new_fields.keys())
        if old_fields.get(name) != new_fields.get(name)
        and not name.startswith(FREE_FIELDS)
    ]
    if lines:
        raise UserError(
            f"Expected the config of the run in {workdir}, found these differences:\n"
            + "\n".join(lines)
            + "\nGive another --workdir, or the run's own values."
        )


def _get(config: ConfigDict, field: str) -> Any:
    value = config
    try:
        for name in field.split("."):
            value = value[name]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"Expected a field config.{field}, found none. Begin a config file of "
            "your own with default.get_config(), as those in configs/ do."
        ) from error
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a tree by their paths, with dots; a list is a tuple."""
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, tuple(value) if isinstance(value, list) else value
