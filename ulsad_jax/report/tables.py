"""Formats the results, their thresholds and notes as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ulsad_jax.metrics import base
from ulsad_jax.metrics.values import mean_row


def columns(about: Mapping[str, Any]) -> dict[str, str]:
    """Returns the titles of a table's columns by metric.

    Args:
        about: results.json without the metrics. In a file of an earlier version, which
            has no titles, the columns are those of the built-in metrics.
    """
    return about.get("columns") or base.columns(base.find(()))


def split_types(metric: str, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns the names of a metric by type of anomaly, "<metric>/<type>".

    Args:
        metric: name of the metric.
        rows: metrics by category and name.
    """
    names = {name for row in rows.values() for name in row}
    return sorted(name for name in names if name.startswith(f"{metric}/"))


def table(
    categories: Mapping[str, Mapping[str, float]], about: Mapping[str, Any]
) -> str:
    """Returns a text table of the metrics in percent, with notes and thresholds.

    Args:
        categories: metrics by category and name.
        about: results.json without the metrics.
    """
    rows = list(categories.items())
    if len(rows) > 1:
        rows.append(("mean", mean_row(categories)))
    titles = {
        k: title
        for k, title in columns(about).items()
        if any(k in row for _, row in rows)
    }
    width = max(len(name) for name in ("category", *(name for name, _ in rows)))
    lines = ["  ".join(["category".ljust(width), *titles.values()])]
    for name, row in rows:
        cells = [
            _percent(row.get(k, math.nan)).rjust(len(title))
            for k, title in titles.items()
        ]
        lines.append("  ".join([name.ljust(width), *cells]))
    for name, row in categories.items():
        for metric, title in titles.items():
            if types := split_types(metric, {name: row}):
                listed = ", ".join(
                    f"{k.partition('/')[2]} {_percent(row[k])}" for k in types
                )
                lines.append(f"{name}, {title} by type: {listed}")
        lines += [f"{name}, {note}" for note in pixel_notes(row)]
        if name in about.get("decisions", {}):
            lines += _decision_lines(name, row, **about["decisions"][name])
    if about["selected_on_test"]:
        lines.append(
            "SELECTED ON THE TEST SET: the checkpoint is the best of these very images "
            "(the reference's protocol); do not compare with honest results."
        )
    return "\n".join(lines)


def pixel_notes(row: Mapping[str, float]) -> list[str]:
    """Returns notes about anomalous images that the pixel metrics miss, as sentences.

    Args:
        row: metrics of a category by name.
    """
    notes = []
    left_out = int(row.get("pixel_images_left_out", 0))
    if left_out:
        notes.append(
            f"pixel metrics leave out {left_out} anomalous images without a "
            "mask or with an empty one."
        )
    if lost := int(row.get("masks_lost", 0)):
        advice = (
            "see the metrics at original size"
            if "aupro_original" in row
            else "measure with --config.evaluation.original_resolution=True"
        )
        notes.append(
            f"{lost} of {int(row['test_anomalous']) - left_out} masks have no pixel "
            "left at model resolution, whose pixel metrics do not see these defects: "
            f"{advice}, or set a larger config.image_size."
        )
    return notes


def _decision_lines(
    name: str,
    row: Mapping[str, float],
    *,
    thresholds: Mapping[str, float],
    basis: Mapping[str, Any],
    fusion: Any = None,
) -> list[str]:
    """Returns the thresholds, their expected rates, and their rates on the test set."""
    del fusion  # the report shows it
    count = len(basis["validation_scores"])
    promised = {"image": "given by hand", "pixel": "given by hand"}
    if (asked := basis["image_fpr"]) is not None:
        expected = basis["image_fpr_expected"]
        too_few = f", too few for {100 * asked:.3g} %"
        promised["image"] = (
            f"false positives {100 * expected:.3g} % on average, below "
            f"{100 * basis['image_fpr_upper']:.3g} % with 95 % confidence, from "
            f"{count} normals{too_few if expected > asked else ''}"
        )
    if (asked := basis["pixel_fpr"]) is not None:
        error = basis["pixel_fpr_error"]
        spread = "" if error is None else f" +- {100 * error:.2g}"
        promised["pixel"] = f"false positives {100 * asked:.3g}{spread} %"
    lines = []
    for kind, text in promised.items():
        line = f"{name}, {kind} threshold {thresholds[kind]:.4g} ({text})"
        if f"{kind}_tpr" in row:
            tpr, fpr = (_percent(row[f"{kind}_{rate}"]) for rate in ("tpr", "fpr"))
            line += f": on the test set true positives {tpr}, false positives {fpr}"
        lines.append(line)
    return lines


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
