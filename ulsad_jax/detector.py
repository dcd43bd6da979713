"""Runs a trained category on images and returns the results."""

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
from ulsad_jax.runs import saved, setup
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring.prediction import Weights, make_predict_step
from ulsad_jax.scoring.result import Result, take
from ulsad_jax.scoring.thresholds import Decisions

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from ml_collections import ConfigDict


class Prepared(NamedTuple):
    """An image in the form that the networks take.

    Attributes:
        pixels: 8-bit RGB image at `Detector.image_size`.
        size: (height, width) of the input image in pixels.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    size: tuple[int, int]


class Detector:
    """A trained category of a run, loaded from the run's folder, that scores images.

    `detector(image)` returns a `Result`, and `detector([image, ...])` a list of them.
    An image is a path, a PIL image or a NumPy array of shape [h, w], [h, w, 1],
    [h, w, 3] or [h, w, 4], with channels in RGB order. Arrays are uint8 or uint16;
    other numbers need a run with a `config.dataset.white_level`. Images are converted
    to 8-bit RGB and resized like the training images. Paths and PIL images are turned
    upright according to their EXIF orientation; arrays are not turned. PIL keeps only 8
    bits of 16-bit colour: pass the path or an array in that case.
    """

    def __init__(self, config: ConfigDict, weights: Weights, decisions: Decisions):
        """Takes the config, weights and decisions that `load` has read."""
        self.batch_size: int = config.evaluation.batch_size
        self.white_level: float = config.dataset.white_level
        self.decisions = decisions
        self._weights = weights
        made = setup.make(config)
        self.image_size: tuple[int, int] = made.input_size
        self._predict = make_predict_step(
            made.pyramid,
            made.method,
            top_share=config.score.top_share,
            keep_maps=True,
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
            workdir: folder that train.py wrote.
            category: name of the category; may be empty if the run has only one.
            selection: checkpoint to load ("last", "best_validation_loss" or
                "best_test_auroc"); empty for the selection in the config.
            image_threshold: replaces the run's threshold on image scores.
            pixel_threshold: replaces the run's threshold on map values.
            batch_size: number of images per batch, by default
                `config.evaluation.batch_size`. Batches are always padded to this size,
                so that 1 is fastest for single images.

        Raises:
            UserError: there is no run or no such category, or another version wrote the
                checkpoint.
        """
        run = saved.load_run(
            workdir,
            category,
            selection=selection,
            image_threshold=image_threshold,
            pixel_threshold=pixel_threshold,
            batch_size=batch_size,
        )
        return cls(run.config, run.weights, run.decisions)

    def __call__(self, images: Any) -> Any:
        """Returns the `Result` of one image, or a list of results for several images.

        Args:
            images: an image, a sequence of images, or an array [n, h, w, c].

        Raises:
            UserError: a file that cannot be read, or an image that needs a white level.
            ValueError: an array that is not an image.
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
    def names(self) -> tuple[str, ...]:
        """Names of the maps and of the scores of their own."""
        image = jax.ShapeDtypeStruct((1, *self.image_size, 3), np.uint8)
        return tuple(jax.eval_shape(self._predict, self._weights, image).scores)

    @property
    def display_range(self) -> tuple[float, float]:
        """Map values (low, high) at the cold and the hot end of the colour scale."""
        calibration = self._weights.calibration
        return calibration.display_low, calibration.display_high

    def prepare(self, image: Any) -> Prepared:
        """Decodes and resizes an image; several threads may call it at once."""
        pixels = as_rgb(image, self.white_level)
        height, width = pixels.shape[:2]
        return Prepared(resize_bilinear(pixels, self.image_size), (height, width))

    def predict(
        self, batch: Sequence[Prepared], *, with_maps: bool = True
    ) -> Iterator[Result]:
        """Scores a batch of images; large maps are made one image at a time.

        Args:
            batch: at most `batch_size` images from `prepare`.
            with_maps: True to also resize every map that the anomaly map is the mean
                of.

        Yields:
            The result of each image, with maps at the size of the input image.

        Raises:
            UserError: an anomaly map that is not finite.
        """
        images = np.zeros((self.batch_size, *self.image_size, 3), np.uint8)
        for row, prepared in enumerate(batch):
            images[row] = prepared.pixels
        prediction = jax.device_get(self._predict(self._weights, images))
        for found in (prediction.anomaly_map, *prediction.scores.values()):
            if not np.isfinite(found).all():
                raise UserError(
                    "Expected finite anomaly maps and scores, found NaN or infinity: "
                    "the checkpoint's weights are damaged. Restore its files, or train "
                    "anew."
                )
        for row, prepared in enumerate(batch):
            result = take(prediction, row)
            anomaly_map = resize_map(result.anomaly_map, prepared.size)
            # The device compares in float32, too.
            mask = anomaly_map > np.float32(self.decisions.thresholds.pixel)
            area = int(np.count_nonzero(mask))
            maps = result.maps if with_maps else {}
            yield dataclasses.replace(
                result,
                mask_area=area,
                mask_share=area / mask.size,
                anomaly_map=anomaly_map,
                maps={n: resize_map(m, prepared.size) for n, m in maps.items()},
                mask=mask,
            )


def as_rgb(image: Any, white_level: float) -> UInt8[np.ndarray, "h w 3"]:
    """Converts any image that a detector takes to 8-bit RGB.

    Args:
        image: a path, a PIL image or an array, see `Detector`.
        white_level: value that means white, see `pixels.to_rgb`.

    Raises:
        UserError: a file that cannot be read, or an image that needs a white level.
        ValueError: an array of another type or shape, or without pixels.
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
