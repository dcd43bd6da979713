"""The simplest detector, to know what a data set asks for: mean and std of each pixel.

    python benchmarks/per_pixel.py --config=configs/quickstart.py

An image's score is the largest deviation |x - mean| / std of a pixel from the training
images, after a blur (sigma 4) or without. Prints image AUROC per type of anomaly.
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_CONFIG = config_flags.DEFINE_config_file("config", None, "Which data to read.")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> None:
    """Prints a line for each category and score."""
    del argv
    logging.set_verbosity(logging.WARNING)
    from ulsad_jax.runs import data as data_lib
    from ulsad_jax.runtime import errors

    with errors.reported():
        config = _CONFIG.value
        for category in data_lib.list_categories(config):
            data = data_lib.open_data(config, category)
            for sigma in (0, 4):
                print(category, f"blur {sigma}:", score(data, sigma))


def score(data, sigma: float) -> dict[str, float]:
    """Image AUROC by type of the per-pixel detector, blurred by `sigma` pixels."""
    from ulsad_jax.metrics import image as metrics

    train = read(data.train)
    mean, std = train.mean(0), train.std(0) + 1e-3
    deviations = (np.abs(read(data.test) - mean) / std).mean(-1)
    blurred = ndimage.gaussian_filter(deviations, (0, sigma, sigma))
    aurocs = metrics.by_type(data.test.types, blurred.max((1, 2)))
    return {name: round(value, 4) for name, value in aurocs.items()}


def read(examples) -> np.ndarray:
    """All images [n, h, w, 3] in 0..1."""
    batches = [b["image"][b["valid"]] for b in examples.batches(16)]
    return np.concatenate(batches).astype(np.float32) / 255


if __name__ == "__main__":
    app.run(main)
