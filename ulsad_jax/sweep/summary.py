"""What came out of a sweep: its table, CSV, JSON and plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import results
from ulsad_jax.runtime import files
from ulsad_jax.sweep.fusions import FUSIONS
from ulsad_jax.sweep.grid import Member

FORMAT = 1  # of results.json
ALL_CATEGORIES = "mean"
VALIDATION = "validation_loss"
TABLE = results.TABLE | {VALIDATION: "validation loss"}
HEADLINE = "image_auroc"


class Entry(NamedTuple):
    """A member and what became of it.

    Attributes:
        member: which one.
        failure: why it has no metrics, or nothing.
        step: that was evaluated.
        metrics: by name, with the validation loss; NaN where undefined.
        loss_fields: of its config: validation losses of others are other sums.
    """

    member: Member
    failure: str
    step: int
    metrics: dict[str, float]
    loss_fields: str


class Group(NamedTuple):
    """Members that differ in their seed alone.

    Attributes:
        setting: what they have in common.
        category: of all, or `ALL_CATEGORIES`.
        seeds: of those that have metrics.
        mean: of each metric.
        std: of each metric, with n - 1; NaN for a single seed.
    """

    setting: str
    category: str
    seeds: list[int]
    mean: dict[str, float]
    std: dict[str, float]


def read_entry(member: Member, folder: Path, *, failure: str) -> Entry:
    """Reads what a member's folder says.

    Args:
        member: which one.
        folder: its run's.
        failure: why it has no results, or nothing.
    """
    losses = repr(sorted(config_lib.flatten(member.config.losses)))
    if failure:
        return Entry(member, failure, 0, {}, losses)
    inside = folder / results.folder_name(member.category)
    document = json.loads((inside / "results.json").read_text())
    metrics = results.with_nan(document["metrics"])
    for line in (inside / "metrics.jsonl").read_text().splitlines():
        epoch = json.loads(line)
        if epoch["step"] == document["step"]:
            metrics[VALIDATION] = epoch["validation/total"]
    path = inside / FUSIONS
    scored = json.loads(path.read_text()) if path.exists() else {}
    scored.pop("step", None)
    for fusion, values in scored.items():
        for name, value in results.with_nan(values).items():
            metrics[f"{fusion}: {name}"] = value
    return Entry(member, "", document["step"], metrics, losses)


def group(entries: Iterable[Entry]) -> list[Group]:
    """Mean and deviation over seeds, of each category and of their mean."""
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
        if len(names) > 1:  # seeds of which a category is missing are left out
            rows[setting, ALL_CATEGORIES] = {
                seed: results.mean_row(found)
                for seed, found in by_setting.get(setting, {}).items()
                if len(found) == len(names)
            }
    return [_average(*key, by_seed) for key, by_seed in rows.items()]


def write(workdir: Path, entries: Sequence[Entry], traced: Sequence[str]) -> str:
    """Writes members.csv, results.csv, results.json and results.png.

    Args:
        workdir: of the sweep.
        entries: all members.
        traced: the fields that were arguments of the program.

    Returns:
        The table of mean and deviation, the best members, and where the rest is.
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
            g._asdict() | {"mean": results.finite(g.mean), "std": results.finite(g.std)}
            for g in groups
        ],
        "members": [_describe(e) for e in entries],
    }
    files.replace(document, json.dumps(content, indent=2) + "\n")
    lines = [table(groups), *_tell(entries, best, on_test=on_test)]
    if any(HEADLINE in e.metrics for e in entries):
        _plot(plot, entries, groups)
        lines.append(f"Plot: {plot}")
    lines.append(f"Results: {document}, {table_csv}, {members}")
    lines.append(f"Each member, as a run of its own: {workdir}/members/<member>")
    return "\n".join(lines)


def table(groups: Sequence[Group]) -> str:
    """One line a group: mean and deviation over seeds, metrics in per cent."""
    names = [n for n in _columns(groups) if any(n in g.mean for g in groups)]
    titles = {n: _title(n) for n in names}
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
    """Of each category, the members with the lowest loss and with the highest AUROC.

    The loss is that on the validation normals, and is left out where members have
    other terms or weights: their losses are other sums. The AUROC is that on the test
    images: whoever chooses by it has selected on them.
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
            ranked = [e for e in own if math.isfinite(e.metrics.get(metric, math.nan))]
            if ranked:
                found = choose(ranked, key=lambda e, m=metric: e.metrics[m])
                best[category][name] = {
                    "member": found.member.name,
                    "value": found.metrics[metric],
                    "selected_on_test": metric == HEADLINE,
                }
    return best


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
        elif found:
            lines.append(
                f"{category}: validation losses are not compared, for members have "
                "other terms or weights."
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


def _columns(groups: Sequence[Group]) -> list[str]:
    """Headline metrics, image AUROC by type, and the other fusions' AUROC."""
    found = list(dict.fromkeys(name for g in groups for name in g.mean))
    types = [n for n in found if n.startswith(f"{HEADLINE}/")]
    fusions = [n for n in found if n.endswith(f": {HEADLINE}")]
    return [HEADLINE, *types, *fusions, *(n for n in TABLE if n != HEADLINE)]


def _title(name: str) -> str:
    if name in TABLE:
        return TABLE[name]
    fusion, _, metric = name.rpartition(": ")
    return f"AUROC, {fusion}" if fusion else metric.partition("/")[2]


def _cell(name: str, of: Group) -> str:
    mean, std = of.mean.get(name, math.nan), of.std.get(name, math.nan)
    if math.isnan(mean):
        return "-"
    scale, digits = (1, 4) if name == VALIDATION else (100, 1)
    text = f"{scale * mean:.{digits}f}"
    return text if math.isnan(std) else f"{text} ± {scale * std:.{digits}f}"


def _describe(entry: Entry) -> dict[str, Any]:
    """A member as results.json has it."""
    member = entry.member
    return {
        "name": member.name,
        "setting": member.setting,
        "category": member.category,
        "seed": member.seed,
        "fields": member.fields,
        "failure": entry.failure,
        "step": entry.step,
        "metrics": results.finite(entry.metrics),
    }


def _member_rows(entries: Sequence[Entry], names: Sequence[str]) -> list[list[Any]]:
    """Members as a CSV's rows, with the fields that vary and the named metrics."""
    fields = list(dict.fromkeys(f for e in entries for f in e.member.fields))
    fields = [field for field in fields if field != "seed"]  # which has a column
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
    """Groups as a CSV's rows, with mean and deviation of the named metrics."""
    columns = [f"{name} {part}" for name in names for part in ("mean", "std")]
    rows = [["setting", "category", "seeds", "selected_on_test", *columns]]
    for g in groups:
        numbers = [_number(part.get(n)) for n in names for part in (g.mean, g.std)]
        rows.append([g.setting, g.category, len(g.seeds), on_test, *numbers])
    return rows


def _number(value: float | None) -> float | str:
    """As a CSV has it: empty where undefined."""
    return "" if value is None or math.isnan(value) else value


def _plot(path: Path, entries: Sequence[Entry], groups: Sequence[Group]) -> None:
    """Image AUROC of every member, and the mean of each group."""
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
    axes.set_ylim(-0.5, len(groups) - 0.5)  # rows without a result, too
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("image AUROC in per cent:\neach member, and the mean over seeds")
    figure.savefig(path, dpi=120)
