"""Lists the members of a sweep, with their configs and their common program."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ulsad_jax.methods import base as methods
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runtime import files
from ulsad_jax.runtime.errors import UserError, suggest
from ulsad_jax.runtime.rules import is_finite, is_number
from ulsad_jax.sweep.wave import BACKENDS

if TYPE_CHECKING:
    from ml_collections import ConfigDict

FIELDS = ("grid", "variants", "fusions", "costs")
FIELDS += ("backend", "device_memory", "host_memory")
SEED = "seed"
# Fields that the training step does not depend on: those of the data, the features,
# validation and the loop.
OUTSIDE_STEP = (
    *("seed", "selection", "calibration", "threshold.", "dataset.", "trunk."),
    *("evaluation.", "train.num_epochs", "train.num_updates"),
    *("train.checkpoint_every", "score."),
)


class Member(NamedTuple):
    """A training of a sweep.

    Attributes:
        name: name of the folder; made of category, setting and seed.
        setting: the name without category and seed, over which results are averaged.
        category: category to train.
        fields: config fields that the variant and the grid set.
        config: resolved config of the same training outside a sweep.
    """

    name: str
    setting: str
    category: str
    fields: dict[str, Any]
    config: ConfigDict

    @property
    def seed(self) -> int:
        """Seed of the initial weights, the image order and the validation split."""
        return self.config.seed


def list_members(config: ConfigDict, categories: Sequence[str]) -> list[Member]:
    """Returns a member for every category, variant and combination of grid values.

    Args:
        config: config with a field `sweep`, see configs/sweep.py.
        categories: categories to train.

    Raises:
        UserError: an unknown field, a value of another type, a repeated value, or no
            value at all.
    """
    sweep = config.sweep
    _check_sweep(sweep)
    base = config.copy_and_resolve_references()
    with base.unlocked():
        del base.sweep
    base_fields = dict(config_lib.flatten(base))
    axes = {k: v for k, v in config_lib.flatten(sweep.grid) if v != ()}
    for field, values in axes.items():
        _check_axis(field, values, base_fields)
    variants = {
        name: dict(config_lib.flatten(fields)) for name, fields in _variants(sweep)
    }
    for name, fields in variants.items():
        for field, value in fields.items():
            _check_value(f"config.sweep.variants.{name}", field, value, base_fields)
            if field in axes:
                raise UserError(
                    f"Expected config.{field} in config.sweep.grid or in "
                    f"config.sweep.variants.{name}, found it in both. Remove one."
                )
    if not axes and not variants:
        raise UserError(
            "Expected values in config.sweep.grid, or variants, found none. Give some, "
            "as with --config.sweep.grid.seed='(0, 1, 2)'."
        )
    members = [
        _make_member(base, category, name, variant, dict(zip(axes, point, strict=True)))
        for category in categories
        for name, variant in (variants or {"": {}}).items()
        for point in itertools.product(*axes.values())
    ]
    _check_distinct(members)
    return members


def _check_sweep(sweep: ConfigDict) -> None:
    """Rejects missing, unknown and out-of-range fields of `config.sweep`."""
    if unknown := sorted(set(sweep.keys()) ^ set(FIELDS)):
        raise UserError(
            f"Expected config.sweep to hold {', '.join(FIELDS)}, as in "
            f"configs/sweep.py, found {', '.join(sweep.keys())}. Look at "
            f"{', '.join(unknown)}."
        )
    if sweep.backend not in ("", *BACKENDS):
        raise UserError(
            f"Expected config.sweep.backend to be empty or {' or '.join(BACKENDS)}, "
            f"found {sweep.backend!r}. Set it with --config.sweep.backend=..."
        )
    for field in ("device_memory", "host_memory"):
        if not (is_finite(sweep[field]) and sweep[field] >= 0):
            raise UserError(
                f"Expected config.sweep.{field} to be gibibytes, or 0 for the default, "
                f"found {sweep[field]!r}. Set it with --config.sweep.{field}=..."
            )


def traced_fields(members: Sequence[Member]) -> list[str]:
    """Returns the fields in which members differ and that the program can trace."""
    tables = [dict(config_lib.flatten(member.config)) for member in members]
    return [
        field
        for field in tables[0]
        if _is_number_of_step(field, tables)
        and len({table.get(field) for table in tables}) > 1
    ]


def program(member: Member, traced: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """Returns the fields that must be equal in all members of one program."""
    return tuple(
        (field, value)
        for field, value in sorted(config_lib.flatten(member.config))
        if field not in traced and not field.startswith(OUTSIDE_STEP)
    )


def _is_number_of_step(field: str, tables: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether a field is numeric and can be traced by the members' method."""
    values = [table.get(field) for table in tables]
    kinds = {table["method"] for table in tables}
    return (
        len(kinds) == 1
        and all(map(is_number, values))
        and methods.find(kinds.pop()).traceable(field, values)
    )


