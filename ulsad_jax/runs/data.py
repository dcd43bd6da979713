"""Opens the images that a config selects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ulsad_jax.data.batches import Category, open_category
from ulsad_jax.data.layouts import select_categories
from ulsad_jax.data.synthetic import categories as synthetic
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runtime import hosts

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def list_categories(config: ConfigDict) -> list[str]:
    """Returns the categories that a config selects; draws the synthetic ones."""
    dataset = config.dataset
    names = [name.strip() for name in dataset.category.split(",")]
    if dataset.name != "synthetic":
        return select_categories(dataset.name, Path(dataset.root).expanduser(), names)
    names = ["panel"] if names == ["all"] else list(dict.fromkeys(names))
    for name in names:
        synthetic.write_category(
            synthetic_root(config), category=name, **dataset.synthetic
        )
    return names


def synthetic_root(config: ConfigDict) -> Path:
    """Returns the folder of the synthetic data set, one per set of drawing options."""
    dataset = config.dataset
    if dataset.root:
        return Path(dataset.root).expanduser()
    drawing = "-".join(str(v) for v in dataset.synthetic.to_dict().values())
    drawing = f"v{synthetic.GENERATOR_VERSION}-{drawing}"
    return Path(dataset.cache_dir).expanduser() / "synthetic" / drawing


def open_data(
    config: ConfigDict, category: str, *, needs_training: bool = True
) -> Category:
    """Opens the images of a category, and prints the remarks about its files.

    Args:
        config: config of the run.
        category: name of the category, from `list_categories`.
        needs_training: True if training images are required, see `open_category`.
    """
    dataset = config.dataset
    root = synthetic_root(config) if dataset.name == "synthetic" else Path(dataset.root)
    data = open_category(
        dataset.name,
        root=root.expanduser(),
        category=category,
        image_size=config_lib.input_size(config),
        mask_size=tuple(config.image_size),
        cache_dir=Path(dataset.cache_dir).expanduser(),
        validation_fraction=dataset.validation_fraction,
        white_level=dataset.white_level,
        seed=config.seed,
        needs_training=needs_training,
    )
    if hosts.is_first():
        if not data.train:
            print(
                f"[{category}] no training images: whether the run was trained on "
                "this data set's is not looked at",
                flush=True,
            )
        for remark in data.remarks:
            print(f"[{category}] {remark}", flush=True)
    return data
