"""Pictures in the encodings that cameras and programs write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATIONS = range(1, 9)
# What was done to an upright picture that is stored with an EXIF orientation.
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
WHITE = 4080  # of the deep encodings: 8-bit values times 16


def draw(seed: int = 0, *, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Draws a picture that no turn leaves as it is: uint8 [h, w, 3]."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    picture = np.stack([3 * y + x, 255 - 2 * x, 2 * y + 20 * (x < 9)], axis=-1)
    picture = picture + np.random.default_rng(seed).integers(-9, 9, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_grey(seed: int = 0, *, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Draws the same without colour: uint8 [h, w, 3] of equal channels."""
    return np.repeat(draw(seed, size=size)[..., :1], 3, axis=2)


def hold(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """Returns an upright picture as a camera that was turned stores it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = _STORED.get(orientation)
    return (image if turn is None else image.transpose(turn)), exif


def save(path: Path, pixels: np.ndarray, orientation: int = 1) -> Path:
    """Writes a picture without loss, or nearly so as JPEG."""
    image, exif = hold(Image.fromarray(pixels), orientation)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        image.save(path, exif=exif, quality=100, subsampling=0)
    elif path.suffix == ".webp":
        image.save(path, exif=exif, lossless=True)
    else:
        image.save(path, exif=exif)
    return path


DEEP = {
    "grey16.png": lambda values: values[..., 0].astype(np.uint16),
    "grey16.tif": lambda values: values[..., 0].astype(np.uint16),
    "grey16_big_endian.tif": lambda values: values[..., 0].astype(">u2"),
    "int32.tif": lambda values: values[..., 0].astype(np.int32),
    "float.tif": lambda values: values[..., 0].astype(np.float32),
    "rgb16.png": lambda values: values.astype(np.uint16),
    "rgba16.png": lambda values: _with_alpha(values.astype(np.uint16)),
    "la16.png": lambda values: _with_alpha(values[..., :1].astype(np.uint16)),
    "rgb16.tif": lambda values: values.astype("<u2"),
    "rgb16_big_endian.tif": lambda values: values.astype(">u2"),
    "rgba16.tif": lambda values: _with_alpha(values.astype("<u2")),
}


def save_deep(folder: Path, name: str, pixels: np.ndarray, *, factor: float) -> Path:
    """Writes 8-bit values times `factor` in one of the encodings of `DEEP`."""
    values = DEEP[name](pixels * np.float64(factor))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if values.ndim == 2:
        Image.fromarray(values).save(path)
    elif path.suffix == ".png":
        write_png_16_bit(path, values)
    else:
        write_tiff_16_bit(path, values)
    return path


def write_png_16_bit(path: Path, values: np.ndarray) -> None:
    """Writes uint16 [h, w, 2 to 4], which Pillow cannot."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    colour = {2: 4, 3: 2, 4: 6}[channels]
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks.items():
        check = zlib.crc32(kind + content)
        data += struct.pack(">I", len(content)) + kind + content
        data += struct.pack(">I", check)
    path.write_bytes(data)


def write_tiff_16_bit(
    path: Path, values: np.ndarray, *, photometric: int = 2, planar: bool = False
) -> None:
    """Writes uint16 [h, w, 3 or 4] in its own byte order, without compression.

    Args:
        path: of the file.
        values: colours and, in RGB, transparency.
        photometric: 2 is RGB, 5 is CMYK.
        planar: whether one channel follows the other, and not one pixel.
    """
    order = ">" if values.dtype.str[0] == ">" else "<"
    height, width, channels = values.shape
    planes = values.transpose(2, 0, 1) if planar else values[None]
    count, size = len(planes), planes[0].nbytes
    tags = 11 + (channels == 4 and photometric == 2)
    after = 8 + 2 + 12 * tags + 4  # where arrays of numbers lie
    bits, offsets = after, after + 2 * channels
    start = offsets + 8 * count
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, count, offsets if planar else start),
        (274, 3, 1, 1),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, count, offsets + 4 * count if planar else size),
        (284, 3, 1, 2 if planar else 1),
        (338, 3, 1, 2),
    ][:tags]
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    data += struct.pack(order + "H", tags)
    for tag, kind, number, value in entries:
        data += struct.pack(order + "HHI", tag, kind, number)
        is_short = kind == 3 and number == 1
        data += struct.pack(order + ("HH" if is_short else "I"), value, *[0] * is_short)
    data += struct.pack(order + "I", 0) + struct.pack(
        f"{order}{channels}H", *[16] * channels
    )
    places = [start + i * size for i in range(count)]
    data += struct.pack(f"{order}{2 * count}I", *places, *[size] * count)
    path.write_bytes(data + planes.tobytes())


def _with_alpha(values: np.ndarray) -> np.ndarray:
    alpha = np.full_like(values[..., :1], 65535)
    alpha[::2] = 300  # must not matter
    return np.concatenate([values, alpha], axis=2)


def write_all(folder: Path) -> list[Path]:
    """Writes one picture in many encodings of 8 bits, and of 16 that all count."""
    rgb = Image.fromarray(draw())
    grey = rgb.convert("L")
    folder.mkdir(parents=True, exist_ok=True)
    rgb.save(folder / "rgb.png")
    rgb.save(folder / "rgb.bmp")
    rgb.save(folder / "lzw.tif", compression="tiff_lzw")
    rgb.save(folder / "lossless.webp", lossless=True)
    rgb.save(folder / "progressive.jpg", quality=60, progressive=True)
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    for mode in ("CMYK", "YCbCr", "LAB"):
        rgb.convert(mode).save(folder / f"{mode}.tif")
    grey.save(folder / "grey.png")
    grey.save(folder / "grey.jpg")
    rgb.convert("1").save(folder / "bilevel.png")
    rgb.quantize(64).save(folder / "palette.png")
    rgb.quantize(64).save(folder / "palette.bmp")
    rgb.quantize(64).save(folder / "transparent.png", transparency=0)
    rgb.convert("RGBA").save(folder / "rgba.png")
    grey.convert("LA").save(folder / "la.png")
    for orientation in ORIENTATIONS:
        for ending in ("jpg", "png", "tif", "webp"):
            save(folder / f"held{orientation}.{ending}", draw(), orientation)
    for name in DEEP:
        if not name.startswith(("int32", "float")):
            save_deep(folder / "all_16_bits", name, draw(), factor=257)
    return sorted(path for path in folder.rglob("*") if path.is_file())