def _variants(sweep: ConfigDict) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, fields in sweep.variants.items():
        if not hasattr(fields, "keys"):
            raise UserError(
                f"Expected config.sweep.variants.{name} to map fields to values, found "
                f"{fields!r}. See configs/ablation.py."
            )
        yield name, fields


def _check_axis(field: str, values: Any, known: Mapping[str, Any]) -> None:
    where = "config.sweep.grid"
    if not isinstance(values, tuple):
        raise UserError(
            f"Expected {where}.{field} to be a tuple of values, found {values!r}. "
            f"Write ({values!r},)."
        )
    for value in values:
        _check_value(where, field, value, known)
    if len(set(values)) < len(values):
        raise UserError(
            f"Expected {where}.{field} to have every value once, found {values}. "
            "Remove what is there twice."
        )


def _check_value(where: str, field: str, value: Any, known: Mapping[str, Any]) -> None:
    """Rejects an unknown field, and a value of another type than the config's."""
    if field not in known:
        raise UserError(
            f"Expected fields of the config in {where}, found {field!r}. "
            f"Correct its name.{suggest(field, known)}"
        )
    if field == "dataset.category":
        raise UserError(
            f"Expected no dataset.category in {where}: a sweep trains every category "
            f"of config.dataset.category, found {value!r}. Set it there."
        )
    old = known[field]
    fits = is_finite(value) if is_number(old) else type(value) is type(old)
    if not fits:
        kind = "finite numbers" if is_number(old) else f"like {old!r}"
        raise UserError(
            f"Expected values of {field} in {where} to be {kind}, found {value!r}. "
            "Correct it."
        )


def _make_member(
    base: ConfigDict,
    category: str,
    variant: str,
    changes: Mapping[str, Any],
    point: Mapping[str, Any],
) -> Member:
    """Makes the member of a variant at a grid point.

    Args:
        base: config without `sweep`.
        category: category to train.
        variant: name of the variant; part of the member's name.
        changes: fields that the variant sets.
        point: fields that the grid sets.
    """
    fields = {**changes, **point}
    config = base.copy_and_resolve_references()
    with config.ignore_type(), config.unlocked():
        config.update_from_flattened_dict({**fields, "dataset.category": category})
    parts = [variant] if variant else []
    parts += [f"{k}_{_show(v)}" for k, v in point.items() if k != SEED]
    name = files.safe_name("-".join([category, *parts, f"seed_{config.seed}"]))
    # Those of the sweep's own config are for the members that read them.
    losses = [field for field in fields if field.startswith("losses.")]
    try:
        config_lib.validate(config)
        methods.check_losses(config.method, losses)
    except UserError as error:
        raise UserError(f"Member {name} of the sweep: {error}") from error
    setting = "-".join(parts) or "all"
    return Member(name, setting, category, fields, config_lib.resolve(config))


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_distinct(members: Sequence[Member]) -> None:
    """Rejects members with equal configs or equal names."""
    for key, what in (
        (lambda m: str(sorted(config_lib.flatten(m.config))), "to differ"),
        (lambda m: m.name, "to have names of their own"),
    ):
        seen: dict[str, Member] = {}
        for member in members:
            other = seen.setdefault(key(member), member)
            if other is not member:
                raise UserError(
                    f"Expected all members of the sweep {what}, found {other.name} and "
                    f"{member.name} alike. Remove a value or a variant."
                )
