"""Conversion of records to TFDS examples; each file is read once."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ulsad_jax.data import pixels
from ulsad_jax.data.records import NORMAL, Record, open_image, read_file, read_mask
from ulsad_jax.data.survey import Survey

if TYPE_CHECKING:
    from jaxtyping import Shaped

EMPTY_MASK = "have a mask without any defective pixel and are left out of pixel metrics"
FULL_MASK = "have a mask that covers the whole image: is its background white?"


def to_example(
    record: Record, survey: Survey, white_level: float = 0.0
) -> dict[str, Any]:
    """Reads a record's files, each once, and encodes them as a TFDS example.

    Args:
        record: paths of the image and its masks.
        survey: survey to which the digest and the peculiarities of the files are added.
        white_level: value that means white; see `pixels.to_rgb`.

    Returns:
        The features of `RecordsBuilder`, with images as encoded bytes. `has_mask` is
        True if the defective pixels are known. It is always True for a normal image,
        and False for an anomalous image whose masks have no defective pixel.

    Raises:
        UserError: a file cannot be read, or a mask does not fit its image.
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
    """Reads a record's masks, and adds implausible ones to the survey.

    Returns:
        The features of each mask, or none if no mask has a defective pixel, and the
        content of each mask's file.
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
    """Returns whether any decoder reads an image's bytes as upright 8-bit RGB."""
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
