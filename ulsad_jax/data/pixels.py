"""Pixels of decoded images: upright, and converted to 8-bit RGB.

Training, predictions and `Detector` all follow these rules. Masks are turned upright,
too. A file with an EXIF orientation is turned as image viewers show it. Of values with
more than 8 bits, the white level becomes 255. The white level is
`config.dataset.white_level`, or 65535 if that is not given.
"""

from __future__ import annotations

import io
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from ulsad_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Shaped, UInt8

    Pixels = Shaped[np.ndarray, "h w *c"]

WHITE_16_BIT = 65535
LEVELS = (1, 255, 1023, 4095, WHITE_16_BIT)  # common white levels of cameras
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's raw modes of 16-bit colour, of which it keeps the high bytes only.
PLANES, RAW_PLANES = "one plane a channel", "one plane a channel, not compressed"
_DEEP_COLOUR = re.compile(r"(RGB|RGBA|RGBX|RGBa|CMYK|LA);16[BLN]")


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of a loaded image; 1 means upright.

    Pillow turns TIFF images itself when it loads them, and then reports 1. Damaged or
    unknown orientations count as 1.
    """
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data raise any error; viewers ignore them
        return 1
    return found if found in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """Returns an image turned as viewers show it.

    `PIL.ImageOps.exif_transpose` does the same, but also rewrites the EXIF data, which
    fails if they are damaged.
    """
    name = getattr(image, "filename", "")
    image.filename = ""  # else Pillow memory-maps TIFF and corrupts turned images
    image.load()
    image.filename = name
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def decode(image: Image.Image, *, exact: bool, where: str) -> Pixels:
    """Returns an image's values at their stored depth, upright and without alpha.

    Args:
        image: image file opened by Pillow, or any other Pillow image. If a file with
            16-bit colour is already loaded, only its high bytes are left.
        exact: True to refuse 16-bit colours of which Pillow can read only the high
            bytes.
        where: path or description of the file, used in error messages.

    Returns:
        uint8 or uint16 [h, w, 3], or uint16, int32 or float32 [h, w].

    Raises:
        UserError: the file has colours that `exact` refuses, or that Pillow misreads.
    """
    kind = _find_deep_colour(image)
    if kind == RAW_PLANES or (exact and kind in (PLANES, "RGBa", "CMYK")):
        raise UserError(
            "Expected 16-bit colours as RGB, with the channels of a pixel side by "
            f"side, found {where} as {kind}, which cannot be read with all its bits. "
            "Save it so, as 16-bit grey, or with 8 bits a channel."
        )
    has_low = kind in ("RGB", "RGBA", "RGBX", "LA")
    low = _read_low_bytes(image) if has_low else None  # loading closes the file
    shown = upright(image)
    if shown.mode.startswith("I;16"):
        return np.asarray(shown).astype(np.uint16)
    if (image.format, shown.mode) == ("PPM", "I"):  # its header gives the white level
        grey = _scale(np.asarray(shown), WHITE_16_BIT)
        return np.repeat(grey[..., None], 3, axis=2)
    if shown.mode in ("I", "F"):
        return np.asarray(shown)
    high = np.asarray(shown.convert("RGB"))
    return high if low is None else high.astype(np.uint16) << 8 | low


def _find_deep_colour(image: Image.Image) -> str:
    """Returns how a file that is not loaded stores 16-bit colour; "" if it does not."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    mode, tags = _raw_mode(tiles[0].args), getattr(image, "tag_v2", {})
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, ())
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and bits[1:2] == (16,):
        return RAW_PLANES if len(mode) == 1 else PLANES
    found = _DEEP_COLOUR.fullmatch(mode)
    return found[1] if found else ""


def _read_low_bytes(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the low bytes of 16-bit colours, which Pillow discards.

    The file is decoded a second time, in the opposite byte order.
    """
    is_grey = _find_deep_colour(image) == "LA"
    image.fp.seek(0)
    with Image.open(io.BytesIO(image.fp.read())) as twin:
        twin.seek(image.tell())
        twin.tile = [tile._replace(args=_swap(tile.args)) for tile in twin.tile]
        values = np.asarray(upright(twin))
    return values[..., [1, 1, 1] if is_grey else [0, 1, 2]]


def _raw_mode(args: Any) -> str:
    return str(args[0] if isinstance(args, tuple) and args else args)


def _swap(args: Any) -> Any:
    """Returns a decoder's arguments with the raw mode of the opposite byte order."""
    mode = _raw_mode(args)
    if mode.startswith("LA"):  # has no opposite order; read as four bytes per pixel
        return "RGBA"
    order = mode[-1]
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    mode = mode[:-1] + ("L" if order == "B" else "B")
    return (mode, *args[1:]) if isinstance(args, tuple) else mode


def to_rgb(
    pixels: Pixels, white_level: float = 0.0, *, where: str
) -> UInt8[np.ndarray, "h w 3"]:
    """Converts an image's values to 8-bit RGB.

    8-bit values are kept. Other values are scaled such that `white_level` becomes 255,
    and larger values are clipped. Grey is repeated, and a fourth channel is dropped.

    Args:
        pixels: values returned by `decode`; also [h, w, 1], [h, w, 4] and other types.
        white_level: value that means white; 0 means 65535 for 16-bit grey. 16-bit
            colours without a white level are cut to their high 8 bits, as in Pillow and
            many other programs.
        where: path or description of the file, used in error messages.

    Returns:
        RGB image, uint8 [h, w, 3].

    Raises:
        UserError: floating-point numbers, or integers of more than 16 bits, have no
            white level, or numbers are not finite.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    pixels = pixels[..., :3]
    if pixels.dtype == np.uint16 and (white_level or pixels.shape[2] == 1):
        pixels = _scale(np.arange(1 << 16), white_level or WHITE_16_BIT)[pixels]
    elif pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        _check_level(pixels, white_level, where)
        pixels = _scale(pixels, white_level)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _scale(values: Shaped[np.ndarray, "*n"], white: float) -> UInt8[np.ndarray, "*n"]:
    scaled = 255 * np.clip(values / np.float64(white), 0, 1)
    return np.rint(scaled).astype(np.uint8)


def _check_level(pixels: Pixels, white_level: float, where: str) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all():
        raise UserError(
            f"Expected finite values in {where}, found NaN or infinity. Replace or "
            "remove the image."
        )
    if not white_level:
        kind = "integers" if pixels.dtype.kind in "iu" else "floating-point numbers"
        raise UserError(
            "Expected images of 8 or 16 bits a channel, or the value that means white "
            f"in config.dataset.white_level, found {where} with {kind} from {low:g} to "
            f"{high:g}. Train with --config.dataset.white_level="
            f"{guess_level(high):.10g}, if that is white, or save the images with 8 or "
            "16 bits."
        )


def guess_level(brightest: float) -> float:
    """Returns the most likely white level of values up to `brightest`."""
    return next((level for level in LEVELS if level >= brightest), brightest)
