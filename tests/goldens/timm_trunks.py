"""Makes the goldens of trunks of timm: `python tests/goldens/timm_trunks.py`.

Needs torch and timm, in an environment of their own. `weights.py` fills the networks
and draws the images.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
SIZES = {  # of images, by timm's name
    "tf_efficientnet_lite0": ((64, 96), (160, 32)),
    "tf_efficientnet_lite1": ((32, 64),),
    "tf_efficientnet_lite2": ((32, 64),),
}
STRIDE = 5  # of the positions that are kept


def main() -> None:
    """Writes the outputs of the stages of EfficientNet-Lite, on weights of seed 0."""
    import timm
    import torch

    sys.path.insert(0, str(HERE.parents[1]))
    from tests.goldens import weights

    found = {}
    for name, sizes in SIZES.items():
        model = timm.create_model(name).eval()
        state = model.state_dict()
        spec = {n: tuple(v.shape) for n, v in state.items() if v.ndim}
        arrays = weights.fill(spec, prefix="trunk", seed=0)
        model.load_state_dict({n: torch.tensor(a) for n, a in arrays.items()}, False)
        for height, width in sizes:
            image = weights.images(1, max(height, width), seed=0)[:, :height, :width]
            x = torch.tensor((image * 255 - 127) / 128).permute(0, 3, 1, 2)
            with torch.no_grad():
                x = model.bn1(model.conv_stem(x))
                for stage, blocks in enumerate(model.blocks[:5], start=1):
                    x = blocks(x)
                    kept = x.permute(0, 2, 3, 1).numpy()[0, ::STRIDE, ::STRIDE]
                    found[f"{name}/{height}x{width}/stage{stage}"] = kept
    np.savez_compressed(HERE / "efficientnet_lite.npz", **found)


if __name__ == "__main__":
    main()
