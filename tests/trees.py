"""Small data sets on disk, in the layouts that `ulsad_jax.data` reads.

Each `write_<layout>(root, ...)` writes one category and returns `root`.
"""

from __future__ import annotations

import csv
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (32, 40)  # (height, width)

LOCO_CONFIG = [
    {
        "defect_name": "missing_pin",
        "pixel_value": 255,
        "saturation_threshold": 60,
        "relative_saturation": False,
    },
    {
        "defect_name": "scratch",
        "pixel_value": 254,
        "saturation_threshold": 1.0,
        "relative_saturation": True,
    },
]

# Normal magnetic tiles, exp<k>_num_<n> as (k, n): 3, 3, 1, 4 and 2 exposures of five
# tiles. Sorted as text, the names come in another order.
TILES = (
    (1, 9),
    (2, 20),
    (3, 100),
    (0, 110),
    (1, 121),
    (6, 130),
    (6, 200),
    (1, 210),
    (2, 220),
    (4, 1000),
    (5, 1010),
    (2, 1020),
    (5, 1030),
)


def write_image(path: Path, *, size: tuple[int, int] = SIZE, mode: str = "RGB") -> None:
    """Writes noise that depends on the file's name and folder only."""
    seed = zlib.crc32(f"{path.parent.name}/{path.name}".encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def write_palette_with_transparency(path: Path) -> None:
    """Writes an image that Pillow warns of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(math.prod(SIZE)).reshape(SIZE).astype(np.uint8)
    Image.fromarray(pixels).convert("P").save(path, transparency=b"\0\20")


def write_mask(
    path: Path,
    *,
    value: int = 255,
    size: tuple[int, int] = SIZE,
    box: tuple[int, int, int, int] = (4, 6, 12, 16),
) -> None:
    """Writes `value` inside `box` (top, left, bottom, right) and 0 elsewhere."""
    top, left, bottom, right = box
    pixels = np.zeros(size, np.uint8)
    pixels[top:bottom, left:right] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_images(
    folder: Path, count: int, *, ending: str = ".png", mode: str = "RGB"
) -> None:
    """Writes `000<ending>`, `001<ending>`, ..."""
    for i in range(count):
        write_image(folder / f"{i:03d}{ending}", mode=mode)


def write_mvtec_ad(
    root: Path,
    category: str = "bottle",
    *,
    train: int = 4,
    good: int = 2,
    defects: Sequence[str] = ("broken", "scratch"),
    per_defect: int = 2,
    mode: str = "RGB",
) -> Path:
    base = root / category
    write_images(base / "train" / "good", train, mode=mode)
    write_images(base / "test" / "good", good, mode=mode)
    for defect in defects:
        write_images(base / "test" / defect, per_defect, mode=mode)
        for i in range(per_defect):
            write_mask(base / "ground_truth" / defect / f"{i:03d}_mask.png")
    return root


def write_mvtec_loco(
    root: Path,
    category: str = "pushpins",
    *,
    train: int = 4,
    validation: int = 2,
    good: int = 2,
    per_type: int = 2,
) -> Path:
    """The first image of a type has two overlapping channels, the others one."""
    base = root / category
    write_images(base / "train" / "good", train)
    write_images(base / "validation" / "good", validation)
    write_images(base / "test" / "good", good)
    for kind in ("logical_anomalies", "structural_anomalies"):
        write_images(base / "test" / kind, per_type)
        for i in range(per_type):
            channels = base / "ground_truth" / kind / f"{i:03d}"
            write_mask(channels / "000.png", value=255)
            if i == 0:
                write_mask(channels / "001.png", value=254, box=(8, 8, 16, 20))
    write_json(base / "defects_config.json", LOCO_CONFIG)
    return root


def write_btad(
    root: Path,
    category: str = "01",
    *,
    train: int = 4,
    good: int = 2,
    defects: int = 2,
    image_ending: str = ".bmp",
    mask_ending: str = ".png",
) -> Path:
    """`root` stands for the inside of the archive's folder."""
    base = root / category
    write_images(base / "train" / "ok", train, ending=image_ending)
    write_images(base / "test" / "ok", good, ending=image_ending)
    write_images(base / "test" / "ko", defects, ending=image_ending)
    for i in range(defects):
        write_mask(base / "ground_truth" / "ko" / f"{i:03d}{mask_ending}")
    return root


def write_visa(
    root: Path,
    category: str = "candle",
    *,
    train: int = 4,
    good: int = 2,
    defects: int = 2,
) -> Path:
    """A second call adds its category to the CSV file of the first."""
    normal, anomaly = (f"{category}/Data/Images/{x}" for x in ("Normal", "Anomaly"))
    masks = f"{category}/Data/Masks/Anomaly"
    write_images(root / normal, train + good, ending=".JPG")
    write_images(root / anomaly, defects, ending=".JPG")
    rows = []
    for i in range(train + good):
        split = "train" if i < train else "test"
        rows.append([category, split, "normal", f"{normal}/{i:03d}.JPG", ""])
    for i in range(defects):
        mask = f"{masks}/{i:03d}.png"
        write_mask(root / mask, value=i + 1)
        rows.append([category, "test", "anomaly", f"{anomaly}/{i:03d}.JPG", mask])
    path = root / "split_csv" / "1cls.csv"
    if path.exists():
        rows = read_csv(path) + rows
    else:
        rows = [["object", "split", "label", "image", "mask"], *rows]
    write_csv(path, rows)
    return root


def write_magnetic_tile(
    root: Path,
    *,
    normal: Iterable[tuple[int, int]] = TILES,
    defects: Sequence[str] = ("Blowhole", "Crack"),
    per_defect: int = 2,
) -> Path:
    for k, n in normal:
        image = root / "MT_Free" / "Imgs" / f"exp{k}_num_{n}.jpg"
        write_image(image, mode="L")
        write_mask(image.with_suffix(".png"), value=0)
    for defect in defects:
        for i in range(per_defect):
            image = root / f"MT_{defect}" / "Imgs" / f"exp{i + 1}_num_{500 + i}.jpg"
            write_image(image, mode="L")
            _write_smoothed_mask(image.with_suffix(".png"))
    return root


def _write_smoothed_mask(path: Path) -> None:
    pixels = np.zeros(SIZE, np.uint8)
    pixels[4:12, 6:16] = 100  # the rim of a smoothed mask: not a defect
    pixels[6:10, 8:14] = 250
    Image.fromarray(pixels).save(path)


def write_folder(
    root: Path,
    *,
    train: int = 4,
    validation: int = 0,
    test: dict[str, int] | None = None,
    normal: str = "good",
    masks: bool = True,
) -> Path:
    """`test` maps a type to its number of images; by default there is no test set."""
    write_images(root / "train" / normal, train)
    write_images(root / "validation" / normal, validation)
    for kind, count in (test or {}).items():
        write_images(root / "test" / kind, count)
        if masks and kind not in (normal, "good", "ok", "normal"):
            for i in range(count):
                write_mask(root / "ground_truth" / kind / f"{i:03d}_mask.png")
    return root


def write_table(
    path: Path,
    *,
    train: int = 4,
    good: int = 2,
    defects: int = 2,
    encoding: str = "utf-8",
) -> Path:
    """Writes the CSV file `path` and, beside it, its images; returns `path`."""
    folder = path.parent
    rows = [["image", "split", "label", "mask", "type"]]
    for i in range(train + good):
        write_image(folder / "images" / f"{i:03d}.png")
        split = "train" if i < train else "test"
        rows.append([f"images/{i:03d}.png", split, "normal", "", ""])
    for i in range(defects):
        write_image(folder / "images" / f"bad_{i:03d}.png")
        write_mask(folder / "masks" / f"bad_{i:03d}.png")
        image, mask = f"images/bad_{i:03d}.png", f"masks/bad_{i:03d}.png"
        rows.append([image, "test", "anomalous", mask, "dent"])
    write_csv(path, rows, encoding=encoding)
    return path


def write_csv(
    path: Path, rows: Iterable[Sequence[str]], *, encoding: str = "utf-8"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)


def read_csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
