"""Small runs, and what they left in their work directories."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from configs import mvtec_ad
from ulsad_jax.runs import run as experiment

REPOSITORY = Path(__file__).parents[1]
EPOCHS = 4
FIELDS = {
    "method": "ulsad",
    "image_size": (64, 64),
    "trunk.architecture": "resnet18",
    "trunk.source": "random",
    "model.local_width": 8,
    "train.batch_size": 4,
    "model.output_activation": "relu",
    "optimizer.learning_rate": 2e-4,
    "train.num_epochs": EPOCHS,
    "train.num_updates": 0,
    "train.checkpoint_every": 2,
    "evaluation.batch_size": 4,
    "evaluation.pictures_per_type": 1,
}


class Run(NamedTuple):
    workdir: Path
    config: ConfigDict
    printed: str


def make_config(
    root: Path,
    fields: Mapping[str, Any] = {},
    *,
    category: str = "bottle",
    **more: Any,
) -> ConfigDict:
    """The smallest system on a root in MVTec AD's layout.

    Args:
        root: of the data; what is prepared lies beside it.
        fields: further values by field, "train.num_epochs" and the like.
        category: as on the command line.
        more: the same, for fields without a dot.
    """
    config = mvtec_ad.get_config(category)
    paths = {"dataset.root": str(root), "dataset.cache_dir": str(root.parent / "cache")}
    config.update_from_flattened_dict(FIELDS | paths | dict(fields) | more)
    return config


def features(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of one image's features [gh, gw, c]."""
    return jax.ShapeDtypeStruct((1, *shape), np.float32)


def train(config: ConfigDict, workdir: Path) -> str:
    return experiment.train(config.copy_and_resolve_references(), workdir)


def copy(run: Run, folder: Path) -> Run:
    return run._replace(workdir=shutil.copytree(run.workdir, folder / "copy"))


def read_steps(workdir: Path, category: str = "bottle") -> list[int]:
    """The steps of a run's checkpoints."""
    return list_steps(workdir / category / "checkpoints")


def list_steps(folder: Path) -> list[int]:
    """The steps of whole checkpoints in a folder, not of what a killed save left."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_checkpoint(workdir: Path, category: str = "bottle", step: int = -1) -> Any:
    """Everything in a checkpoint, by default the last one."""
    step = step if step >= 0 else read_steps(workdir, category)[-1]
    folder = (workdir / category / "checkpoints" / str(step)).absolute()
    arrays = {
        item: ocp.StandardCheckpointer().restore(folder / item)
        for item in ("model", "optimizer")
        if (folder / item).exists()
    }
    texts = {
        item: json.loads((folder / item / "metadata").read_text())
        for item in ("progress", "calibration", "decisions")
        if (folder / item).exists()
    }
    return jax.device_get(arrays) | texts


def read_metrics(workdir: Path, category: str = "bottle") -> list[dict[str, float]]:
    """metrics.jsonl without the seconds."""
    lines = (workdir / category / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "seconds"}
        for line in lines
    ]


def read_results(workdir: Path, *parts: str) -> dict[str, Any]:
    return json.loads(workdir.joinpath(*parts, "results.json").read_text())


def read_scores(workdir: Path, category: str = "bottle") -> list[dict[str, str]]:
    return read_table(workdir / category / "scores.csv")


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that has a header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_losses(found: Path, expected: Path, epochs: int | None = None) -> None:
    """The losses of the first epochs agree to rounding, and to what Adam makes of it.

    Adam takes full-sized steps in the direction of gradients that are rounding error
    alone. (Networks without such gradients agree within 1e-5: see eight_devices.py.)
    """
    found, expected = read_metrics(found), read_metrics(expected)[:epochs]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4 if b["step"] <= 3 else 1e-2)


def assert_near(found: Any, expected: np.ndarray, bound: float) -> None:
    """The norm of the difference is within a share of the expected array's."""
    found = np.asarray(found)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


def assert_same_arrays(found: Any, expected: Any) -> None:
    """Bit-equal leaves in trees of one structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_same_category(a: Path, b: Path, category: str = "bottle") -> None:
    """What two runs know of a category is equal, bit by bit."""
    assert read_steps(a, category) == read_steps(b, category)
    assert read_metrics(a, category) == read_metrics(b, category)
    for step in read_steps(a, category):
        assert_same_arrays(
            read_checkpoint(a, category, step), read_checkpoint(b, category, step)
        )
    assert read_scores(a, category) == read_scores(b, category)
    assert read_results(a, category) == read_results(b, category)
