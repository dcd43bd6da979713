"""What a report is made of: files of a run, read without its data or its weights."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ulsad_jax.data.records import GOOD
from ulsad_jax.runs import results


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
    """Reads an evaluated run's files."""
    document = json.loads((workdir / "results.json").read_text())
    categories = [
        _read_category(
            workdir / results.folder_name(name),
            name,
            metrics,
            document["decisions"][name],
        )
        for name, metrics in document.pop("categories").items()
    ]
    document.pop("mean")
    config = json.loads((workdir / "config.json").read_text())
    return RunFiles(workdir.resolve().name, document, config, categories)


def _read_category(
    folder: Path,
    name: str,
    metrics: dict[str, float | None],
    decisions: dict[str, dict[str, Any]],
) -> CategoryFiles:
    return CategoryFiles(
        name=name,
        metrics=results.with_nan(metrics),
        **decisions,
        scores=list(_read_scores(folder)),
        epochs=list(_read_epochs(folder / "metrics.jsonl")),
        curves=_read_json(folder / "curves.json"),
        stages=_read_json(folder / "stages.json"),
    )


def _read_scores(folder: Path) -> Iterable[Scored]:
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            picture = f"{results.file_name(Path(row['image']).stem)}.png"
            yield Scored(
                name=row["name"],
                type=row["type"],
                is_defective=row["label"] == "1",
                score=float(row["score"]),
                is_anomalous=row["is_anomalous"] == "True",
                local=float(row["local_score"]),
                global_=float(row["global_score"]),
                picture=folder / "pictures" / results.file_name(row["type"]) / picture,
            )


def _read_epochs(path: Path) -> Iterable[dict[str, float]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:  # the line that a kill cut off
            return


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
