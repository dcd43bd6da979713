"""Summarises a sweep: its table, CSV files, JSON file and plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ulsad_jax.metrics import base
from ulsad_jax.metrics.values import finite, mean_row, with_nan
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runtime import files
from ulsad_jax.sweep import costs
from ulsad_jax.sweep.fusions import FUSIONS
from ulsad_jax.sweep.grid import Member

FORMAT = 1  # of results.json
ALL_CATEGORIES = "mean"
VALIDATION = "validation_loss"
HEADLINE = "image_auroc"
PERCENT = costs.Column("", 100, 1)


class Entry(NamedTuple):
    """A member and its results.

    Attributes:
        member: member of the sweep.
        failure: reason why there are no metrics, or an empty string.
        step: number of updates of the evaluated checkpoint.
        metrics: metrics by name, with the validation loss; NaN where undefined.
        loss_fields: text of the config fields that define the loss; validation losses
            can be compared only if it is equal.
    """

    member: Member
    failure: str
    step: int
    metrics: dict[str, float]
    loss_fields: str


class Group(NamedTuple):
    """Results of members that differ only in their seed.

    Attributes:
        setting: common setting of the members.
        category: category, or `ALL_CATEGORIES` for the mean over categories.
        seeds: seeds of the members that have metrics.
        mean: mean of each metric.
        std: standard deviation of each metric, with n - 1; NaN for a single seed.
    """

    setting: str
    category: str
    seeds: list[int]
    mean: dict[str, float]
    std: dict[str, float]


def read_entry(member: Member, folder: Path, *, failure: str) -> Entry:
    """Reads the results in a member's folder.

    Args:
        member: member of the sweep.
        folder: work directory of the member.
        failure: reason why there are no results, or an empty string.
    """
    config = member.config
    groups = config.methods, config.losses
    losses = repr([config.method, *(sorted(config_lib.flatten(g)) for g in groups)])
    if failure:
        return Entry(member, failure, 0, {}, losses)
    inside = folder / files_of.folder_name(member.category)
    document = json.loads((inside / files_of.RESULTS).read_text())
    metrics = with_nan(document["metrics"])
    for line in (inside / files_of.EPOCHS).read_text().splitlines():
        epoch = json.loads(line)
        if epoch["step"] == document["step"]:
            metrics[VALIDATION] = epoch.get("validation/total", math.nan)
    path = inside / FUSIONS
    scored = json.loads(path.read_text()) if path.exists() else {}
    scored.pop("step", None)
    for fusion, values in scored.items():
        for name, value in with_nan(values).items():
            metrics[f"{fusion}: {name}"] = value
    if (path := inside / costs.COSTS).exists():
        metrics |= with_nan(json.loads(path.read_text()) | {"step": math.nan})
    return Entry(member, "", document["step"], metrics, losses)


def group(entries: Iterable[Entry]) -> list[Group]:
    """Returns mean and deviation over seeds, for each category and for their mean."""
    rows: dict[tuple[str, str], dict[int, Mapping[str, float]]] = {}
    by_setting: dict[str, dict[int, dict[str, Mapping[str, float]]]] = {}
    categories: dict[str, set[str]] = {}
    for entry in entries:
        member = entry.member
        row = rows.setdefault((member.setting, member.category), {})
        categories.setdefault(member.setting, set()).add(member.category)
        if not entry.failure:
            row[member.seed] = entry.metrics
            seeds = by_setting.setdefault(member.setting, {})
            seeds.setdefault(member.seed, {})[member.category] = entry.metrics
    for setting, names in categories.items():
        if len(names) > 1:  # without seeds that lack a category
            rows[setting, ALL_CATEGORIES] = {
                seed: mean_row(found)
                for seed, found in by_setting.get(setting, {}).items()
                if len(found) == len(names)
            }
    return [_average(*key, by_seed) for key, by_seed in rows.items()]


def write(workdir: Path, entries: Sequence[Entry], traced: Sequence[str]) -> str:
    """Writes members.csv, results.csv, results.json and results.png.

    Args:
        workdir: work directory of the sweep.
        entries: results of all members.
        traced: fields that were arguments of the program.

    Returns:
        The table of mean and deviation, the best members, and the paths of the files.
    """
    groups, best = group(entries), find_best(entries)
    on_test = any(
        e.member.config.selection == config_lib.BEST_TEST_AUROC for e in entries
    )
    names = list(dict.fromkeys(name for e in entries for name in e.metrics))
    members, table_csv, document, plot = (
        workdir / name
        for name in ("members.csv", "results.csv", "results.json", "results.png")
    )
    files.replace_csv(members, _member_rows(entries, names))
    files.replace_csv(table_csv, _group_rows(groups, names, on_test=on_test))
    content = {
        "format": FORMAT,
        "selected_on_test": on_test,
        "traced": list(traced),
        "best": best,
        "groups": [
            g._asdict() | {"mean": finite(g.mean), "std": finite(g.std)} for g in groups
        ],
        "members": [_describe(e) for e in entries],
    }
    files.replace(document, json.dumps(content, indent=2) + "\n")
    metrics = base.find(entries[0].member.config.evaluation.metrics)
    titles = base.columns(metrics) | {VALIDATION: "validation loss"}
    titles |= {name: column.title for name, column in costs.COLUMNS.items()}
    lines = [table(groups, titles), *_tell(entries, best, on_test=on_test)]
    if any(HEADLINE in e.metrics for e in entries):
        _plot(plot, entries, groups)
        lines.append(f"Plot: {plot}")
    lines.append(f"Results: {document}, {table_csv}, {members}")
    lines.append(f"Each member, as a run of its own: {workdir}/members/<member>")
    return "\n".join(lines)


def table(groups: Sequence[Group], titles: Mapping[str, str]) -> str:
    """Returns a text table with one line per group: mean and deviation over seeds.

    Metrics are in percent, costs in the units of their titles.

    Args:
        groups: groups of members.
        titles: column titles by metric.
    """
    wanted = _columns(groups, titles)
    names = [n for n in wanted if any(n in g.mean for g in groups)]
    titles = {n: titles.get(n) or _title(n) for n in names}
    rows = [["setting", "category", "seeds", *titles.values()]]
    for g in groups:
        cells = [_cell(n, g) for n in names]
        rows.append([g.setting, g.category, str(len(g.seeds)), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def find_best(entries: Sequence[Entry]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the best members of each category, by validation loss and by test AUROC.

    The loss is that on the validation normals. It is left out if members have another
    method, or other loss terms or weights, because such losses cannot be compared. The
    AUROC is that of the test images: a choice by it is a selection on the test set.
    """
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for category in dict.fromkeys(e.member.category for e in entries):
        own = [e for e in entries if e.member.category == category]
        rankings: dict[str, tuple[str, Callable[..., Entry]]] = {}
        if len({e.loss_fields for e in own}) == 1:
            rankings["by_validation_loss"] = VALIDATION, min
        rankings["by_test_auroc"] = HEADLINE, max
        best[category] = {}
        for name, (metric, choose) in rankings.items():
            ranked = [e for e in own if _has(e, metric)]
            if ranked:
                found = choose(ranked, key=lambda e, m=metric: e.metrics[m])
                best[category][name] = {
                    "member": found.member.name,
                    "value": found.metrics[metric],
                    "selected_on_test": metric == HEADLINE,
                }
    return best


