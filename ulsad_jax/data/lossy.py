"""Effects of lossy compression on masks: noise at edges, black not exactly 0."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

from ulsad_jax.data.file_warnings import said_before

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Shaped

# Largest value that black decodes to at quality 10 or higher: in the whole image
# for JPEG, in single places for WebP.
BLACK = 2


def highest_normal(values: Shaped[np.ndarray, "h w"], data: bytes) -> float:
    """Returns the value above which the pixels of a mask are defective.

    Args:
        values: pixel values of the mask, [h, w].
        data: content of the mask's file.

    Returns:
        0 for a file without lossy compression. For lossy compression, half of the
        largest value, because noise is far below it, but at least the value that black
        may decode to: `BLACK` for WebP, and the smaller of `BLACK` and the mask's
        smallest value for JPEG.
    """
    compression = _find_loss(data)
    if not compression:
        return 0.0
    black = BLACK if compression == "WEBP" else min(BLACK, values.min())
    return float(max(values.max() / 2, black))


def _find_loss(data: bytes) -> str:
    """Returns "JPEG" or "WEBP" if a file has such lossy compression, else ""."""
    with said_before(), Image.open(io.BytesIO(data)) as image:
        if image.format == "WEBP":
            return "WEBP" if b"VP8 " in _webp_chunks(data) else ""
        jpeg = image.format in ("JPEG", "MPO")  # MPO: several JPEGs, as cameras write
        in_tiff = image.info.get("compression") in ("jpeg", "tiff_jpeg")
        return "JPEG" if jpeg or in_tiff else ""


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    """Yields the names of a WebP file's chunks.

    Pixels are in chunks named "VP8 " (lossy) or "VP8L" (lossless).
    """
    start = 12  # start of the first chunk, after "RIFF", the file's size and "WEBP"
    while start + 8 <= len(data):
        name = data[start : start + 4]
        yield name
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        # An animation's frame has chunks of its own, after 16 bytes of header.
        start += 8 + (16 if name == b"ANMF" else size + size % 2)
