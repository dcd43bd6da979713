"""Writes the sections of the report as HTML; every external name is escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from ulsad_jax.data.records import GOOD
from ulsad_jax.metrics.base import SCORE_AUROC
from ulsad_jax.metrics.curves import Curve, find_tie_ends, make_curve, thin
from ulsad_jax.metrics.values import mean_row
from ulsad_jax.report import tables
from ulsad_jax.report.content import CategoryFiles, RunFiles, Shown
from ulsad_jax.report.plots import Axis, Line, draw_histograms, draw_lines, fit_axis
from ulsad_jax.runtime.nested import flatten
from ulsad_jax.scoring.fusion import Fusion

DASH = "–"
PRO_LIMIT = 0.3  # end of the x axis of PRO and sPRO; limit of AUPRO
QUALITY = 80  # WebP quality of the pictures
VALIDATION = "validation normals"


def describe_protocol(run: RunFiles) -> str:
    """Returns the settings behind the results, and warnings about them."""
    trunk, size = run.about["trunk"], run.about["image_size"]
    own = trunk and run.config["trunk"].get("image_size")  # absent in earlier runs
    facts = {
        "data": run.config["dataset"]["name"],
        "method": run.about["method"],
        "trunk": f"{trunk['architecture']}, {trunk['source']}" if trunk else "none",
        "image size": f"{size[0]} × {size[1]}",
        **({"image size of the trunk": f"{own[0]} × {own[1]}"} if own else {}),
        "checkpoint": run.about["selection"],
        "calibration": run.about["calibration"],
        "seed": run.config["seed"],
    }
    chips = "".join(
        f"<li><span>{escape(name)}</span> {escape(str(value))}</li>"
        for name, value in facts.items()
    )
    marks = ""
    if run.about["selected_on_test"]:
        marks += (
            '<p class="warning"><strong>Selected on the test set.</strong> The '
            "checkpoint is the best of these very test images (the reference's "
            "protocol): do not compare with honest results.</p>"
        )
    if trunk and trunk["source"].startswith("random"):
        marks += (
            '<p class="note">The trunk has random weights, whose features detect '
            "little: expect poor numbers.</p>"
        )
    return f'{marks}<ul class="chips">{chips}</ul>'


def tabulate_results(run: RunFiles) -> str:
    """Returns tables of the headline metrics of all categories, and of each type."""
    rows = {category.name: category.metrics for category in run.categories}
    titles = tables.columns(run.about)
    shown = [_tabulate_metrics("Results", rows, titles)]
    for metric, title in titles.items():
        if kinds := tables.split_types(metric, rows):
            columns = {kind: kind.partition("/")[2] for kind in kinds}
            title = title[0].upper() + title[1:]
            shown.append(_tabulate_metrics(f"{title} by type", rows, columns))
    if not any(row.get("test_images") for row in rows.values()):
        shown = ['<p class="note">There are no test images: nothing is measured.</p>']
    notes = "".join(
        f'<p class="note">{escape(f"{name}, {note}")}</p>'
        for name, row in rows.items()
        for note in tables.pixel_notes(row)
    )
    return "".join(shown) + notes + _tabulate_decisions(run.categories)


def draw_category(category: CategoryFiles) -> str:
    """Returns the figures of a category for which its files have data."""
    return f'<div class="figures">{"".join(_figures(category))}</div>'


def show_gallery(category: CategoryFiles, limit: int) -> str:
    """Returns the pictures of a category, the worst misses and false alarms first.

    Args:
        category: content of the category's folder.
        limit: largest number of pictures.
    """
    rows = category.by_badness()
    if not rows:
        return ""
    fusion = category.fusion and Fusion(**category.fusion)
    cards = "".join(_show_card(row, fusion) for row in rows[:limit])
    wrong = sum(row.is_wrong for row in category.scores)
    return (
        f"<h3>Images</h3><p>Image, ground truth (green; a grey panel where it is not "
        f"known), heatmap at the scale of the run with the predicted mask (green); "
        f"the worst misses and false alarms first. {len(rows[:limit])} of "
        f"{len(category.scores)} test images, of which "
        f'{wrong} are decided wrongly.</p><div class="gallery">{cards}</div>'
    )


def tabulate_scores(category: CategoryFiles) -> str:
    """Returns a table of every score's AUROC by type; empty if there is only one."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in category.metrics.items():
        if key.startswith(f"{SCORE_AUROC}/"):
            _, name, *kind = key.split("/", 2)
            rows.setdefault(name, {})[kind[0] if kind else "all"] = value
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    cells = [
        (name, *(_percent(row.get(kind, math.nan)) for kind in kinds))
        for name, row in rows.items()
    ]
    if not cells:
        return ""
    colours = "".join(
        f'<li class="c{i % 8}"><i></i>{escape(name)}</li>'
        for i, name in enumerate(category.fusion["weight"] if category.fusion else ())
    )
    table = _table("", ("score", *kinds), cells)
    legend = f'<ul class="legend">{colours}</ul>' if colours else ""
    return f"<h3>Image AUROC by score, %</h3>{table}{legend}"


