"""TFDS data sets of records, stored as ArrayRecord; TensorFlow is not needed.

`import ulsad_jax.data` registers one TFDS data set for each layout. A configuration is
a category, published or not, and `root` is the folder of the source files:

    tfds.data_source(
        "mvtec_loco/screw_bag",
        split="test",
        data_dir="data/tfds",
        builder_kwargs={"root": "data/mvtec_loco_anomaly_detection"},
    )

Example i of a split is record i of that split. Built data are kept under `data_dir`, in
a separate folder for each root and white level.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import Error

from ulsad_jax.data import layouts
from ulsad_jax.data.examples import to_example
from ulsad_jax.data.layouts import find_categories, find_records
from ulsad_jax.data.records import SPLITS, Record, fingerprint
from ulsad_jax.data.survey import Survey
from ulsad_jax.runtime import files
from ulsad_jax.runtime.errors import UserError, sentence, storage_errors
from ulsad_jax.runtime.progress import progress

LABELS = ("normal", "anomalous")
FINGERPRINT_FILE, SURVEY_FILE = "fingerprint.txt", "survey.json"
INCOMPLETE = "incomplete."  # TFDS's prefix of folders being written
# TFDS holds a shard's encoded images in memory while it writes the shard.
SHARD = 64


@contextlib.contextmanager
def damage_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what readers make of damaged prepared data into one error.

    Args:
        folder: folder of the prepared data.

    Raises:
        UserError: the data cannot be read; the message names the folder to delete.
    """
    try:
        yield
    # Riegeli, TFDS and protobuf have no error in common.
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, Error) as error:
        found = sentence(" ".join(str(error).split())[:200])
        raise UserError(
            f"Expected the prepared images in {folder} as they were written, found: "
            f"{found} Delete that folder and run the same command again, which "
            "prepares them anew."
        ) from error


class RecordsBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """A TFDS builder of one category.

    It is not a `GeneratorBasedBuilder`, which sorts data above 1 GB in temporary files
    and needs TensorFlow for that.

    Attributes:
        root: folder of the source files; for "table", a CSV file.
        category: name of the category and of the configuration.
        records: records of the category, in the order of their splits.
        white_level: value that means white in files with more than 8 bits per channel;
            0 if it is not given.
        fingerprint: string that changes when a source file or the white level changes.
    """

    LAYOUT: ClassVar[str]  # a built-in layout, or "module:attribute"
    VERSION = tfds.core.Version("2.0.0")

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] | None = None,
        white_level: float = 0.0,
        config: str | tfds.core.BuilderConfig | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        file_format: str | tfds.core.FileFormat = tfds.core.FileFormat.ARRAY_RECORD,
        version: str | None = None,
    ):
        """Finds the records without reading any image.

        Args:
            root: folder to which the data set was unpacked; for "table", a CSV file.
            white_level: value that means white in files with more than 8 bits per
                channel; 0 if it is not given.
            config: name or configuration of the category; may be omitted if `root`
                holds only one.
            data_dir: folder in which the built data are kept; TFDS's own folder by
                default.
            file_format: file format, passed by TFDS.
            version: version of the data set, passed by TFDS.

        Raises:
            UserError: `root` is not given, the category does not exist, or source files
                do not fit.
        """
        if root is None:
            raise UserError(
                f"Expected the folder of the source files of {self.name!r}, found "
                'none. Pass builder_kwargs={"root": <folder>}.'
            )
        self.root = Path(root).expanduser().resolve()
        if config is None:
            config = self._only_category()
        self.category = config if isinstance(config, str) else config.name
        self.records = find_records(self.LAYOUT, self.root, self.category)
        self.white_level = white_level
        level = f" white {float(white_level)}" if white_level else ""
        self.fingerprint = fingerprint(self.records) + level
        place = os.fsencode(self.root) + level.encode()
        digest = hashlib.sha256(place).hexdigest()[:8]
        folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        folder = folder / files.fit_name(self.root.name, f"-{digest}")
        with damage_errors(folder):  # TFDS reads what an earlier run wrote
            super().__init__(
                data_dir=folder,
                config=config,
                file_format=file_format,
                version=version,
            )
        # Arguments that make a copy of the builder in another process.
        self._original_state = {
            "root": self.root,
            "white_level": white_level,
            "config": self.category,
            "data_dir": data_dir,
            "version": version,
        }

    def __reduce__(self) -> tuple[Callable, tuple[str, dict[str, Any]]]:
        """Returns a function and arguments that make this builder in another process.

        The builder's class is created at run time and cannot be imported from a module.
        """
        return _rebuild, (self.LAYOUT, self._original_state)

    def is_prepared(self) -> bool:
        """Returns whether the category is completely built from the current files."""
        try:
            built_from = Path(self.data_dir, FINGERPRINT_FILE).read_text()
        except FileNotFoundError:
            return False
        return built_from == self.fingerprint

    def download_and_prepare(self, **kwargs: Any) -> None:
        """Builds the category from the current source files, if it is not built.

        Downloads nothing. Data built from other source files are deleted. If another
        process builds the same category, this one waits for it.

        Args:
            **kwargs: arguments of the TFDS method. A `download_mode` is not needed:
                existing data always equal what would be built.

        Raises:
            UserError: a source file cannot be read. No data are kept then.
        """
        if not self.is_prepared():
            folder = Path(self.data_dir).parent
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / ".lock"):
                if not self.is_prepared():
                    self._discard()
                    with storage_errors(folder):
                        super().download_and_prepare(**kwargs)
        with damage_errors(self.data_dir):
            self.info.read_from_directory(self.data_dir)

    def read_survey(self) -> Survey:
        """Returns the survey of the files, taken when the category was built."""
        with damage_errors(self.data_dir):
            return Survey.from_json(Path(self.data_dir, SURVEY_FILE).read_text())

    def as_data_source(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the data source that the TFDS method returns.

        Raises:
            UserError: the category was not built from the current source files.
        """
        if not self.is_prepared():
            raise UserError(
                f"Expected {self._label} to be built from the source files in "
                f"{self.root}, found nothing or older data in {self.data_dir}. Call "
                "download_and_prepare() first (download=True)."
            )
        with damage_errors(self.data_dir):
            return super().as_data_source(*args, **kwargs)

    @property
    def _label(self) -> str:
        return f"{self.name}/{self.category}"

    def _only_category(self) -> str:
        found = find_categories(self.LAYOUT, self.root)
        if len(found) > 1:
            raise UserError(
                f"Expected the name of a category, found only {self.name!r}. Use one "
                f"of {', '.join(f'{self.name}/{c}' for c in found)}."
            )
        return found[0]

    def _create_builder_config(
        self, builder_config: Any, version: Any
    ) -> tfds.core.BuilderConfig:
        """Returns a configuration for any category.

        TFDS itself would refuse unpublished categories, or warn about them.
        """
        del builder_config, version
        return self.builder_configs.get(self.category) or tfds.core.BuilderConfig(
            name=self.category
        )

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        mask = {
            "mask": features.Image(shape=(None, None, 1)),
            "defect_name": features.Text(),
            # As bytes: TFDS stores plain floats in single precision, and 0.7 of an
            # area must stay 0.7 of it.
            "saturation_threshold": features.Tensor(
                shape=(), dtype=np.float64, encoding="bytes"
            ),
            "relative_saturation": features.Scalar(np.bool_),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of {self._label} and their ground truth.",
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, 3)),
                    "label": features.ClassLabel(names=LABELS),
                    "type": features.Text(),
                    "name": features.Text(),
                    "group": features.Text(),
                    "has_mask": features.Scalar(np.bool_),
                    "masks": features.Sequence(mask),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        del dl_manager
        shards = {}
        for split in SPLITS:
            records = [r for r in self.records if r.split == split]
            if records:
                shards[split] = [
                    functools.partial(self._examples, records[start : start + SHARD])
                    for start in range(0, len(records), SHARD)
                ]
        return shards

    def _examples(
        self, records: Sequence[Record]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, record in enumerate(records):
            yield key, to_example(record, self._survey, self.white_level)
            self._progress.update()

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        self._progress = progress(
            None, f"Building {self._label}", total=len(self.records), announce=True
        )
        self._survey = Survey()
        with self._progress:
            super()._download_and_prepare(*args, **kwargs)
        # TFDS renames this temporary folder at the end, which makes all files valid.
        Path(self.data_dir, SURVEY_FILE).write_text(self._survey.to_json())
        Path(self.data_dir, FINGERPRINT_FILE).write_text(self.fingerprint)

    def _discard(self) -> None:
        """Deletes data that were built from other files or never finished."""
        data = Path(self.data_dir)
        if data.exists():
            _say(f"{self._label}: its source files changed, so it is built again")
            # Renamed first, so that an interrupted deletion leaves no valid data.
            data.rename(data.with_name(f"{INCOMPLETE}{os.getpid()}"))
        for folder in data.parent.glob(f"{INCOMPLETE}*"):
            shutil.rmtree(folder)

    def _log_download_bytes(self) -> None:
        """Logs nothing, because nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Logs nothing, because the progress bar shows the end."""


@functools.cache
def find_builder(name: str) -> type[RecordsBuilder]:
    """Returns the TFDS builder of a layout.

    The builders of built-in layouts are registered with TFDS.

    Args:
        name: name of a built-in layout, or "module:attribute".

    Raises:
        UserError: there is no such layout.
    """
    layout = layouts.find(name)
    configs = [tfds.core.BuilderConfig(name=c) for c in layout.published]
    words = re.split(r"\W|_", name)
    return type(RecordsBuilder)(
        "".join(word.capitalize() for word in words),  # TFDS derives the name from it
        (RecordsBuilder,),
        {
            "__doc__": f"{layout.title}.",
            "__module__": __name__,
            "LAYOUT": name,
            "BUILDER_CONFIGS": configs,
        },
        skip_registration=name not in layouts.known_layouts(),
    )


def _rebuild(name: str, fields: dict[str, Any]) -> RecordsBuilder:
    """Makes a copy of a builder in another process."""
    return find_builder(name)(**fields)


for _name in layouts.known_layouts():
    find_builder(_name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes, which is released when the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
