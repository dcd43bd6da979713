"""Makes the goldens of timm's trunks: `python tests/goldens/timm_trunks.py LITE0.pth`.

Needs torch and timm, in an environment of their own. `weights.py` fills the networks
and draws the images. The file is the published one of EfficientNet-Lite0, see
benchmarks/convert_efficientnet_lite.py; its arrays are in the order of timm's.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
SIZES = {  # of images, by timm's name
    "tf_efficientnet_lite0": ((64, 96), (160, 32)),
    "tf_efficientnet_lite2": ((32, 64),),
}
STRIDE = 5  # of the positions that are kept


def main(published: str) -> None:
    """Writes the outputs of EfficientNet-Lite, on weights of seed 0 and published."""
    import timm
    import torch

    sys.path.insert(0, str(HERE.parents[1]))
    from tests.goldens import weights

    def run(name, arrays, height, width):
        model = timm.create_model(name).eval()
        model.load_state_dict(arrays, strict=False)  # without the counts of batches
        image = weights.levels(height, width)
        x = (torch.tensor(image).float().permute(0, 3, 1, 2) - 127) / 128
        outputs = {}
        with torch.no_grad():
            x = model.bn1(model.conv_stem(x))
            for stage, blocks in enumerate(model.blocks[:5], start=1):
                x = blocks(x)
                outputs[f"stage{stage}"] = x[0, :, ::STRIDE, ::STRIDE].permute(1, 2, 0)
        return outputs

    found = {}
    for name, sizes in SIZES.items():
        state = timm.create_model(name).state_dict()
        spec = {n: tuple(v.shape) for n, v in state.items() if v.ndim}
        drawn = weights.fill(spec, prefix="trunk", seed=0)
        arrays = {n: torch.tensor(a) for n, a in drawn.items()}
        for size in sizes:
            for stage, value in run(name, arrays, *size).items():
                found[f"{name}/{size[0]}x{size[1]}/{stage}"] = value
    name, (size, *_) = next(iter(SIZES.items()))
    stored = torch.load(published, map_location="cpu", weights_only=True)
    names = timm.create_model(name).state_dict()
    arrays = dict(zip(names, stored.values(), strict=True))
    for stage, value in run(name, arrays, *size).items():
        found[f"published/{stage}"] = value
    np.savez_compressed(HERE / "efficientnet_lite.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
