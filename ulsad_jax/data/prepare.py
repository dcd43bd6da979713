"""Records as TFDS data sets, stored as ArrayRecord; TensorFlow is not needed.

`import ulsad_jax.data` registers one TFDS data set for each layout. A configuration is
a category, published or not, and `root` is where the source files lie:

    tfds.data_source(
        "mvtec_loco/screw_bag",
        split="test",
        data_dir="data/tfds",
        builder_kwargs={"root": "data/mvtec_loco_anomaly_detection"},
    )

Example i of a split is record i of that split. What is built lies in a folder of its
own for each root and white level, under `data_dir`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ulsad_jax.data import pixels
from ulsad_jax.data.layouts import (
    btad,
    find_categories,
    find_records,
    magnetic_tile,
    mvtec_ad,
    mvtec_loco,
    visa,
)
from ulsad_jax.data.records import (
    NORMAL,
    SPLITS,
    Record,
    fingerprint,
    open_image,
    read_file,
    read_mask,
)
from ulsad_jax.data.survey import Survey
from ulsad_jax.runtime import files
from ulsad_jax.runtime.errors import UserError, storage_errors
from ulsad_jax.runtime.progress import progress

if TYPE_CHECKING:
    from jaxtyping import Shaped

LABELS = ("normal", "anomalous")
FINGERPRINT_FILE, SURVEY_FILE = "fingerprint.txt", "survey.json"
EMPTY_MASK = "have a mask without any defective pixel and are left out of pixel metrics"
FULL_MASK = "have a mask that covers the whole image: is its background white?"
INCOMPLETE = "incomplete."  # how TFDS begins the names of folders being written
# TFDS holds a shard's encoded images in memory while it writes the shard.
SHARD = 64


class RecordsBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Builds one category from its records.

    Not a `GeneratorBasedBuilder`: that one sorts through temporary files above 1 GB,
    and for these it needs TensorFlow.

    Attributes:
        root: where the source files lie.
        category: the category, also the name of the configuration.
        records: the category's records, in the order of their splits.
        white_level: the value that means white in files of more than 8 bits a channel.
        fingerprint: changes whenever a source file or the white level does.
    """

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
        """Finds the records; reads no image.

        Args:
            root: the folder that the data set was unpacked to; for "table", a CSV
                file.
            white_level: the value that means white in files of more than 8 bits a
                channel; 0 where that is not given.
            config: the category; may be left out if `root` holds only one.
            data_dir: where to keep what is built, by default TFDS's own folder.
            file_format: what TFDS passes.
            version: what TFDS passes.

        Raises:
            UserError: no root, no such category, or source files that do not fit.
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
        self.records = find_records(self.name, self.root, self.category)
        self.white_level = white_level
        level = f" white {float(white_level)}" if white_level else ""
        self.fingerprint = fingerprint(self.records) + level
        place = os.fsencode(self.root) + level.encode()
        digest = hashlib.sha256(place).hexdigest()[:8]
        folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        super().__init__(
            data_dir=folder / files.fit_name(self.root.name, f"-{digest}"),
            config=config,
            file_format=file_format,
            version=version,
        )
        # What a copy in another process is made from.
        self._original_state = {
            "root": self.root,
            "white_level": white_level,
            "config": self.category,
            "data_dir": data_dir,
            "version": version,
        }

    def is_prepared(self) -> bool:
        """Whether the present source files were built, whole."""
        try:
            built_from = Path(self.data_dir, FINGERPRINT_FILE).read_text()
        except FileNotFoundError:
            return False
        return built_from == self.fingerprint

    def download_and_prepare(self, **kwargs: Any) -> None:
        """Builds the category unless it is there, from the present source files.

        Downloads nothing. What was built from other source files is deleted. A
        process waits for another one that builds the same.

        Args:
            **kwargs: as TFDS. There is no need for a `download_mode`: what is there
                is what would be built.

        Raises:
            UserError: a source file cannot be read; nothing is kept then.
        """
        if not self.is_prepared():
            folder = Path(self.data_dir).parent
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / ".lock"):
                if not self.is_prepared():
                    self._discard()
                    with storage_errors(folder):
                        super().download_and_prepare(**kwargs)
        self.info.read_from_directory(self.data_dir)

    def read_survey(self) -> Survey:
        """Returns what was noticed of the files when the category was built."""
        return Survey.from_json(Path(self.data_dir, SURVEY_FILE).read_text())

    def as_data_source(self, *args: Any, **kwargs: Any) -> Any:
        """As TFDS.

        Raises:
            UserError: the category was not built from the present source files.
        """
        if not self.is_prepared():
            raise UserError(
                f"Expected {self._label} to be built from the source files in "
                f"{self.root}, found nothing or older data in {self.data_dir}. Call "
                "download_and_prepare() first (download=True)."
            )
        return super().as_data_source(*args, **kwargs)

    @property
    def _label(self) -> str:
        return f"{self.name}/{self.category}"

    def _only_category(self) -> str:
        found = find_categories(self.name, self.root)
        if len(found) > 1:
            raise UserError(
                f"Expected the name of a category, found only {self.name!r}. Use one "
                f"of {', '.join(f'{self.name}/{c}' for c in found)}."
            )
        return found[0]

    def _create_builder_config(
        self, builder_config: Any, version: Any
    ) -> tfds.core.BuilderConfig:
        """Any category will do: TFDS would refuse or warn about unpublished ones."""
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
        # TFDS still writes to a temporary folder; its renaming makes all this valid.
        Path(self.data_dir, SURVEY_FILE).write_text(self._survey.to_json())
        Path(self.data_dir, FINGERPRINT_FILE).write_text(self.fingerprint)

    def _discard(self) -> None:
        """Deletes what was built from other files, or was never finished."""
        data = Path(self.data_dir)
        if data.exists():
            _say(f"{self._label}: its source files changed, so it is built again")
            # In one step, so that a deletion that is interrupted leaves nothing valid.
            data.rename(data.with_name(f"{INCOMPLETE}{os.getpid()}"))
        for folder in data.parent.glob(f"{INCOMPLETE}*"):
            shutil.rmtree(folder)

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded, so TFDS need not say so."""

    def _log_download_done(self) -> None:
        """The progress bar said it."""


