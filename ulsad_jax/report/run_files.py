"""What a report is made of: files of a run, read without its data or its weights."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ulsad_jax.data.records import GOOD
from ulsad_jax.runs import results
from ulsad_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row of scores.csv.

    Attributes:
        name: "<type>/<stem>".
        type: `GOOD`, or the kind of anomaly.
        is_defective: whether the image is known to be anomalous.
        score: the maximum of its map.
        is_anomalous: what was decided.
        local: the structural score.
        global_: the logical score.
        picture: where its picture is, if there is one.
    """

    name: str
    type: str
    is_defective: bool
    score: float
    is_anomalous: bool
    local: float
    global_: float
    picture: Path

    @property
    def is_wrong(self) -> bool:
        """Whether the image is missed, or a false alarm."""
        return self.is_defective != self.is_anomalous


@dataclasses.dataclass(frozen=True)
class CategoryFiles:
    """What the folder of a category says; parts that are not there are empty.

    Attributes:
        name: of the category.
        metrics: by name; NaN where undefined.
        thresholds: see `decisions.Thresholds`.
        basis: what they rest on.
        scores: of the test images.
        epochs: the lines of metrics.jsonl.
        curves: see `evaluation.pixel_curves`.
        stages: see `stages.measure`.
    """

    name: str
    metrics: dict[str, float]
    thresholds: dict[str, float]
    basis: dict[str, Any]
    scores: list[Scored]
    epochs: list[dict[str, float]]
    curves: dict[str, dict[str, list[float]]]
    stages: dict[str, dict[str, Any]]

    @property
    def types(self) -> list[str]:
        """Of the test images, the normal one first."""
        found = {row.type for row in self.scores}
        return sorted(found, key=lambda name: (name != GOOD, name))

    def by_badness(self) -> list[Scored]:
        """The images that have a picture: those farthest on the wrong side first."""

        def badness(row: Scored) -> float:
            over = row.score - self.thresholds["image"]
            return -over if row.is_defective else over

        pictured = (row for row in self.scores if row.picture.is_file())
        return sorted(pictured, key=badness, reverse=True)


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run.

    Attributes:
        name: of its folder.
        about: results.json without the metrics.
        config: the resolved one.
        categories: in the order of results.json.
    """

    name: str
    about: dict[str, Any]
    config: dict[str, Any]
    categories: list[CategoryFiles]


def read(workdir: Path) -> RunFiles:
    """Reads an evaluated run's files.

    Raises:
        UserError: one that is needed is missing or damaged.
    """
    command = f"`python eval.py --workdir={shlex.quote(str(workdir))}`"
    with _needed(workdir / "results.json", command) as path:
        document = json.loads(path.read_text())
        metrics, decisions = document.pop("categories"), document["decisions"]
        document.pop("mean")
    with _needed(workdir / "config.json", "the train.py command of this run") as path:
        config = json.loads(path.read_text())
    categories = [
        _read_category(
            workdir / results.folder_name(name), name, row, decisions[name], command
        )
        for name, row in metrics.items()
    ]
    return RunFiles(workdir.resolve().name, document, config, categories)


@contextlib.contextmanager
def _needed(path: Path, command: str) -> Iterator[Path]:
    """Says what makes a file again, if reading it fails."""
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
    with _needed(folder / "scores.csv", command) as path:
        scores = list(_read_scores(path))
    with _needed(folder / "curves.json", command) as path:
        curves = _read_json(path)
    return CategoryFiles(
        name=name,
        metrics=results.with_nan(metrics),
        **decisions,
        scores=scores,
        epochs=list(_read_epochs(folder / "metrics.jsonl")),
        curves=curves,
        stages=_read_json(folder / "stages.json"),
    )


def _read_scores(path: Path) -> Iterable[Scored]:
    pictures = path.parent / "pictures"
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "score" not in (rows.fieldnames or ()):  # even where there are no rows
            raise ValueError("no table of scores")
        for row in rows:
            stem = row["name"].removeprefix(f"{row['type']}/")
            picture = results.file_name(stem, ".png")
            yield Scored(
                name=row["name"],
                type=row["type"],
                is_defective=row["label"] == "1",
                score=float(row["score"]),
                is_anomalous=row["is_anomalous"] == "True",
                local=float(row["local_score"]),
                global_=float(row["global_score"]),
                picture=pictures / results.file_name(row["type"]) / picture,
            )


def _read_epochs(path: Path) -> Iterable[dict[str, float]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:  # the line that a kill cut off
            return


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