def tabulate_stages(categories: Sequence[CategoryFiles]) -> str:
    """Returns a table of the time and memory of each stage in its last run."""
    rows = [
        (
            category.name,
            stage,
            _duration(record["seconds"]),
            _mebibytes(record["peak_bytes"]),
            _mebibytes(record["device_peak_bytes"]),
            record["device"],
        )
        for category in categories
        for stage, record in category.stages.items()
    ]
    if not rows:
        return ""
    head = ("category", "stage", "time", "peak memory", "of the device", "device")
    return _table("Time and memory", head, rows) + (
        '<p class="small">Of the last time that each stage ran; a resumed training '
        "counts what was left. Peak memory is the most that the process has had "
        "until the stage's end.</p>"
    )


def tabulate_all_metrics(run: RunFiles) -> str:
    """Returns a table of every metric in results.json, by category."""
    names = dict.fromkeys(k for c in run.categories for k in c.metrics)
    rows = [
        (name, *(_number(c.metrics.get(name, math.nan)) for c in run.categories))
        for name in names
    ]
    head = ("metric", *(c.name for c in run.categories))
    return _fold("All metrics", _table("", head, rows))


def tabulate_config(run: RunFiles) -> str:
    """Returns tables of the configuration, the versions and the trunk."""
    fields = [(name, str(value)) for name, value in flatten(run.config)]
    trunk = [(f"trunk {k}", str(v)) for k, v in (run.about["trunk"] or {}).items()]
    versions = list(run.about["versions"].items())
    return _fold("Configuration", _table("", ("field", "value"), fields)) + _fold(
        "Versions and trunk", _table("", ("what", "which"), [*versions, *trunk])
    )


def _figures(category: CategoryFiles) -> Iterable[str]:
    yield from _draw_histograms(category)
    yield from _draw_roc(category)
    yield from _draw_overlaps(category)
    yield from _draw_losses(category.epochs)


def _draw_histograms(category: CategoryFiles) -> Iterable[str]:
    rows = {VALIDATION: category.basis["validation_scores"]}
    for kind in category.types:
        rows[kind] = [row.result.score for row in category.scores if row.type == kind]
    yield draw_histograms(
        "Scores",
        rows,
        normal=(VALIDATION, GOOD),
        threshold=category.thresholds["image"],
        label="image score",
    )


def _draw_roc(category: CategoryFiles) -> Iterable[str]:
    """Yields the ROC curves of images, overall and by type, and that of pixels."""
    rate = Axis("false positive rate", 0, 1)
    found = Axis("true positive rate", 0, 1)
    kinds = [kind for kind in category.types if kind != GOOD]
    lines = []
    for kind in ["", *kinds] if len(kinds) > 1 else kinds:
        chosen = [row for row in category.scores if kind in ("", row.type)]
        chosen += [row for row in category.scores if kind and row.type == GOOD]
        if curve := _roc(chosen):
            key = f"image_auroc/{kind}" if kind else "image_auroc"
            lines.append(_line(kind or "all", curve, category.metrics.get(key)))
    if lines:
        yield draw_lines("ROC of images", lines, x=rate, y=found)
    if stored := category.curves.get("roc"):
        line = _line("AUROC", Curve(**stored), *_at_best(category, "pixel_auroc"))
        yield draw_lines("ROC of pixels", [line], x=rate, y=found)


def _draw_overlaps(category: CategoryFiles) -> Iterable[str]:
    rate = Axis("false positive rate of pixels", 0, PRO_LIMIT)
    if stored := category.curves.get("pro"):
        line = _line("AUPRO", Curve(**stored), *_at_best(category, "aupro"))
        overlap = Axis("per-region overlap", 0, 1)
        yield draw_lines("PRO", [line], x=rate, y=overlap)
    lines = [
        _line(
            f"{kind}, AU-sPRO 0.05",
            Curve(**stored),
            category.metrics.get(f"au_spro_0.05/{kind}"),
        )
        for key, stored in category.curves.items()
        if (kind := key.removeprefix("spro/")) != key
    ]
    if lines:
        overlap = Axis("saturated overlap", 0, 1)
        yield draw_lines("sPRO", lines, x=rate, y=overlap)


def _draw_losses(epochs: Sequence[Mapping[str, float]]) -> Iterable[str]:
    lines = []
    for prefix, suffix in (("loss/", ""), ("validation/", ", validation")):
        names = dict.fromkeys(k for e in epochs for k in e if k.startswith(prefix))
        for name in names:
            if suffix and name != "validation/total":
                continue
            there = [(e["epoch"], e[name]) for e in epochs if name in e]
            title = f"{name.removeprefix(prefix)}{suffix}"
            lines.append(Line(title, *zip(*there, strict=True), dots=bool(suffix)))
    if lines:
        last = max(x for line in lines for x in line.x)
        first = min(x for line in lines for x in line.x)
        yield draw_lines(
            "Losses",
            lines,
            x=Axis("epoch", first, last if last > first else first + 1),
            y=fit_axis("loss", [v for line in lines for v in line.y]),
        )


