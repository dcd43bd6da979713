"""A trained run as a function from images to results."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from ulsad_jax.data import pixels as pixels_lib
from ulsad_jax.data.records import read_image
from ulsad_jax.data.resize import resize_bilinear, resize_map
from ulsad_jax.runs import trained, training
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import prediction as inference
from ulsad_jax.scoring.thresholds import Decisions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What the system says of one image.

    Attributes:
        score: the maximum of the map at model resolution, as in scores.csv.
        normalized_score: see `decisions.normalize`.
        is_anomalous: whether the score is above the image threshold.
        local_score: of the local map alone (structural anomalies).
        global_score: of the global map alone (logical anomalies).
        mask_area: pixels of the mask.
        mask_share: the same as a share of the image.
        anomaly_map: float32 at the input's own resolution.
        mask: pixels whose value is above the pixel threshold.
    """

    score: float
    normalized_score: float
    is_anomalous: bool
    local_score: float
    global_score: float
    mask_area: int
    mask_share: float
    anomaly_map: Float[np.ndarray, "h w"]
    mask: Bool[np.ndarray, "h w"]


class Prepared(NamedTuple):
    """An image as the networks take it.

    Attributes:
        pixels: at model resolution.
        size: (height, width) of the input.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    size: tuple[int, int]


class Detector:
    """Scores images with a category of a run; the run's folder is all it needs.

    `detector(image)` gives a `Result`, and `detector([image, ...])` a list of them. An
    image is a path, a PIL image or a NumPy array ([h, w], [h, w, 1], [h, w, 3] or
    [h, w, 4], RGB in this order; uint8, uint16, or any numbers where the run has a
    `config.dataset.white_level`). It is made 8-bit RGB and resized as training images
    are. Paths and PIL images are turned upright by their EXIF orientation, arrays are
    taken as they are. PIL keeps 8 bits of 16-bit colour: give the path or an array.
    """

    def __init__(
        self, config: ConfigDict, weights: inference.Weights, decisions: Decisions
    ):
        """Takes what `load` has read."""
        self.image_size: tuple[int, int] = tuple(config.image_size)
        self.batch_size: int = config.evaluation.batch_size
        self.white_level: float = config.dataset.white_level
        self.decisions = decisions
        self._weights = weights
        self._predict = inference.make_predict_step(
            training.make_pyramid(config), training.make_model(config)
        )

    @classmethod
    def load(
        cls,
        workdir: str | os.PathLike[str],
        category: str = "",
        *,
        selection: str = "",
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        batch_size: int | None = None,
    ) -> Detector:
        """Loads a category of a run.

        Args:
            workdir: that train.py wrote.
            category: may be left out where the run has one.
            selection: of the checkpoint, if not the config's.
            image_threshold: instead of the run's.
            pixel_threshold: instead of the run's.
            batch_size: images at once, if not `config.evaluation.batch_size`. A batch
                is always filled up, so 1 is fastest for single images.

        Raises:
            UserError: no run, no such category, another version's checkpoint.
        """
        run = trained.load_run(
            workdir,
            category,
            selection=selection,
            image_threshold=image_threshold,
            pixel_threshold=pixel_threshold,
            batch_size=batch_size,
        )
        return cls(run.config, run.weights, run.decisions)

    def __call__(self, images: Any) -> Any:
        """Returns the `Result` of an image, or a list of them for several.

        Args:
            images: an image, a sequence of images, or an array [n, h, w, c].

        Raises:
            UserError: a file that cannot be read, or an image that needs a white level.
            ValueError: an array that is no image.
        """
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return [
                result
                for start in range(0, len(images), self.batch_size)
                for result in self.predict(
                    [self.prepare(i) for i in images[start : start + self.batch_size]]
                )
            ]
        return next(self.predict([self.prepare(images)]))

    @property
    def display_range(self) -> tuple[float, float]:
        """The map's values that are drawn coldest and hottest in pictures."""
        calibration = self._weights.calibration
        return calibration.display_low, calibration.display_high

    def prepare(self, image: Any) -> Prepared:
        """Decodes and resizes an image. Threads may do so side by side."""
        pixels = as_rgb(image, self.white_level)
        height, width = pixels.shape[:2]
        return Prepared(resize_bilinear(pixels, self.image_size), (height, width))

    def predict(self, batch: Sequence[Prepared]) -> Iterator[Result]:
        """Scores at most `batch_size` images; makes large maps one at a time.

        Raises:
            UserError: a score that is not finite.
        """
        images = np.zeros((self.batch_size, *self.image_size, 3), np.uint8)
        for row, prepared in enumerate(batch):
            images[row] = prepared.pixels
        prediction = jax.device_get(self._predict(self._weights, images))
        if not np.isfinite(prediction.anomaly_map).all():
            raise UserError(
                "Expected finite anomaly maps, found NaN or infinity: the checkpoint's "
                "weights are damaged. Restore its files, or train anew."
            )
        for row, prepared in enumerate(batch):
            anomaly_map = resize_map(prediction.anomaly_map[row], prepared.size)
            # As the device compares: in float32.
            mask = anomaly_map > np.float32(self.decisions.thresholds.pixel)
            area = int(np.count_nonzero(mask))
            yield Result(
                score=float(prediction.score[row]),
                normalized_score=float(prediction.normalized_score[row]),
                is_anomalous=bool(prediction.is_anomalous[row]),
                local_score=float(prediction.local_score[row]),
                global_score=float(prediction.global_score[row]),
                mask_area=area,
                mask_share=area / mask.size,
                anomaly_map=anomaly_map,
                mask=mask,
            )


def as_rgb(image: Any, white_level: float) -> UInt8[np.ndarray, "h w 3"]:
    """Makes 8-bit RGB of everything that a detector takes.

    Args:
        image: see `Detector`.
        white_level: see `pixels.to_rgb`.

    Raises:
        UserError: a file that cannot be read, or an image that needs a white level.
        ValueError: an array of another type or shape, or without a pixel.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image, white_level=white_level)
    if isinstance(image, Image.Image):
        where = f"a PIL image of mode {image.mode}"
        values = pixels_lib.decode(image, exact=bool(white_level), where=where)
    else:
        values = np.asarray(image)
        where = f"an array of {values.dtype}"
    is_image = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))
    if values.dtype.kind not in "uif" or not is_image or not values.size:
        raise ValueError(
            "Expected an image as uint8 or uint16 (or other numbers, with a white "
            "level) [h, w], [h, w, 1], [h, w, 3] (RGB) or [h, w, 4], found "
            f"{values.dtype} {values.shape}."
        )
    return pixels_lib.to_rgb(values, white_level, where=where)
