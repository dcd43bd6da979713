"""Deterministic weights and images for the parity goldens (NumPy only).

Every array depends on nothing but its name, its shape and `seed`, so that any
framework can rebuild the same network and be compared with the goldens in this
folder. Names and layouts are PyTorch's: convolutions are (out, in, kh, kw),
transposed convolutions are (in, out, kh, kw).
"""

from __future__ import annotations

import math
import zlib

import numpy as np

Spec = dict[str, tuple[int, ...]]


def _conv(spec: Spec, name: str, out: int, inp: int, k: int, *, bias: bool) -> None:
    spec[f"{name}.weight"] = (out, inp, k, k)
    if bias:
        spec[f"{name}.bias"] = (out,)


def _norm(spec: Spec, name: str, c: int, *, affine: bool = True) -> None:
    if affine:
        spec[f"{name}.weight"] = (c,)
        spec[f"{name}.bias"] = (c,)
    spec[f"{name}.running_mean"] = (c,)
    spec[f"{name}.running_var"] = (c,)


def resnet_spec(arch: str) -> Spec:
    """Shapes of a torchvision/timm ResNet up to and including `layer3`."""
    bottleneck, blocks, width = {
        "resnet18": (False, (2, 2, 2), 64),
        "resnet34": (False, (3, 4, 6), 64),
        "resnet50": (True, (3, 4, 6), 64),
        "wide_resnet50_2": (True, (3, 4, 6), 128),
        "wide_resnet101_2": (True, (3, 4, 23), 128),
    }[arch]
    spec: Spec = {}
    _conv(spec, "conv1", 64, 3, 7, bias=False)
    _norm(spec, "bn1", 64)
    c_in = 64
    for stage, n in enumerate(blocks, start=1):
        planes = 64 * 2 ** (stage - 1)
        mid = width * 2 ** (stage - 1)
        c_out = planes * 4 if bottleneck else planes
        for b in range(n):
            p = f"layer{stage}.{b}"
            if bottleneck:
                _conv(spec, f"{p}.conv1", mid, c_in, 1, bias=False)
                _norm(spec, f"{p}.bn1", mid)
                _conv(spec, f"{p}.conv2", mid, mid, 3, bias=False)
                _norm(spec, f"{p}.bn2", mid)
                _conv(spec, f"{p}.conv3", c_out, mid, 1, bias=False)
                _norm(spec, f"{p}.bn3", c_out)
            else:
                _conv(spec, f"{p}.conv1", c_out, c_in, 3, bias=False)
                _norm(spec, f"{p}.bn1", c_out)
                _conv(spec, f"{p}.conv2", c_out, c_out, 3, bias=False)
                _norm(spec, f"{p}.bn2", c_out)
            if b == 0 and (stage > 1 or c_in != c_out):
                _conv(spec, f"{p}.downsample.0", c_out, c_in, 1, bias=False)
                _norm(spec, f"{p}.downsample.1", c_out)
            c_in = c_out
    return spec


def local_spec() -> Spec:
    """The local reconstructor: 384 -> 768 channels, hidden width 1536."""
    spec: Spec = {}
    encoder = ((384, 768), (768, 1536), (1536, 1536))
    decoder = ((1536, 768, 4), (768, 384, 4), (384, 768, 5))
    for i, (inp, out) in enumerate(encoder, start=1):
        _conv(spec, f"conv{i}", out, inp, 3, bias=True)
        _norm(spec, f"bn{i}", out)
    for i, (inp, out, k) in enumerate(decoder, start=1):
        spec[f"deconv{i}.weight"] = (inp, out, k, k)
        spec[f"deconv{i}.bias"] = (out,)
        _norm(spec, f"bn{i + 3}", out)
    return spec


