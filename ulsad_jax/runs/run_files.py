"""Reads the files of a run, without its data and weights, and writes its report."""

from __future__ import annotations

import contextlib
import csv
import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ulsad_jax.metrics.values import with_nan
from ulsad_jax.report import page
from ulsad_jax.report.content import CategoryFiles, RunFiles, Shown
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runtime import files
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring.result import read_row


def write_report(workdir: Path) -> None:
    """Writes a run's report from the files in its folder.

    Raises:
        UserError: a file is missing or damaged, see `read`.
    """
    files.replace(workdir / files_of.REPORT, page.compose(read(workdir)))


def read(workdir: Path) -> RunFiles:
    """Reads the files of an evaluated run.

    Raises:
        UserError: a required file is missing or damaged.
    """
    command = f"`python eval.py --workdir={shlex.quote(str(workdir))}`"
    with _needed(workdir / files_of.RESULTS, command) as path:
        document = json.loads(path.read_text())
        metrics, decisions = document.pop("categories"), document["decisions"]
        document.pop("mean")
    with _needed(workdir / files_of.CONFIG, "the train.py command of this run") as path:
        config = json.loads(path.read_text())
    categories = [
        _read_category(
            files_of.category_folder(workdir, name), name, row, decisions[name], command
        )
        for name, row in metrics.items()
    ]
    return RunFiles(workdir.resolve().name, document, config, categories)


@contextlib.contextmanager
def _needed(path: Path, command: str) -> Iterator[Path]:
    """Raises a `UserError` that names the command to run if reading a file fails."""
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = "nothing there" if isinstance(error, FileNotFoundError) else repr(error)
        raise UserError(
            f"Expected {path}, which the report is made of, found {found}. Run "
            f"{command}, which writes it again."
        ) from error


def _read_category(
    folder: Path,
    name: str,
    metrics: dict[str, float | None],
    decisions: dict[str, dict[str, Any]],
    command: str,
) -> CategoryFiles:
    with _needed(folder / files_of.SCORES, command) as path:
        scores = list(_read_scores(path))
    with _needed(folder / files_of.CURVES, command) as path:
        curves = _read_json(path)
    return CategoryFiles(
        name=name,
        metrics=with_nan(metrics),
        **decisions,
        scores=scores,
        epochs=list(_read_epochs(folder / files_of.EPOCHS)),
        curves=curves,
        stages=_read_json(folder / files_of.STAGES),
    )


def _read_scores(path: Path) -> Iterable[Shown]:
    pictures = path.parent / files_of.PICTURES
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "score" not in (rows.fieldnames or ()):  # checked even if there are no rows
            raise ValueError("no table of scores")
        for row in rows:
            stem = row["name"].removeprefix(f"{row['type']}/")
            picture = files.safe_name(stem, ".png")
            yield Shown(
                name=row["name"],
                type=row["type"],
                is_defective=row["label"] == "1",
                result=read_row(row),
                picture=pictures / files.safe_name(row["type"]) / picture,
            )


def _read_epochs(path: Path) -> Iterable[dict[str, float]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:  # the process was killed while writing the line
            return


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
