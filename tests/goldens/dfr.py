"""Computes dfr.npz with PyTorch: `python -m tests.goldens.dfr`.

It holds what the published description of DFR gives on drawn levels and weights, see
`ulsad_jax/methods/dfr.py`: the regions' features, the map, the losses of Adam's steps,
and the first one's gradient and running statistics. It was made with torch 2.14.1.
"""

from __future__ import annotations

import itertools
import pathlib

import numpy as np

from tests.goldens import weights

SIZE, BATCH, LATENT, STEPS, SEED = (16, 24), 3, 2, 4, 6
LEVELS = {"layer1": (6, 8, 5), "layer2": (3, 4, 8)}
CHANNELS = 13
WIDTHS = (CHANNELS, 8, 4, 2, 4, 8, CHANNELS)
NORMALIZED = (1, 2, 4, 5)


def levels() -> dict[str, np.ndarray]:
    """Outputs of a trunk by name, [b, h, w, c]."""
    rng = np.random.default_rng(SEED)
    return {
        name: rng.standard_normal((BATCH, *shape), np.float32)
        for name, shape in LEVELS.items()
    }


def arrays() -> dict[str, np.ndarray]:
    """The autoencoder's arrays by name."""
    spec: weights.Spec = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS), 1):
        spec[f"conv{i}.weight"] = (outputs, inputs, 1, 1)
        spec[f"conv{i}.bias"] = (outputs,)
        if i in NORMALIZED:
            for name in ("weight", "bias", "running_mean", "running_var"):
                spec[f"bn{i}.{name}"] = (outputs,)
    return weights.fill(spec, prefix="dfr", seed=SEED)


def main() -> None:
    """Writes the golden next to this script."""
    import torch
    import torch.nn.functional as F

    state = {name: torch.tensor(a) for name, a in arrays().items()}
    trained = {n: a.requires_grad_() for n, a in state.items() if "running" not in n}

    def reconstruct(x, training):
        for i in range(1, len(WIDTHS)):
            x = F.conv2d(x, state[f"conv{i}.weight"], state[f"conv{i}.bias"])
            if i in NORMALIZED:
                names = ("running_mean", "running_var", "weight", "bias")
                values = (state[f"bn{i}.{name}"] for name in names)
                x = F.relu(F.batch_norm(x, *values, training=training))
        return x

    resized = [
        F.interpolate(
            torch.tensor(x).permute(0, 3, 1, 2),
            size=SIZE,
            mode="bilinear",
            align_corners=True,
        )
        for x in levels().values()
    ]
    x = torch.cat([F.avg_pool2d(y, 4, 4) for y in resized], 1)
    golden = {"regions": x.permute(0, 2, 3, 1).numpy()}
    with torch.no_grad():
        error = (x - reconstruct(x, training=False)).square().mean(1, keepdim=True)
        maps = F.interpolate(error, size=SIZE, mode="bilinear", align_corners=True)
    golden["map"], golden["validation"] = maps[:, 0].numpy(), error.mean().numpy()
    optimizer, losses = torch.optim.Adam(trained.values(), lr=1e-4), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.mse_loss(reconstruct(x, training=True), x)
        loss.backward()
        if not losses:
            golden |= {f"gradient/{n}": a.grad.numpy() for n, a in trained.items()}
            golden |= {n: a.numpy() for n, a in state.items() if "running" in n}
            golden = {n: a.copy() for n, a in golden.items()}
        optimizer.step()
        losses.append(loss.item())
    golden["losses"] = np.float32(losses)
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **golden)


if __name__ == "__main__":
    main()
