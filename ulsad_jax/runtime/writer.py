"""Writes the messages and metrics of a run: console, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ulsad_jax.runtime import files, hosts


def open_writer(folder: Path, category: str) -> Writer | Silence:
    """Returns a category's writer, or `Silence` in all processes but the first."""
    return Writer(folder, category) if hosts.is_first() else Silence()


class Silence:
    """A substitute for `Writer` that writes nothing."""

    def __enter__(self) -> Silence:
        """Returns itself."""
        return self

    def _ignore(self, *args: object) -> None:
        pass

    __exit__ = say = epoch = rewind = scalars = pictures = _ignore


class Writer:
    """A writer of the metrics of one category."""

    def __init__(self, folder: Path, category: str):
        """Opens the category's files.

        Args:
            folder: folder of the category, inside the work directory.
            category: name of the category, printed in every console line.
        """
        self._category = category
        self._path = folder / "metrics.jsonl"
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Writer:
        """Returns the writer."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Writes everything to disk and closes the files."""
        try:
            self._tensorboard.close()
        except OSError:  # it would try again when the program ends
            self._tensorboard.file_writer.event_writer.close = lambda: None
            raise

    def say(self, text: str) -> None:
        """Prints a line about the category."""
        tqdm.write(f"[{self._category}] {text}")

    def epoch(
        self,
        epoch: int,
        num_epochs: int,
        step: int,
        record: Mapping[str, float],
        seconds: float,
    ) -> None:
        """Reports an epoch: a console line, a JSON line, and scalars.

        Args:
            epoch: number of the epoch, from 1.
            num_epochs: number of epochs of the whole run.
            step: number of updates so far.
            record: metrics by name, such as "loss/total".
            seconds: duration of the epoch.
        """
        terms = ", ".join(
            f"{name.removeprefix('loss/')} {value:.4f}"
            for name, value in record.items()
            if name.startswith("loss/") and name != "loss/total"
        )
        parts = [f"epoch {epoch}/{num_epochs}:"]
        if "loss/total" in record:
            parts.append(f"loss {record['loss/total']:.4f}{terms and f' ({terms})'},")
        if "validation/total" in record:
            parts.append(f"validation {record['validation/total']:.4f},")
        if "test/image_auroc" in record:
            parts.append(f"test image AUROC {record['test/image_auroc']:.4f},")
        line = " ".join(parts)
        self.say(f"{line} {seconds:.1f} s")
        entry = {"epoch": epoch, "step": step, **record, "seconds": seconds}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in record.items():
            self._tensorboard.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Removes the JSON lines after `step`, because training repeats those steps."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # a line cut off by a kill
                break
        files.replace(self._path, "".join(kept))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds TensorBoard scalars."""
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Sequence[tuple[str, np.ndarray]]) -> None:
        """Adds TensorBoard pictures: (name, [h, w, 3] uint8)."""
        for name, picture in pictures:
            self._tensorboard.add_image(name, picture, step, dataformats="HWC")
