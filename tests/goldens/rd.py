"""Computes rd.npz with anomalib and PyTorch: `python -m tests.goldens.rd`.

It holds what anomalib's bottleneck and decoder make of drawn levels and weights: parts
of the decoded levels and of the map, the loss, and norms of its gradient. The cases are
students with the blocks and channels of a resnet18 and of a resnet50, but fewer blocks.
It was made with anomalib 2.7.0 and torch 2.14.1.
"""

from __future__ import annotations

import pathlib
import zlib

import numpy as np

SIZE, BATCH, SEED, STRIDE = 64, 2, 7, 4
# By case: bottleneck blocks or basic ones, blocks of a level, width of a bottleneck.
CASES = {
    "basic": (False, (2, 1, 1), 64),
    "bottleneck": (True, (1, 1, 1), 32),
}
UNUSED = ("bottleneck.conv4.", "bottleneck.bn4.")  # layers that anomalib never runs


def levels(case: str) -> list[np.ndarray]:
    """Outputs of a ResNet from layer1 to layer3, [b, h, w, c]."""
    rng = np.random.default_rng(SEED)
    channels = 256 if CASES[case][0] else 64
    shapes = [(SIZE // 4 // n, SIZE // 4 // n, channels * n) for n in (1, 2, 4)]
    drawn = [rng.standard_normal((BATCH, *s), np.float32) for s in shapes]
    return [np.maximum(x, 0) for x in drawn]


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of the student, by its name and shape in PyTorch.

    Few numbers are drawn and repeated: arrays of millions are needed at once.
    """
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    z = np.resize(rng.standard_normal(10007, np.float32), shape)
    if len(shape) == 4:
        transposed = shape[2] == 2
        fan_in = shape[0] if transposed else shape[1] * shape[2] * shape[3]
        return z * np.float32(np.sqrt(2.0 / fan_in))
    if name.endswith("running_var"):
        return 1 + np.abs(z) / 10
    return 1 + z / 10 if name.endswith("weight") else z / 10


def main() -> None:
    """Writes the golden next to this script."""
    import torch
    from anomalib.models.components.backbone.resnet_decoder import (
        DecoderBasicBlock,
        DecoderBottleneck,
        ResNetDecoder,
    )
    from anomalib.models.image.reverse_distillation import anomaly_map, loss
    from anomalib.models.image.reverse_distillation.components import bottleneck
    from torchvision.models import resnet

    golden = {}
    for case, (is_bottleneck, blocks, width) in CASES.items():
        kind = resnet.Bottleneck if is_bottleneck else resnet.BasicBlock
        mirrored = DecoderBottleneck if is_bottleneck else DecoderBasicBlock
        student = torch.nn.ModuleDict(
            {
                "bottleneck": bottleneck.OCBE(kind, blocks[0], width_per_group=width),
                "decoder": ResNetDecoder(mirrored, blocks, width_per_group=width),
            }
        )
        shapes = {n: a.shape for n, a in student.state_dict().items() if a.ndim}
        student.load_state_dict(
            {n: torch.tensor(fill(n, tuple(s))) for n, s in shapes.items()},
            strict=False,  # without the counts of batches
        )
        teacher = [torch.tensor(x).permute(0, 3, 1, 2) for x in levels(case)]

        def run(student=student, teacher=teacher):
            return student["decoder"](student["bottleneck"](teacher))

        maps = anomaly_map.AnomalyMapGenerator((SIZE, SIZE), mode="add")
        with torch.no_grad():
            decoded = run(student.eval())
            found = maps(teacher, decoded)[:, 0]
        golden[f"{case}/map"] = found[:, ::STRIDE, ::STRIDE].numpy()
        for i, x in enumerate(decoded, start=1):
            part = x[:, :: 8 * STRIDE, ::STRIDE, ::STRIDE]
            golden[f"{case}/level{i}"] = part.permute(0, 2, 3, 1).numpy()
        pairs = teacher, run(student.train())
        total = loss.ReverseDistillationLoss()(
            *([x.contiguous() for x in tensors] for tensors in pairs)
        )
        total.backward()
        golden[f"{case}/loss"] = total.detach().numpy()
        norms = {
            n: a.grad.norm().item()
            for n, a in student.named_parameters()
            if not n.startswith(UNUSED)
        }
        golden[f"{case}/names"] = np.array(list(norms))
        golden[f"{case}/norms"] = np.float32(list(norms.values()))
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **golden)


if __name__ == "__main__":
    main()
