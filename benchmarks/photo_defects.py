"""Photographs with drawn defects: a small detection task on real texture and objects.

The photographs are those in scikit-image's wheel. A texture is cut into tiles, the
training and the test tiles from different sides of the photograph; of any other
photograph one region, as if it were a product, is taken again and again with a small
shift, turn, change of light and noise.

    python benchmarks/photo_defects.py --output=photos --seed=0

writes every category as a folder of the `folder` layout, with masks, and sheet.png to
look at:

    python train.py --config=configs/folder.py:photos/coins --workdir=runs/coins
"""

from __future__ import annotations

import argparse
import functools
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from jaxtyping import Bool, Float, UInt8

# Side of a tile in pixels of the photograph.
TEXTURES = {"brick.png": 128, "grass.png": 128, "gravel.png": 128}
OBJECTS = {
    "coins.png": 150,
    "camera.png": 200,
    "coffee.png": 200,
    "motorcycle_left.png": 240,
    "retina.jpg": 500,
    "page.png": 150,
    "ihc.png": 200,
}
CATEGORIES = tuple(name.partition(".")[0] for name in (*TEXTURES, *OBJECTS))
TYPES = ("painted", "blurred", "transplanted", "scratched")
GOOD = "good"
# A defect must change its pixels by this much on average (grey levels of 255), and
# they must be this many for a tile of 128 x 128; else another one is drawn.
LEAST_CHANGE, LEAST_PIXELS = 8.0, 20
_SHIFT, _TURN = 4, 2.0  # of objects, at most: pixels of a tile of 128, degrees
_LEAST_CONTRAST = 25.0  # standard deviation of an object's region, grey levels


class Sample(NamedTuple):
    """A tile and its defective pixels."""

    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]


def draw_sample(category: str, *, seed: int, split: str, type: str, i: int, size: int):
    """Draws tile number `i` of a split and type, whatever else is drawn.

    Args:
        category: one of `CATEGORIES`.
        seed: decides regions, tiles and defects.
        split: "train", "validation" or "test"; textures train on another side.
        type: `GOOD` or one of `TYPES`.
        i: the tile's number.
        size: side of the tile in pixels.
    """
    rng = generator(seed, f"{category}/{split}/{type}/{i}")
    sound = _cut(category, seed, split, size, rng)
    image, mask = add_defect(sound, category, type, rng)
    return Sample(_photograph(image, rng), mask)