def _has(entry: Entry, metric: str) -> bool:
    """Returns whether a metric of a member is defined."""
    return math.isfinite(entry.metrics.get(metric, math.nan))


def _average(
    setting: str, category: str, by_seed: Mapping[int, Mapping[str, float]]
) -> Group:
    mean, std = {}, {}
    for name in dict.fromkeys(name for row in by_seed.values() for name in row):
        values = [row.get(name, math.nan) for row in by_seed.values()]
        mean[name] = math.fsum(values) / len(values)
        std[name] = math.nan
        if len(values) > 1 and all(map(math.isfinite, values)):
            std[name] = statistics.stdev(values)
    return Group(setting, category, sorted(by_seed), mean, std)


def _tell(
    entries: Sequence[Entry],
    best: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    on_test: bool,
) -> list[str]:
    lines = []
    for category, found in best.items():
        if choice := found.get("by_validation_loss"):
            lines.append(
                f"{category}, lowest loss on validation normals: {choice['member']} "
                f"({choice['value']:.4f})"
            )
        elif any(_has(e, VALIDATION) for e in entries if e.member.category == category):
            lines.append(
                f"{category}: validation losses are not compared, for members have "
                "other methods, terms or weights."
            )
        if choice := found.get("by_test_auroc"):
            lines.append(
                f"{category}, highest image AUROC, SELECTED ON THE TEST SET: "
                f"{choice['member']} ({100 * choice['value']:.2f})"
            )
    failed = [e for e in entries if e.failure]
    lines += [f"{e.member.name} failed: {e.failure}" for e in failed]
    if on_test:
        lines.append(
            "SELECTED ON THE TEST SET: checkpoints are the best of these very images "
            "(the reference's protocol); do not compare with honest results."
        )
    return lines