def global_spec() -> Spec:
    """The global autoencoder: image -> 64-d code -> 384 x 32 x 32."""
    spec: Spec = {}
    channels = (3, 32, 32, 64, 64, 64)
    for i in range(5):
        _conv(spec, f"enconv{i + 1}", channels[i + 1], channels[i], 4, bias=True)
        _norm(spec, f"bn2d{i + 1}", channels[i + 1], affine=False)
    _conv(spec, "enconv6", 64, 64, 8, bias=True)
    _norm(spec, "bn2d6", 64, affine=False)
    for i in range(5):
        _conv(spec, f"deconv{i + 1}", 64, 64, 4, bias=True)
        _norm(spec, f"bn2d{i + 7}", 64, affine=False)
    _conv(spec, "deconv7", 64, 64, 3, bias=True)
    _norm(spec, "bn2d12", 64, affine=False)
    _conv(spec, "deconv8", 384, 64, 3, bias=True)
    return spec


def vit_spec(kind: str, *, width: int, blocks: int) -> Spec:
    """timm's ViT of DINOv2 or DINOv3, without a head."""
    v2 = kind == "dinov2"
    scales = ("ls1.gamma", "ls2.gamma") if v2 else ("gamma_1", "gamma_2")
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", *scales)
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1)}
    linear |= {"mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    spec: Spec = {"cls_token": (1, 1, width)}
    spec |= {"pos_embed": (1, 1370, width)} if v2 else {"reg_token": (1, 4, width)}
    _conv(spec, "patch_embed.proj", width, 3, 14 if v2 else 16, bias=True)
    for b in range(blocks):
        for name, (out, inp) in linear.items():
            spec[f"blocks.{b}.{name}.weight"] = (out * width, inp * width)
            if v2 or name != "attn.qkv":
                spec[f"blocks.{b}.{name}.bias"] = (out * width,)
        for name in vectors:
            spec[f"blocks.{b}.{name}"] = (width,)
    return spec | {"norm.weight": (width,), "norm.bias": (width,)}


def fill(spec: Spec, *, prefix: str, seed: int) -> dict[str, np.ndarray]:
    """Arrays for `spec`; `prefix` keeps equal names of two networks apart."""
    out: dict[str, np.ndarray] = {}
    for name, shape in spec.items():
        rng = np.random.default_rng([seed, zlib.crc32(f"{prefix}/{name}".encode())])
        z = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) in (2, 4):
            fan_in = math.prod(shape[1:])
            if prefix == "local" and name.startswith("deconv"):
                # An output of a transposed convolution sees in * k*k / stride^2 inputs.
                stride = 1 if name.startswith("deconv3") else 2
                fan_in = shape[0] * shape[2] * shape[3] // stride**2
            z *= np.float32(np.sqrt(2.0 / fan_in))
        elif name.endswith("running_var"):
            z = 1.0 + 0.1 * np.abs(z)
        elif name.endswith(".weight") or "gamma" in name:
            z = 1.0 + 0.1 * z
        else:
            z = 0.1 * z
        out[name] = z.astype(np.float32)
    return out


def images(n: int, size: int, *, seed: int) -> np.ndarray:
    """`n` smooth random RGB images in [0, 1], NHWC float32."""
    rng = np.random.default_rng([seed, 7])
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    out = np.zeros((n, size, size, 3), np.float64)
    for i in range(n):
        for c in range(3):
            for _ in range(6):
                fy, fx = rng.uniform(0.5, 12, 2)
                phase = rng.uniform(0, 2 * np.pi)
                amplitude = rng.uniform(0.2, 1.0)
                wave = np.sin(2 * np.pi * (fy * y + fx * x) + phase)
                out[i, :, :, c] += amplitude * wave
        cy, cx, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.05, 0.2)
        disk = (y - cy) ** 2 + (x - cx) ** 2 < r**2
        out[i][disk] += rng.uniform(-3, 3, 3)
    out -= out.min(axis=(1, 2, 3), keepdims=True)
    out /= out.max(axis=(1, 2, 3), keepdims=True)
    return out.astype(np.float32)


def levels(height: int, width: int) -> np.ndarray:
    """The upper left of the first image of seed 0, uint8 [1, height, width, 3]."""
    image = images(1, max(height, width), seed=0)[:, :height, :width]
    return np.round(image * 255).astype(np.uint8)
