r"""Draws a synthetic category from a seed.

python -m ulsad_jax.data.synthetic --output=data/synthetic --category=tray_0 \
        --seed=0 --image_size=256 --train=100 --per_kind=6

The category "panel" is the front of a device, any other a tray of parts.
"""

import os
from pathlib import Path

from absl import app, flags

from ulsad_jax import command_line
from ulsad_jax.data.synthetic.categories import write_category
from ulsad_jax.runtime.errors import UserError, reported

_OUTPUT = flags.DEFINE_string("output", None, "Folder of categories.", required=True)
_CATEGORY = flags.DEFINE_string("category", None, "The category's name.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Draws the design and the images.")
_IMAGE_SIZE = flags.DEFINE_list(
    "image_size", ["256"], "Side, or height,width, in pixels."
)
_COUNTS = {
    "train": flags.DEFINE_integer("train", 100, "Normal training images."),
    "validation": flags.DEFINE_integer("validation", 20, "Normal validation images."),
    "good": flags.DEFINE_integer("good", 60, "Normal test images."),
    "per_kind": flags.DEFINE_integer("per_kind", 6, "Images of each kind of anomaly."),
}


def main(argv: list[str]) -> None:
    """Draws a category and prints its folder."""
    command_line.begin(argv)
    with reported():
        sides = _IMAGE_SIZE.value
        if not all(side.isdecimal() for side in sides):
            raise UserError(
                "Expected --image_size=<side> or <height>,<width> in pixels, found "
                f"{','.join(sides)!r}. Give whole numbers."
            )
        size = [int(side) for side in sides]
        path = write_category(
            Path(_OUTPUT.value),
            category=_CATEGORY.value,
            seed=_SEED.value,
            image_size=size[0] if len(size) == 1 else tuple(size),
            **{name: flag.value for name, flag in _COUNTS.items()},
        )
    print(os.fspath(path))


if __name__ == "__main__":
    app.run(main)