def _configs(categories: Sequence[str]) -> list[tfds.core.BuilderConfig]:
    return [tfds.core.BuilderConfig(name=category) for category in categories]


class MvtecAd(RecordsBuilder):
    """MVTec AD."""

    BUILDER_CONFIGS = _configs(mvtec_ad.CATEGORIES)


class MvtecLoco(RecordsBuilder):
    """MVTec LOCO AD."""

    BUILDER_CONFIGS = _configs(mvtec_loco.CATEGORIES)


class Btad(RecordsBuilder):
    """BTAD."""

    BUILDER_CONFIGS = _configs(btad.CATEGORIES)


class Mpdd(RecordsBuilder):
    """MPDD."""

    BUILDER_CONFIGS = _configs(mvtec_ad.MPDD_CATEGORIES)


class Visa(RecordsBuilder):
    """VisA."""

    BUILDER_CONFIGS = _configs(visa.CATEGORIES)


class MagneticTile(RecordsBuilder):
    """Magnetic tile defects."""

    BUILDER_CONFIGS = _configs(magnetic_tile.CATEGORIES)


class Folder(RecordsBuilder):
    """A user's own images in a folder."""


class Table(RecordsBuilder):
    """A user's own images, listed in a CSV file."""


class Synthetic(RecordsBuilder):
    """Categories written by `ulsad_jax.data.synthetic.categories`."""


BUILDERS: dict[str, type[RecordsBuilder]] = {
    cls.name: cls
    for cls in (
        MvtecAd,
        MvtecLoco,
        Btad,
        Mpdd,
        Visa,
        MagneticTile,
        Folder,
        Table,
        Synthetic,
    )
}


def find_builder(name: str) -> type[RecordsBuilder]:
    """The builder of data set `name`.

    Raises:
        UserError: there is no such data set.
    """
    if name not in BUILDERS:
        raise UserError(
            f"Expected a data set among {', '.join(BUILDERS)}, found {name!r}. Correct "
            "the name, or use 'folder' or 'table' for your own images."
        )
    return BUILDERS[name]


def to_example(
    record: Record, survey: Survey, white_level: float = 0.0
) -> dict[str, Any]:
    """Reads a record's files, each once, and encodes them.

    Args:
        record: the image and its masks on disk.
        survey: gets the digest of the files, and what is peculiar about them.
        white_level: see `pixels.to_rgb`.

    Returns:
        The features of `RecordsBuilder`, images as encoded bytes. `has_mask` tells
        whether it is known which pixels are defective; of a normal image none is. An
        anomalous image has defects, so that an empty mask does not tell.

    Raises:
        UserError: a file cannot be read, or a mask does not fit.
    """
    data = read_file(record.image)
    where = str(record.image)
    with open_image(record.image, data) as opened:
        values = pixels.decode(opened, exact=bool(white_level), where=where)
        is_plain = _is_plain(opened, data)
    image = pixels.to_rgb(values, white_level, where=where)
    if values.dtype != np.uint8:
        survey.notice_depth(record.image, float(values.max()), white_level)
    masks, contents = _read_masks(record, image.shape[:2], survey)
    survey.add(f"{record.split}/{record.name}", [data, *contents])
    return {
        "image": data if is_plain else _encode(image),
        "label": record.label,
        "type": record.type,
        "name": record.name,
        "group": record.group,
        "has_mask": record.label == NORMAL or bool(masks),
        "masks": masks,
    }


def _read_masks(
    record: Record, size: tuple[int, int], survey: Survey
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Reads a record's masks, and notices those that cannot be right.

    Returns:
        The features of each mask, none if no pixel of any is defective, and what
        their files contain.
    """
    masks, contents = [], []
    defective = np.zeros(size, bool)
    for mask in record.masks:
        contents.append(read_file(mask.path))
        values, saturation = read_mask(mask, contents[-1], size=size)
        defective |= values
        masks.append(
            {
                "mask": _encode(values * np.uint8(255)),
                "defect_name": saturation.defect_name,
                "saturation_threshold": saturation.threshold,
                "relative_saturation": saturation.relative,
            }
        )
    if defective.all():
        survey.notice(FULL_MASK, record.image)
    if masks and not defective.any():
        survey.notice(EMPTY_MASK, record.image)
        masks = []
    return masks, contents


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Tells whether any decoder makes upright 8-bit RGB of an image's bytes."""
    if pixels.orientation(image) != 1:
        return False
    if image.format == "PNG":
        # Depth and colour type in the header: PIL opens 16-bit RGB as 8-bit.
        return data[24:26] == bytes((8, 2))
    return image.format == "JPEG" and image.mode == "RGB"


def _encode(pixels: Shaped[np.ndarray, "h w *c"]) -> bytes:
    buffer = io.BytesIO()
    # A little larger than by default and several times faster.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes, which dies with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
