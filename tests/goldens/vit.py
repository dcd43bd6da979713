"""Computes vit.npz with timm and PyTorch: `python -m tests.goldens.vit`.

It holds timm's outputs of narrow ViTs of two blocks, on images of two sizes each, so
that positions are resized both ways. Weights and images are those of `weights.py`. It
was made with timm 1.0.31 and torch 2.14.1.
"""

from __future__ import annotations

import pathlib

import numpy as np

from tests.goldens import weights

WIDTH, HEADS, BLOCKS, SEED = 32, 2, 2, 5
SIZES = {"dinov2": ((28, 70), (532, 14)), "dinov3": ((48, 80), (128, 32))}


def arrays(kind: str) -> dict[str, np.ndarray]:
    """The weights by timm's names."""
    spec = weights.vit_spec(kind, width=WIDTH, blocks=BLOCKS)
    return weights.fill(spec, prefix=kind, seed=SEED)


def images(size: tuple[int, int]) -> np.ndarray:
    """Two images, [2, h, w, 3] in 0..1."""
    return weights.images(2, max(size), seed=SEED)[:, : size[0], : size[1]]


def main() -> None:
    """Writes the golden next to this script."""
    import timm
    import torch

    names = {"dinov2": "vit_small_patch14_dinov2", "dinov3": "vit_small_patch16_dinov3"}
    golden = {}
    for kind, name in names.items():
        model = timm.create_model(
            name,
            num_classes=0,
            embed_dim=WIDTH,
            num_heads=HEADS,
            depth=BLOCKS,
            dynamic_img_size=True,
        ).eval()
        model.load_state_dict({n: torch.tensor(a) for n, a in arrays(kind).items()})
        for size in SIZES[kind]:
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
            x = (torch.tensor(images(size)) - torch.tensor(mean)) / torch.tensor(std)
            with torch.no_grad():
                outputs = model.forward_intermediates(
                    x.permute(0, 3, 1, 2), norm=True, intermediates_only=True
                )
            for i, y in enumerate(outputs, start=1):
                key = f"{kind}/{size[0]}x{size[1]}/block{i}"
                golden[key] = y.permute(0, 2, 3, 1).numpy()
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **golden)


if __name__ == "__main__":
    main()
