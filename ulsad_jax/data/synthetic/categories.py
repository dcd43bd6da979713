"""Writes synthetic categories with logical rules in MVTec LOCO AD's layout.

The category "panel" is the front of a device; one of any other name is a tray of parts.
Each has its own layout, materials and rules, drawn from a seed. Its images vary in
position, rotation, colour, light and noise. Anomalous images break a rule or show
damage, with exact masks.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ulsad_jax.data.records import GOOD, TEST, TRAIN, VALIDATION
from ulsad_jax.data.synthetic import anomalies, panel, scenes
from ulsad_jax.data.synthetic.design import Ground, draw_design
from ulsad_jax.data.synthetic.masks import logical_mask, structural_mask
from ulsad_jax.data.synthetic.scenes import Scene, photograph, with_grain
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, UInt8

GENERATOR_VERSION = 2  # increase it whenever the drawn images change
PARAMETERS = "generator.json"
_LOGICAL, _STRUCTURAL = "logical_anomalies", "structural_anomalies"
_SMALLEST = 64  # in smaller images, parts are indistinguishable


@dataclasses.dataclass(frozen=True)
class Product:
    """The functions that draw the images of a kind of product.

    Attributes:
        draw_design: draws a category's design from a seed and a size.
        draw_scene: draws a normal scene of a design.
        violations: lists the rules of a design that a scene breaks.
        logical: functions that break a rule, by the kind of anomaly.
        structural: functions that damage a scene, by the kind of anomaly.
        saturations: saturation threshold of every defect of a design.
    """

    draw_design: Callable[..., Ground]
    draw_scene: Callable[..., Scene]
    violations: Callable[..., list[str]]
    logical: dict[str, Callable[..., anomalies.Spoiled]]
    structural: dict[str, Callable[..., Scene]]
    saturations: Callable[..., dict[str, tuple[float, bool]]]


TRAY = Product(
    draw_design,
    scenes.draw_scene,
    scenes.violations,
    anomalies.LOGICAL,
    anomalies.STRUCTURAL,
    anomalies.saturations,
)
PANEL = Product(
    panel.draw_design,
    panel.draw_scene,
    panel.violations,
    panel.LOGICAL,
    panel.STRUCTURAL,
    panel.saturations,
)
PRODUCTS = {"panel": PANEL}  # a category of another name is a tray


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image of a category before it is written.

    Attributes:
        image: RGB image, uint8 [h, w, 3].
        scene: scene that the image shows.
        twin: the same scene before the anomaly was added; for a normal image, `scene`.
        masks: (defect name, mask) of each ground-truth channel; masks are bool [h, w].
    """

    image: UInt8[np.ndarray, "h w 3"]
    scene: Scene
    twin: Scene
    masks: list[tuple[str, Bool[np.ndarray, "h w"]]]


