"""Computes efficientad.npz with anomalib: `python -m tests.goldens.efficientad`.

It holds what anomalib's networks make of drawn images and weights: parts of the
descriptions and of the maps, images with other colours, the loss terms on these and
norms of their gradient. Its dropout is off, and its penalty on other images is taken
off the loss. It was made with anomalib 2.7.0 and torch 2.14.1.
"""

from __future__ import annotations

import pathlib
import zlib

import numpy as np

from tests.goldens import weights

SIZE, CHANNELS, SEED, STRIDE = 256, 24, 11, 10
SIZES = ("small", "medium")
KINDS, FACTORS = (0, 1, 2), (1.15, 0.85, 1.2)  # brightness, contrast, saturation
CHANGE = 2  # which of these changes the colours in the loss


def images() -> np.ndarray:
    """Three images, uint8 [b, h, w, 3]."""
    drawn = weights.images(len(KINDS), SIZE, seed=SEED)
    return np.round(drawn * 255).astype(np.uint8)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of the networks, by its name and shape in PyTorch.

    Few numbers are drawn and repeated.
    """
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    z = np.resize(rng.standard_normal(10007, np.float32), shape)
    if len(shape) == 4:
        return z * np.float32(np.sqrt(2.0 / np.prod(shape[1:])))
    return z / 10


def moments() -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the teacher's channels."""
    rng = np.random.default_rng(SEED)
    mean = rng.standard_normal(CHANNELS, np.float32) / 10
    return mean, rng.uniform(0.5, 2, CHANNELS).astype(np.float32)


def main() -> None:
    """Writes the golden next to this script."""
    import torch
    from anomalib.models.image.efficient_ad import torch_model
    from torchvision.transforms import functional

    torch.set_num_threads(1)
    golden, n = {}, STRIDE
    pixels = torch.tensor(images()).permute(0, 3, 1, 2) / 255
    adjusters = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    changed = torch.stack(
        [adjusters[k](x, f) for k, x, f in zip(KINDS, pixels, FACTORS, strict=True)]
    )
    golden["colours"] = changed[:, :, :: 5 * n, :: 5 * n].permute(0, 2, 3, 1).numpy()
    for size in SIZES:
        model = torch_model.EfficientAdModel(CHANNELS, size)
        arrays = {
            name: torch.tensor(fill(name, tuple(x.shape)))
            for name, x in model.state_dict().items()
            if name.startswith(("teacher.", "student.", "ae."))
        }
        model.load_state_dict(arrays, strict=False)
        for name, values in zip(("mean", "std"), moments(), strict=True):
            model.mean_std[name].data = torch.tensor(values).reshape(1, -1, 1, 1)
        model.eval()
        one = pixels[:1]
        with torch.no_grad():
            found = {
                "teacher": model.teacher(one),
                "student": model.student(one),
                "autoencoder": model.ae(one, (SIZE, SIZE)),
            }
            maps = model.get_maps(one)
        for name, x in found.items():
            part = x[:, :, ::n, ::n].permute(0, 2, 3, 1)
            golden[f"{size}/{name}"] = part.numpy()
        for name, x in zip(("student_map", "autoencoder_map"), maps, strict=True):
            golden[f"{size}/{name}"] = x[:, 0, ::n, ::n].numpy()
        image = pixels[CHANGE : CHANGE + 1]
        model.choose_random_aug_image = lambda _: changed[CHANGE : CHANGE + 1]
        _, distance = model.compute_student_teacher_distance(image)
        terms = model.compute_losses(image, image, distance)
        penalty = (model.student(image)[:, :CHANNELS] ** 2).mean()
        total = sum(terms) - penalty
        total.backward()
        losses = [terms[0] - penalty, *terms[1:], total]
        golden[f"{size}/losses"] = np.float32([x.item() for x in losses])
        norms = {
            name: x.grad.norm().item()
            for name, x in model.named_parameters()
            if name.startswith(("student.", "ae."))
        }
        golden[f"{size}/names"] = np.array(list(norms))
        golden[f"{size}/norms"] = np.float32(list(norms.values()))
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **golden)


if __name__ == "__main__":
    main()