def _columns(groups: Sequence[Group], titles: Mapping[str, str]) -> list[str]:
    """Returns headline metrics, image AUROC by type, and image AUROC by fusion."""
    found = list(dict.fromkeys(name for g in groups for name in g.mean))
    types = [n for n in found if n.startswith(f"{HEADLINE}/")]
    fusions = [n for n in found if n.endswith(f": {HEADLINE}")]
    return [HEADLINE, *types, *fusions, *(n for n in titles if n != HEADLINE)]


def _title(name: str) -> str:
    """Returns the title of a metric of one type of anomaly, or of another fusion."""
    fusion, _, metric = name.rpartition(": ")
    return f"AUROC, {fusion}" if fusion else metric.partition("/")[2]


def _cell(name: str, of: Group) -> str:
    mean, std = of.mean.get(name, math.nan), of.std.get(name, math.nan)
    if math.isnan(mean):
        return "-"
    _, scale, digits = costs.COLUMNS.get(name, PERCENT)
    if name == VALIDATION:
        scale, digits = 1, 4
    text = f"{scale * mean:.{digits}f}"
    return text if math.isnan(std) else f"{text} ± {scale * std:.{digits}f}"


def _describe(entry: Entry) -> dict[str, Any]:
    """Returns a member's entry in results.json."""
    member = entry.member
    return {
        "name": member.name,
        "setting": member.setting,
        "category": member.category,
        "seed": member.seed,
        "fields": member.fields,
        "failure": entry.failure,
        "step": entry.step,
        "metrics": finite(entry.metrics),
    }


def _member_rows(entries: Sequence[Entry], names: Sequence[str]) -> list[list[Any]]:
    """Returns the members as rows of a CSV file.

    Args:
        entries: results of all members.
        names: names of the metrics to list, after the fields that vary.
    """
    fields = list(dict.fromkeys(f for e in entries for f in e.member.fields))
    fields = [field for field in fields if field != "seed"]  # it has its own column
    rows = [["member", "setting", "category", "seed", *fields, "failure", *names]]
    for e in entries:
        member = e.member
        rows.append(
            [member.name, member.setting, member.category, member.seed]
            + [member.fields.get(field, "") for field in fields]
            + [e.failure, *(_number(e.metrics.get(name)) for name in names)]
        )
    return rows


def _group_rows(
    groups: Sequence[Group], names: Sequence[str], *, on_test: bool
) -> list[list[Any]]:
    """Returns the groups as rows of a CSV file.

    Args:
        groups: groups of members.
        names: names of the metrics whose mean and deviation to list.
        on_test: True if checkpoints were selected on the test set.
    """
    columns = [f"{name} {part}" for name in names for part in ("mean", "std")]
    rows = [["setting", "category", "seeds", "selected_on_test", *columns]]
    for g in groups:
        numbers = [_number(part.get(n)) for n in names for part in (g.mean, g.std)]
        rows.append([g.setting, g.category, len(g.seeds), on_test, *numbers])
    return rows


def _number(value: float | None) -> float | str:
    """Returns a number for a CSV file; an undefined one becomes an empty string."""
    return "" if value is None or math.isnan(value) else value


def _plot(path: Path, entries: Sequence[Entry], groups: Sequence[Group]) -> None:
    """Plots the image AUROC of every member, and the mean of each group."""
    from matplotlib.figure import Figure

    single = len({g.category for g in groups}) == 1
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for y, g in enumerate(groups):
        own = [
            100 * e.metrics[HEADLINE]
            for e in entries
            if (e.member.setting, e.member.category) == (g.setting, g.category)
            and HEADLINE in e.metrics
        ]
        axes.plot(own, [y] * len(own), "o", color="#2f76c9", alpha=0.6)
        mean = 100 * g.mean.get(HEADLINE, math.nan)
        axes.plot(mean, y, "|", color="#c0392b", ms=16, mew=2)
    labels = [g.setting if single else f"{g.setting}, {g.category}" for g in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.set_ylim(-0.5, len(groups) - 0.5)  # include rows without a result
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("image AUROC in per cent:\neach member, and the mean over seeds")
    figure.savefig(path, dpi=120)
