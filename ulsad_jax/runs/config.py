"""Validates configs, and saves and loads them with a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ulsad_jax.command_line import SELECTIONS
from ulsad_jax.data import layouts
from ulsad_jax.methods import base as methods
from ulsad_jax.metrics import base as metrics
from ulsad_jax.runtime import files
from ulsad_jax.runtime.devices import BACKENDS
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.nested import flatten
from ulsad_jax.runtime.rules import (
    BELOW_ONE,
    BOOLEAN,
    FRACTION,
    NOT_EMPTY,
    NOT_NEGATIVE,
    SHARE,
    Rule,
    at_least,
    one_of,
)
from ulsad_jax.scoring import fusion
from ulsad_jax.trunks import base as trunks

# Format of config.json. Raise it when a field is added or changes its meaning, so that
# earlier versions reject files that they would misread.
FORMAT = 2
# Values of fields that did not exist yet when a run began, in any format.
_BEFORE = {
    "dataset.white_level": 0.0,
    "method": "ulsad",
    "methods": {},
    "evaluation.metrics": (),
    "evaluation.original_resolution": False,
    "evaluation.write_maps": False,
    "score.fusion": "map",
    "score.weights": {},
    "score.top_share": 0.0,
    "parallel.backend": "jit",
    "parallel.devices": 0,
    "parallel.shard_state": False,
    "train.feature_memory": 0.5,
    "train.num_updates": 0,
    "train.profile": (),
    "trunk.image_size": (),
    "trunk.layers": "layer2+layer3",
    "trunk.whiten": "never",
}
# Fields that JSON makes lists of, besides `image_size`.
_TUPLES = (("trunk", "image_size"), ("evaluation", "metrics"), ("train", "profile"))
BEST_TEST_AUROC = SELECTIONS[-1]  # the selection that uses test images
WHITEN = (trunks.AUTO, "always", "never")
# Fields that are paths.
PLACE_FIELDS = ("dataset.root", "dataset.cache_dir", "trunk.path")
# Fields that may change between two commands on one work directory, because they do
# not affect what is already trained.
FREE_FIELDS = (
    *("train.num_epochs", "train.num_updates", "train.checkpoint_every"),
    "evaluation.",
    *("parallel.", "train.feature_memory", "train.profile", *PLACE_FIELDS),
)


_WHITE_LEVEL = Rule(
    NOT_NEGATIVE.holds, "a finite number above 0, or 0 if it is not given"
)
# JAX would silently take a larger seed modulo 2**32.
_SEED = Rule(
    lambda v: isinstance(v, int) and 0 <= v < 2**32, "an integer from 0 to 4294967295"
)
_IMAGE_SIZE = Rule(
    lambda v: (
        isinstance(v, tuple | list)
        and len(v) == 2
        and all(isinstance(n, int) and n >= 64 and n % 32 == 0 for n in v)
    ),
    "(height, width), each a multiple of 32 from 64 up, such as (256, 256)",
)
_TRUNK_IMAGE_SIZE = Rule(
    lambda v: (
        isinstance(v, tuple | list)
        and len(v) in (0, 2)
        and all(isinstance(n, int) and n > 0 for n in v)
    ),
    "(height, width), such as (448, 448), or () for config.image_size",
)
_PROFILE = Rule(
    lambda v: (
        isinstance(v, tuple | list)
        and len(v) in (0, 2)
        and all(isinstance(n, int) and n >= 0 for n in v)
        and sorted({*v}) == [*v]
    ),
    "two increasing integers from 0 up, such as (10, 20), or () for no trace",
)
_WEIGHTS = Rule(
    lambda v: hasattr(v, "items") and all(map(NOT_NEGATIVE.holds, v.values())),
    "finite numbers from 0 up by the names of scores",
)

_RULES = {
    "seed": _SEED,
    "image_size": _IMAGE_SIZE,
    "selection": one_of(*SELECTIONS),
    "calibration": one_of("quantile", "none"),
    "score.fusion": one_of(fusion.MAP, fusion.SCORES),
    "score.weights": _WEIGHTS,
    "score.top_share": FRACTION,
    "threshold.image_fpr": SHARE,
    "threshold.pixel_fpr": SHARE,
    "method": NOT_EMPTY,
    "dataset.name": NOT_EMPTY,
    "dataset.cache_dir": NOT_EMPTY,
    "dataset.category": NOT_EMPTY,
    "dataset.validation_fraction": BELOW_ONE,
    "dataset.white_level": _WHITE_LEVEL,
    "trunk.architecture": NOT_EMPTY,  # more in `_check_trunk`
    "trunk.source": one_of(trunks.BUILTIN, "hub", "file", "random"),
    "trunk.image_size": _TRUNK_IMAGE_SIZE,  # more in `_check_trunk`
    "trunk.layers": NOT_EMPTY,  # more in `_check_trunk`
    "trunk.whiten": one_of(*WHITEN),
    "train.batch_size": at_least(1),
    "train.num_epochs": at_least(0),
    "train.num_updates": at_least(0),
    "train.checkpoint_every": at_least(1),
    "train.dtype": one_of("float32", "bfloat16"),
    "train.feature_memory": FRACTION,
    "train.profile": _PROFILE,
    "parallel.backend": one_of(*BACKENDS),
    "parallel.devices": at_least(0),
    "parallel.shard_state": BOOLEAN,
    "evaluation.batch_size": at_least(1),
    "evaluation.pictures_per_type": at_least(-1),
    "evaluation.metrics": Rule(
        lambda v: isinstance(v, tuple | list) and all(isinstance(x, str) for x in v),
        'a tuple of names, such as ("my_metrics:DICE",)',
    ),
    "evaluation.original_resolution": BOOLEAN,
    "evaluation.write_maps": BOOLEAN,
}


def _method_rules(config: ConfigDict) -> dict[str, Rule]:
    """Returns the rules of the config's method; its own fields may be left out."""
    known = dict(flatten(config))
    rules = methods.find(config.method).rules
    return {
        k: v for k, v in rules.items() if k in known or not k.startswith("methods.")
    }