def _roc(rows: Sequence[Shown]) -> Curve | None:
    """Returns the ROC curve; None unless there are both normal and anomalous images."""
    order = sorted(rows, key=lambda row: -row.result.score)
    defective = np.array([row.is_defective for row in order], bool)
    if not defective.any() or defective.all():
        return None
    ends = find_tie_ends(np.array([row.result.score for row in order]))
    counts = [np.cumsum(of)[ends] for of in (~defective, defective)]
    return thin(make_curve(*(np.diff(c, prepend=0) for c in counts)))


def _line(name: str, curve: Curve, value: float | None, where: str = "") -> Line:
    shown = "" if value is None else f" {_percent(value)}"
    return Line(f"{name}{shown}{where}", curve.fpr, curve.overlap)


def _at_best(category: CategoryFiles, name: str) -> tuple[float | None, str]:
    """Returns a pixel metric at the resolution of the curves, and a label for it."""
    if (original := category.metrics.get(f"{name}_original")) is not None:
        return original, ", original resolution"
    return category.metrics.get(name), ""


def _show_card(row: Shown, fusion: Fusion | None) -> str:
    verdict = {
        (True, False): "missed",
        (False, True): "false alarm",
        (True, True): "found",
        (False, False): "passed",
    }[row.is_defective, row.result.is_anomalous]
    style = "wrong" if row.is_wrong else "right"
    name = escape(row.name)
    terms = fusion.terms(row.result.scores) if fusion else row.result.scores
    parts = ", ".join(f"{escape(k)} {v:.3g}" for k, v in terms.items())
    parts = f" ({parts})" if len(row.result.scores) > 1 else ""
    bar = _show_terms(terms) if fusion else ""
    with Image.open(row.picture) as picture:
        data = io.BytesIO()
        picture.convert("RGB").save(data, "WEBP", quality=QUALITY)
        width, height = picture.size
    source = base64.b64encode(data.getvalue()).decode()
    return (
        f'<figure class="card"><img src="data:image/webp;base64,{source}" '
        f'alt="{name}: image, ground truth, heatmap" width="{width}" '
        f'height="{height}"><figcaption>'
        f'<b class="{style}">{verdict}</b> <span class="file">{name}</span> '
        f'<span class="scores">score {row.result.score:.4g}{parts}</span>{bar}'
        "</figcaption></figure>"
    )


def _show_terms(terms: Mapping[str, float]) -> str:
    """Returns a bar whose parts are the shares of the positive terms of a score."""
    total = sum(max(v, 0.0) for v in terms.values()) or 1.0
    parts = (
        f'<i class="c{i % 8}" style="width:{100 * max(v, 0.0) / total:.1f}%" '
        f'title="{escape(name)} {v:.3g}"></i>'
        for i, (name, v) in enumerate(terms.items())
    )
    return f'<span class="terms">{"".join(parts)}</span>'


def _tabulate_metrics(
    title: str, rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str]
) -> str:
    columns = {k: v for k, v in columns.items() if any(k in r for r in rows.values())}
    shown = dict(rows)
    if len(rows) > 1:
        shown["mean"] = mean_row(rows)
    cells = [
        (name, *(_percent(row.get(key, math.nan)) for key in columns))
        for name, row in shown.items()
    ]
    return _table(f"{title}, %", ("category", *columns.values()), cells)


def _tabulate_decisions(categories: Sequence[CategoryFiles]) -> str:
    head = ("category", "image threshold", "promised FPR", "TPR", "FPR")
    head += ("pixel threshold", "promised FPR", "TPR", "FPR")
    rows = []
    for category in categories:
        cells = [category.name]
        for kind, promised in (
            ("image", category.basis["image_fpr_expected"]),
            ("pixel", category.basis["pixel_fpr"]),
        ):
            cells.append(f"{category.thresholds[kind]:.4g}")
            cells.append("by hand" if promised is None else _percent(promised))
            for rate in ("tpr", "fpr"):
                cells.append(_percent(category.metrics.get(f"{kind}_{rate}", math.nan)))
        rows.append(cells)
    return _table("Decisions, rates on the test set in %", head, rows)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(row("td", cells) for cells in rows)
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return (
        f'{heading}<div class="scroll"><table><thead>{row("th", head)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _percent(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.2f}"


def _number(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.6g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _mebibytes(size: int | None) -> str:
    return DASH if size is None else f"{size / 2**20:,.0f} MiB".replace(",", " ")