def draw_sample(
    design: Ground,
    size: tuple[int, int],
    *,
    seed: int,
    split: str,
    type: str,
    i: int,
    product: Product = TRAY,
) -> Sample:
    """Draws image number `i` of a folder, independently of other images.

    The kinds of anomalies alternate: image `i` shows kind `i` modulo their number.

    Args:
        design: design of the category, drawn from `seed`.
        size: (height, width) of the image in pixels.
        seed: seed of the category.
        split: "train", "validation" or "test".
        type: "good", "logical_anomalies" or "structural_anomalies".
        i: number of the image in its folder.
        product: product whose design it is.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{split}/{type}/{i}".encode())])
    twin = product.draw_scene(design, rng)
    if type == _STRUCTURAL:
        kind, damage = list(product.structural.items())[i % len(product.structural)]
        sample = _damaged(design, size, twin, rng, kind, damage)
    elif type == _LOGICAL:
        spoil = list(product.logical.values())[i % len(product.logical)]
        scene, regions = spoil(design, twin, rng)
        image = with_grain(scene, photograph(design, scene, size))
        masks = [(r.defect, logical_mask(scene, r, size)) for r in regions]
        sample = Sample(image, scene, twin, masks)
    else:
        image = with_grain(twin, photograph(design, twin, size))
        sample = Sample(image, twin, twin, [])
    assert bool(product.violations(design, sample.scene)) == (type == _LOGICAL)
    return sample


def _damaged(
    design: Ground,
    size: tuple[int, int],
    twin: Scene,
    rng: np.random.Generator,
    kind: str,
    damage: Callable[..., Scene],
) -> Sample:
    sound = photograph(design, twin, size)
    enough = max(4, 2e-4 * size[0] * size[1])
    while True:  # if other parts hide the damage, another one is tried
        scene = damage(design, twin, rng)
        photo = photograph(design, scene, size)
        mask = structural_mask(scene, photo, sound)
        if mask.sum() >= enough:
            return Sample(with_grain(scene, photo), scene, twin, [(kind, mask)])


def write_category(
    root: Path,
    *,
    category: str,
    seed: int,
    image_size: int | tuple[int, int] = 256,
    train: int = 100,
    validation: int = 20,
    good: int = 60,
    per_kind: int = 6,
) -> Path:
    """Writes a category, unless the same one already exists.

    An image depends only on `seed`, `image_size`, its folder and its number, so a
    larger number of images keeps the images of a smaller number.

    Args:
        root: parent folder of the categories; created if it is missing.
        category: name of the category and of its folder.
        seed: seed of the design, its rules and the images.
        image_size: size of the images in pixels: side of a square, or (height, width).
        train: number of normal training images.
        validation: number of normal validation images.
        good: number of normal test images.
        per_kind: number of test images of each kind of anomaly.

    Returns:
        Path of the category's folder.

    Raises:
        UserError: the folder holds something else, or a parameter is invalid.
    """
    size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
    counts = {"train": train, "validation": validation, "good": good}
    counts["per_kind"] = per_kind
    _check(category, seed, size, counts)
    parameters = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "image_size": list(size),
        **counts,
    }
    root = Path(root)
    target = root / category
    if target.exists():
        _check_same(target, parameters)
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{category}.") as scratch:
        folder = Path(scratch) / category
        _write(folder, seed, size, counts)
        (folder / PARAMETERS).write_text(json.dumps(parameters, indent=2) + "\n")
        try:
            folder.rename(target)
        except OSError:  # another process was faster
            _check_same(target, parameters)
    return target


def _check(
    category: str, seed: int, size: tuple[int, ...], counts: dict[str, int]
) -> None:
    if Path(category).name != category or category.startswith("."):
        raise UserError(
            f"Expected the category to be a folder's name, found {category!r}. Name "
            "the folder around it with `root` (--output)."
        )
    if len(size) != 2 or min(size) < _SMALLEST or max(size) > 3 * min(size):
        raise UserError(
            f"Expected image_size as one side or as height and width, at least "
            f"{_SMALLEST} pixels each and one at most 3 times the other, found "
            f"{list(size)}. Choose other sizes."
        )
    values = {"seed": seed, **counts}
    if min(values.values()) < 0 or counts["train"] < 1:
        raise UserError(
            "Expected at least one training image, and no negative seed or number of "
            f"images, found {values}. Raise them."
        )


def _check_same(target: Path, parameters: dict) -> None:
    """Raises an error unless `target` was written with `parameters`."""
    try:
        found = json.loads((target / PARAMETERS).read_text())
    except (OSError, ValueError):
        found = None
    if found != parameters:
        raise UserError(
            f"Expected {target} to be absent or a category written with {parameters}, "
            f"found {'other files' if found is None else found}. Remove that folder, "
            "or choose another category name."
        )


def _write(
    folder: Path, seed: int, size: tuple[int, int], counts: dict[str, int]
) -> None:
    """Writes all files of a category except the file of its parameters."""
    product = PRODUCTS.get(folder.name, TRAY)
    design = product.draw_design(seed, size=size)
    rules = product.saturations(design, size)
    values = {name: 255 - n for n, name in enumerate(rules)}
    parts = (
        (TRAIN, GOOD, counts["train"]),
        (VALIDATION, GOOD, counts["validation"]),
        (TEST, GOOD, counts["good"]),
        (TEST, _LOGICAL, counts["per_kind"] * len(product.logical)),
        (TEST, _STRUCTURAL, counts["per_kind"] * len(product.structural)),
    )
    for split, type_, _ in parts:
        (folder / split / type_).mkdir(parents=True)
    images = [(split, type_, i) for split, type_, n in parts for i in range(n)]
    title = f"Drawing {folder.name}"
    for split, type_, i in progress(images, title, total=len(images), announce=True):
        place = {"split": split, "type": type_, "i": i}
        sample = draw_sample(design, size, seed=seed, **place, product=product)
        _save(folder / split / type_ / f"{i:03d}.png", sample.image)
        channels = folder / "ground_truth" / type_ / f"{i:03d}"
        for k, (defect, mask) in enumerate(sample.masks):
            channels.mkdir(parents=True, exist_ok=True)
            _save(channels / f"{k:03d}.png", mask * np.uint8(values[defect]))
    config = [
        {
            "defect_name": name,
            "pixel_value": values[name],
            "saturation_threshold": threshold,
            "relative_saturation": relative,
        }
        for name, (threshold, relative) in rules.items()
    ]
    (folder / "defects_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save(path: Path, pixels: UInt8[np.ndarray, "..."]) -> None:
    # Noise hardly compresses, so little effort is spent on it.
    Image.fromarray(pixels).save(path, compress_level=1)
