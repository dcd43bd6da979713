"""Computes draem.npz: `python -m tests.goldens.draem loss.py`.

It holds what anomalib's networks, of few channels, make of drawn images and weights:
parts of the repaired images and of the map, the losses in training, and parts of their
gradients with respect to the networks' outputs. (Those with respect to the weights are
not stable: errors of 1e-7 in the images change them by a third.) The losses are those
of the authors' program (its file loss.py, github.com/VitjanZ/DRAEM), as anomalib's
leave out normal pixels. And it holds Perlin noise of anomalib's. All is computed in
float64, with anomalib 2.7.0 and torch 2.14.1.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import zlib

import numpy as np

from tests.goldens import weights

SIZE, BATCH, SEED, STRIDE = 128, 4, 5, 8
WIDTHS = 6, 4  # of the network that repairs, and of the one that segments
CELLS = 4, 8  # of the Perlin noise


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, the same with defects, and their masks: [b, h, w, 3] and [b, h, w]."""
    clean, other = np.split(weights.images(2 * BATCH, SIZE, seed=SEED), 2)
    clean = np.round(clean * 255).astype(np.uint8) / np.float32(255)
    mask = (other[..., 0] > 0.6).astype(np.float32)
    return clean, np.where(mask[..., None] > 0, other, clean), mask


def angles() -> np.ndarray:
    """Directions of the noise's gradients, in turns."""
    rng = np.random.default_rng(SEED)
    return rng.random((CELLS[0] + 1, CELLS[1] + 1), np.float32)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of the networks, by its name and shape in PyTorch."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    z = rng.standard_normal(shape, np.float32)
    if len(shape) == 4:
        return z * np.float32(np.sqrt(2.0 / np.prod(shape[1:])))
    if name.endswith("running_var"):
        return 1 + np.abs(z) / 10
    return 1 + z / 10 if name.endswith("weight") else z / 10


def main(program: str) -> None:
    """Writes the golden next to this script."""
    import torch
    from anomalib.data.utils.generators import perlin
    from anomalib.models.image.draem import torch_model

    spec = importlib.util.spec_from_file_location("authors", program)
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    torch.set_num_threads(1)
    repair, segment = WIDTHS
    model = torch_model.DraemModel()
    model.reconstructive_subnetwork = torch_model.ReconstructiveSubNetwork(
        base_width=repair
    )
    model.discriminative_subnetwork = torch_model.DiscriminativeSubNetwork(
        in_channels=6, out_channels=2, base_width=segment
    )
    shapes = {n: a.shape for n, a in model.state_dict().items() if a.ndim}
    model.double().load_state_dict(
        {n: torch.tensor(fill(n, tuple(s))) for n, s in shapes.items()},
        strict=False,  # without the counts of batches
    )
    clean, defective, mask = (torch.tensor(x).double() for x in images())
    clean, defective = clean.permute(0, 3, 1, 2), defective.permute(0, 3, 1, 2)
    n = STRIDE
    with torch.no_grad():
        repaired = model.eval().reconstructive_subnetwork(defective)
        found = model(defective).anomaly_map
    golden = {
        "repaired": repaired[:, :, ::n, ::n].permute(0, 2, 3, 1).float().numpy(),
        "map": found[:, ::n, ::n].float().numpy(),
    }
    outputs = model.train()(defective)
    repaired, logits = (x.detach().requires_grad_() for x in outputs)
    window = authors.create_window(11, 3).double()
    terms = (
        torch.nn.functional.mse_loss(repaired, clean),
        1 - authors.ssim(repaired, clean, window=window, val_range=1)[0],
        authors.FocalLoss()(torch.softmax(logits, 1), mask[:, None]),
    )
    sum(terms).backward()
    golden["losses"] = np.float32([x.item() for x in (*terms, sum(terms))])
    for name, x in (("repaired", repaired), ("logits", logits)):
        part = x.grad[:, :, ::n, ::n].permute(0, 2, 3, 1)
        golden[f"{name}_gradient"] = part.float().numpy()
    torch.rand = lambda *size, device=None: torch.tensor(angles())
    noise = perlin.generate_perlin_noise(SIZE, SIZE, CELLS, torch.device("cpu"))
    golden["noise"] = noise[::n, ::n].numpy()
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **golden)


if __name__ == "__main__":
    main(sys.argv[1])
