"""Computes patches.npz with anomalib: `python -m tests.goldens.patches`.

It holds what anomalib's PatchCore and PaDiM make of the same features, projection and
first patch. It was made with anomalib 2.7.0 and torch 2.14.1, in an environment of
their own.
"""

from __future__ import annotations

import pathlib
from unittest import mock

import numpy as np

CHANNELS, DIMENSIONS = 12, 7
GRID, SIZE = (6, 5), (48, 40)  # of features and of images
TRAIN, TEST = 40, 2  # images
SHARE, START = 0.05, 17  # of the coreset; its first patch
STRIDE = 5  # of the pixels of a map that are kept


def features() -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of the training and the test images, [n, gh, gw, c]."""
    rng = np.random.default_rng(0)
    mix = np.tri(CHANNELS) / np.sqrt(np.arange(1, CHANNELS + 1))[:, None]
    x = rng.normal(size=(TRAIN + TEST, *GRID, CHANNELS)) @ mix.T
    x[-1, 2:4, 1:3] += 2.0  # a defect
    x = x.astype(np.float32)
    return x[:TRAIN], x[TRAIN:]


def projection() -> np.ndarray:
    """A random projection, [c, dimensions]."""
    matrix = np.random.default_rng(1).normal(size=(CHANNELS, DIMENSIONS))
    return (matrix / np.sqrt(DIMENSIONS)).astype(np.float32)


def main() -> None:
    """Writes the golden next to this script."""
    import torch

    train, test = (torch.tensor(x).permute(0, 3, 1, 2) for x in features())
    with torch.no_grad():
        golden = run_patchcore(train, test) | run_padim(train, test)
    arrays = {name: value.numpy() for name, value in golden.items()}
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **arrays)


def run_patchcore(train, test):
    """Rows of the coreset, distances [n, gh, gw] before they are enlarged, scores."""
    import torch
    from anomalib.models.components import KCenterGreedy
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(["layer1"], backbone="resnet18", pre_trained=False)
    patches, new = (
        model.reshape_embedding(model.feature_pooler(x)) for x in (train, test)
    )
    sampler = KCenterGreedy(patches, SHARE)
    sampler.model.fit = lambda embedding: None
    sampler.model.sparse_random_matrix = torch.tensor(projection().T)
    with mock.patch("torch.randint", return_value=torch.tensor([START])):
        rows = sampler.select_coreset_idxs()
    model.memory_bank = patches[rows]
    distances, locations = (
        x.reshape(TEST, -1) for x in model.nearest_neighbors(new, n_neighbors=1)
    )
    return {
        "coreset": torch.tensor(rows),
        "distances": distances.reshape(TEST, *GRID),
        "scores": model.compute_anomaly_score(distances, locations, new),
    }


def run_padim(train, test):
    """The map of all channels, of every `STRIDE`th row and column."""
    from anomalib.models.components import MultiVariateGaussian
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

    mean, inverse = MultiVariateGaussian().fit(train)
    found = AnomalyMapGenerator()(
        embedding=test, mean=mean, inv_covariance=inverse, image_size=SIZE
    )
    return {"padim": found[:, 0, ::STRIDE, ::STRIDE]}


if __name__ == "__main__":
    main()