def validate(config: ConfigDict) -> None:
    """Checks the fields of a config.

    Raises:
        UserError: names the field, the value, the rule and the flag that changes it.
    """
    _check(config, _RULES)
    _check(config, _method_rules(config))
    layouts.find(config.dataset.name)
    metrics.find(config.evaluation.metrics)
    if not config.dataset.root and config.dataset.name != "synthetic":
        raise UserError(
            "Expected config.dataset.root to be the folder of the data set (or a CSV "
            "file for tables), found nothing. Set it with --config.dataset.root=..."
        )
    train = config.train
    if bool(train.num_epochs) == bool(train.num_updates):
        raise UserError(
            "Expected one of config.train.num_epochs and config.train.num_updates "
            f"to be 0, and the other above it, found {train.num_epochs} and "
            f"{train.num_updates}. Set both, as with --config.train.num_epochs=10 "
            "--config.train.num_updates=0."
        )
    _check_trunk(config)


def _check(config: ConfigDict, rules: Mapping[str, Rule]) -> None:
    for field, rule in rules.items():
        value = _get(config, field)
        if not rule.holds(value):
            raise UserError(
                f"Expected config.{field} to be {rule.text}, found {value!r}. Set it "
                f"with --config.{field}=..."
            )


def _check_trunk(config: ConfigDict) -> None:
    """Checks the fields that depend on the trunk's architecture or on its source.

    Raises:
        UserError: a value breaks a rule, see `validate`.
    """
    trunk = config.trunk
    architecture = trunks.find(trunk.architecture)
    if trunk.source == "file" and not trunk.path:
        raise UserError(
            "Expected config.trunk.path to name a file, as config.trunk.source is "
            '"file", found nothing. Set it with --config.trunk.path=...'
        )
    if trunk.layers != trunks.AUTO:
        trunks.check_layers(trunk.architecture, trunk.layers)
    size, multiple = input_size(config), architecture.multiple
    if needs_trunk(config) and any(n % multiple for n in size):
        field, otherwise = "trunk.image_size", ""
        if size == tuple(config.image_size):
            larger = tuple(n // 8 * multiple for n in size)
            field = "image_size"
            otherwise = (
                f", or let the trunk see larger images, such as "
                f"--config.trunk.image_size='{larger}'"
            )
        raise UserError(
            f"Expected config.{field} to be multiples of {multiple}, for "
            f"{trunk.architecture}, found {size}. Set it with --config.{field}=..."
            f"{otherwise}."
        )


def describe(config: ConfigDict) -> str:
    """Returns all fields as text, except paths, which may differ between hosts."""
    return repr(
        [f for f in sorted(flatten(config)) if not f[0].startswith(PLACE_FIELDS)]
    )


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which every "auto" is replaced by the value that it stands for.

    The copy omits the fields of methods other than the run's.

    A run keeps the values that "auto" had when it began. To change a rule here, raise
    `FORMAT`, and keep the present rule for files of earlier formats, which may contain
    "auto".
    """
    resolved = config.copy_and_resolve_references()
    method = methods.find(resolved.method)
    levels = method.takes == methods.LEVELS
    layers, whiten = trunks.resolve(config.trunk, levels=levels)
    resolved.trunk.layers = layers
    resolved.trunk.whiten = "always" if whiten else "never"
    if method.num_epochs is not None:
        resolved.train.num_epochs = method.num_epochs
        resolved.train.num_updates = 0
    names = {methods.short_name(part) for part in resolved.method.split("+")}
    with resolved.unlocked():  # omit the fields of other methods
        own = {k: v for k, v in resolved.methods.items() if k in names}
        resolved.methods = ConfigDict(own)
    return resolved


def needs_trunk(config: ConfigDict) -> bool:
    """Returns whether the method takes features of a trunk."""
    return methods.find(config.method).takes != methods.IMAGES


def input_size(config: ConfigDict) -> tuple[int, int]:
    """Returns the (height, width) in pixels at which images enter.

    It is `config.trunk.image_size`, or `config.image_size` if that is () or the method
    takes no features.
    """
    own = needs_trunk(config) and config.trunk.image_size
    return tuple(own or config.image_size)


def whitens(config: ConfigDict) -> bool:
    """Returns whether features are whitened, see `config.trunk.whiten`."""
    return trunks.resolve(config.trunk)[1]


def save(config: ConfigDict, path: Path) -> None:
    """Writes a resolved config as JSON."""
    document = {"format": FORMAT, **config.to_dict()}
    files.replace(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def load(path: Path) -> ConfigDict:
    """Reads a run's config, of this or an earlier version, and resolves it.

    Args:
        path: path of config.json.

    Raises:
        UserError: there is no config, it is damaged, or a later version wrote it.
    """
    try:
        if not isinstance(fields := json.loads(path.read_text()), dict):
            raise ValueError("no fields")
        _check_format(version := fields.pop("format", 0), path)
        _fill(fields)
        _resolve_as_before(fields["trunk"], version)
        fields["image_size"] = tuple(fields["image_size"])
        for group, name in _TUPLES:
            fields[group][name] = tuple(fields[group][name])
        config = ConfigDict(fields)
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
    """Rejects unknown formats, in which fields may have another meaning."""
    if found not in range(FORMAT + 1):
        raise UserError(
            f"Expected {path} to be of format {FORMAT} or an earlier one, which this "
            f"version of ulsad_jax reads, found format {found}: another version wrote "
            "it. Use that version, or train anew in another folder."
        )


def _fill(fields: dict[str, Any]) -> None:
    """Adds the fields that did not exist yet when the run began."""
    for name, value in _BEFORE.items():
        *groups, field = name.split(".")
        group = fields
        for part in groups:
            group = group.setdefault(part, {})
        group.setdefault(field, value)


def _resolve_as_before(trunk: dict[str, Any], version: int) -> None:
    """Replaces "auto" by what it meant with weights built in before format 2."""
    if version < 2 and trunk["source"] == trunks.BUILTIN:
        for name, value in (("layers", "layer2"), ("whiten", "always")):
            if trunk[name] == trunks.AUTO:
                trunk[name] = value


def _check_fields(config: ConfigDict) -> None:
    known = dict(flatten(config)) | {"score.weights": config.score.weights}
    if missing := [name for name in _RULES if name not in known]:
        raise ValueError(f"no config.{', config.'.join(missing)}")


def check_resumable(old: ConfigDict, new: ConfigDict, workdir: Path) -> None:
    """Checks that the run in `workdir` can be continued with a config.

    Args:
        old: resolved config of the run.
        new: resolved config of the present command.
        workdir: folder of the run, used in the message.

    Raises:
        UserError: the configs differ; the message lists the fields.
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
