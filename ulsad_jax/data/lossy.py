"""What lossy compression does to a mask: noise around edges, black not quite 0."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Shaped

# The most that a black image comes back with, from quality 10 on: in JPEG all over,
# in WebP here and there.
BLACK = 2


def highest_normal(values: Shaped[np.ndarray, "h w"], data: bytes) -> float:
    """Returns the value that a mask's defects lie above.

    Args:
        values: the mask's pixels.
        data: the content of its file.

    Returns:
        0 for a file without loss; for one with loss half of the largest value, as
        noise is far below it, or the largest value of one that was black.
    """
    compression = _find_loss(data)
    if not compression:
        return 0.0
    black = BLACK if compression == "WEBP" else min(BLACK, values.min())
    return float(max(values.max() / 2, black))


def _find_loss(data: bytes) -> str:
    """Returns "JPEG" or "WEBP" if an image file was compressed so with loss, or ""."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "WEBP":
            return "WEBP" if b"VP8 " in _webp_chunks(data) else ""
        jpeg = image.format in ("JPEG", "MPO")  # MPO: several JPEGs, as cameras write
        in_tiff = image.info.get("compression") in ("jpeg", "tiff_jpeg")
        return "JPEG" if jpeg or in_tiff else ""


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    """Yields the names of a WebP file's chunks: pixels lie in "VP8 " or "VP8L"."""
    start = 12  # of the first chunk, after "RIFF", the file's size and "WEBP"
    while start + 8 <= len(data):
        name = data[start : start + 4]
        yield name
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        # An animation's frame has chunks of its own, after 16 bytes of header.
        start += 8 + (16 if name == b"ANMF" else size + size % 2)