def add_defect(
    sound: Float[np.ndarray, "h w 3"],
    category: str,
    type: str,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """An image, 0..255, with a defect that can be seen, and the defect's pixels.

    Args:
        sound: the image before.
        category: one of `CATEGORIES` where something is transplanted.
        type: `GOOD`, which changes nothing, or one of `TYPES`.
        rng: decides the defect.
    """
    size = len(sound)
    image, mask = sound, np.zeros((size, size), bool)
    while type != GOOD:
        image, alpha = _DEFECTS[type](sound, category, rng)
        mask = alpha > 0.3
        change = np.abs(image - sound).mean(-1)
        enough = mask.sum() >= LEAST_PIXELS * (size / 128) ** 2
        if enough and change[mask].mean() >= LEAST_CHANGE:
            break
    return image, mask


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers of a thing's own, by its name."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


@functools.cache
def _photo(category: str, size: int) -> Float[np.ndarray, "h w 3"]:
    """The photograph, scaled so that a tile is `size` pixels; 0..255."""
    import skimage

    sides = TEXTURES | OBJECTS
    name = next(n for n in sides if n.partition(".")[0] == category)
    with Image.open(Path(skimage.__file__).parent / "data" / name) as file:
        photo = file.convert("RGB")
    scale = size / sides[name]
    shape = [round(side * scale) for side in photo.size]
    return np.asarray(photo.resize(shape, Image.Resampling.LANCZOS), np.float32)


def _is_texture(category: str) -> bool:
    return any(name.partition(".")[0] == category for name in TEXTURES)


def _cut(
    category: str, seed: int, split: str, size: int, rng: np.random.Generator
) -> Float[np.ndarray, "h w 3"]:
    photo = _photo(category, size)
    if not _is_texture(category):
        return _place(photo, _region(category, seed, size), size, rng)
    design = generator(seed, category)
    if design.random() < 0.5:  # which axis is split
        photo = photo.swapaxes(0, 1)
    if design.random() < 0.5:  # which side trains
        photo = photo[::-1]
    middle = round(0.55 * len(photo))
    photo = photo[:middle] if split != "test" else photo[middle:]
    y, x = (rng.integers(0, side - size + 1) for side in photo.shape[:2])
    return photo[y : y + size, x : x + size]


def _region(category: str, seed: int, size: int) -> tuple[int, int]:
    """(top, left) of an object's region, which is not dull."""
    photo = _photo(category, size)
    rng = generator(seed, category)
    margin = _margin(size)
    best = (-1.0, (0, 0))
    for _ in range(50):
        y, x = (
            int(rng.integers(margin, side - size - margin + 1))
            for side in photo.shape[:2]
        )
        contrast = float(photo[y : y + size, x : x + size].mean(-1).std())
        best = max(best, (contrast, (y, x)))
        if contrast >= _LEAST_CONTRAST:
            return y, x
    return best[1]


def _margin(size: int) -> int:
    return round(size / 128 * 2 * _SHIFT)


def _place(photo, corner: tuple[int, int], size: int, rng: np.random.Generator):
    """Takes an object's region once more: shifted and turned a little."""
    margin = _margin(size)
    y, x = corner
    around = photo[y - margin : y + size + margin, x - margin : x + size + margin]
    angle = np.deg2rad(rng.uniform(-_TURN, _TURN))
    shift = rng.uniform(-_SHIFT, _SHIFT, 2) * size / 128
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.full(2, (size - 1) / 2)
    offset = middle + margin + shift - turn @ middle
    channels = [
        ndimage.affine_transform(
            around[..., c], turn, offset, (size, size), order=1, mode="nearest"
        )
        for c in range(3)
    ]
    return np.stack(channels, -1)


def _photograph(
    image: Float[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Other light, and noise."""
    image = image * rng.uniform(0.93, 1.07) + rng.uniform(-5, 5)
    image = image + rng.normal(0, rng.uniform(1.5, 4.0), image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


# Defects: (sound tile, category, rng) -> (tile, opacity of the defect) --------


def _paint(sound, category, rng):
    """A soft spot, grey or coloured, lighter or darker than what it covers."""
    alpha = _spot(len(sound), rng, 0.07, 0.15) * rng.uniform(0.7, 0.95)
    local = np.average(sound, axis=(0, 1), weights=np.repeat(alpha[..., None], 3, -1))
    offset = rng.choice((-1, 1)) * rng.uniform(25, 60)
    if rng.random() < 0.5:
        offset = offset + rng.normal(0, 20, 3)
    return _mix(sound, np.clip(local + offset, 0, 255), alpha), alpha


def _blur(sound, category, rng):
    """A spot out of focus."""
    alpha = _spot(len(sound), rng, 0.12, 0.20)
    sigma = rng.uniform(1.5, 3.0) * len(sound) / 128
    return _mix(sound, ndimage.gaussian_filter(sound, (sigma, sigma, 0)), alpha), alpha


def _transplant(sound, category, rng):
    """A patch from elsewhere, sometimes from another photograph, at local mean."""
    size = len(sound)
    alpha = _spot(size, rng, 0.10, 0.18)
    source = category if rng.random() < 0.6 else str(rng.choice(CATEGORIES))
    photo = _photo(source, size)
    y, x = (rng.integers(0, side - size + 1) for side in photo.shape[:2])
    other = np.rot90(photo[y : y + size, x : x + size], rng.integers(1, 4))
    weights = np.repeat(alpha[..., None], 3, -1)
    means = (np.average(a, axis=(0, 1), weights=weights) for a in (sound, other))
    lift = 0.7 * (next(means) - next(means))
    return _mix(sound, np.clip(other + lift, 0, 255), alpha), alpha


def _scratch(sound, category, rng):
    """A thin bent line, darker or lighter."""
    size, fine = len(sound), 4
    start = rng.uniform(0.1, 0.9, 2) * size
    direction = rng.uniform(0, 2 * np.pi)
    length = rng.uniform(0.15, 0.40) * size
    pieces = int(rng.integers(2, 5))
    points = [start]
    for _ in range(pieces):
        direction += rng.normal(0, 0.35)
        step = np.array([np.cos(direction), np.sin(direction)]) * length / pieces
        points.append(points[-1] + step)
    canvas = Image.new("L", (size * fine, size * fine))
    width = max(1, round(rng.uniform(1.0, 2.0) * size / 128 * fine))
    line = [tuple(float(c) for c in p * fine) for p in points]
    ImageDraw.Draw(canvas).line(line, fill=255, width=width, joint="curve")
    drawn = canvas.resize((size, size), Image.Resampling.BOX)
    alpha = ndimage.gaussian_filter(np.asarray(drawn, np.float32) / 255, 0.4)
    offset = rng.choice((-1, 1)) * rng.uniform(35, 80)
    return np.clip(sound + offset * alpha[..., None], 0, 255), alpha


_DEFECTS = {
    "painted": _paint,
    "blurred": _blur,
    "transplanted": _transplant,
    "scratched": _scratch,
}


def _spot(
    size: int, rng: np.random.Generator, smallest: float, largest: float
) -> Float[np.ndarray, "h w"]:
    """A soft, uneven ellipse in 0..1 of the given diameters, as shares of the side."""
    y, x = np.mgrid[:size, :size] + 0.5
    radius = rng.uniform(smallest, largest) * size / 2
    row, column = rng.uniform(radius, size - radius, 2)
    angle = np.arctan2(y - row, x - column)
    turned = angle - rng.uniform(0, np.pi)
    stretch = rng.uniform(0.7, 1.0)
    reach = radius / np.hypot(np.cos(turned), np.sin(turned) / stretch)
    for k in (2, 3, 5):
        reach = reach * (
            1 + rng.normal(0, 0.08) * np.cos(k * angle + rng.uniform(0, 6))
        )
    edge = max(1.0, 0.25 * radius)
    inside = (reach - np.hypot(y - row, x - column)) / edge
    return np.clip(0.5 + inside, 0, 1).astype(np.float32)


def _mix(under, over, alpha):
    return under + (over - under) * alpha[..., None]


def draw_sheet(source: ModuleType, *, seed: int, size: int) -> Image.Image:
    """Two training tiles, then two of each type, outlined below; a row a category.

    Args:
        source: this module, or another with `draw_sample`, `CATEGORIES` and `TYPES`.
        seed: see `draw_sample`.
        size: see `draw_sample`.
    """
    rows = []
    for category in source.CATEGORIES:
        draw = functools.partial(source.draw_sample, category, seed=seed, size=size)
        samples = [draw(split="train", type=GOOD, i=i) for i in range(2)]
        samples += [
            draw(split="test", type=t, i=i) for t in source.TYPES for i in range(2)
        ]
        rows += [np.concatenate([s.image for s in samples], 1)]
        marked = []
        for image, mask in samples:
            outline = ndimage.binary_dilation(mask, iterations=3)
            outline &= ~ndimage.binary_dilation(mask, iterations=2)
            marked.append(np.where(outline[..., None], np.uint8([255, 0, 0]), image))
        rows += [np.concatenate(marked, 1)]
    return Image.fromarray(np.concatenate(rows, 0))


def write_category(
    source: ModuleType,
    category: str,
    folder: Path,
    counts: Mapping[tuple[str, str], int],
    *,
    seed: int,
    size: int,
) -> None:
    """Writes the images and masks of a category in the `folder` layout.

    Args:
        source: this module, or another with `draw_sample`.
        category: one of the source's `CATEGORIES`.
        folder: where `<split>/<type>/` and `ground_truth/<type>/` are made.
        counts: number of images by split and type.
        seed: see `draw_sample`.
        size: see `draw_sample`.
    """
    for (split, type), count in counts.items():
        images, masks = folder / split / type, folder / "ground_truth" / type
        for i in range(count):
            image, mask = source.draw_sample(
                category, seed=seed, split=split, type=type, i=i, size=size
            )
            _save(images / f"{i:03d}.png", image)
            if type != GOOD:
                _save(masks / f"{i:03d}_mask.png", np.uint8(255) * mask)


def _save(path: Path, pixels: UInt8[np.ndarray, "..."]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def main(source: ModuleType) -> None:
    """Writes all categories of `source`, as the command line asks for."""
    parser = argparse.ArgumentParser(
        description=source.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--output", required=True, type=Path, help="New folder of the categories.")
    add("--seed", default=0, type=int, help="Draws images and defects; 0 by default.")
    add("--size", default=128, type=int, help="Side in pixels; 128 by default.")
    add("--train", default=40, type=int, help="Normal images to train on; 40.")
    add("--validation", default=10, type=int, help="Normal validation images; 10.")
    add("--good", default=20, type=int, help="Normal test images; 20.")
    add("--anomalous", default=12, type=int, help="Test images of each defect; 12.")
    asked = parser.parse_args()
    if asked.output.exists():
        parser.error(
            f"Expected --output to name a new folder, found {asked.output}. Remove it, "
            "or name another."
        )
    counts = {("train", GOOD): asked.train, ("validation", GOOD): asked.validation}
    counts["test", GOOD] = asked.good
    counts |= {("test", type): asked.anomalous for type in source.TYPES}
    for category in source.CATEGORIES:
        folder = asked.output / category
        write_category(
            source, category, folder, counts, seed=asked.seed, size=asked.size
        )
    sheet = draw_sheet(source, seed=asked.seed, size=asked.size)
    sheet.save(asked.output / "sheet.png")


if __name__ == "__main__":
    main(sys.modules[__name__])
