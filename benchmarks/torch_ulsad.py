"""ULSAD in plain PyTorch: what `benchmarks/speed.py` compares with.

Written from the paper and the published description, as one writes PyTorch: eager
modules, NCHW, `torch.optim.Adam`. Names are those that
`ulsad_jax.trunks.torch_names` knows, so that both compute on the same weights.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ulsad_jax.methods.ulsad.autoencoder import decoder_sizes
from ulsad_jax.nn.layers import IMAGENET_MEAN, IMAGENET_STD
from ulsad_jax.scoring.calibration import BLUR_RADIUS, BLUR_SIGMA

CHANNELS = 384


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, added to the input or to a projection of it."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int):
        """Makes the layers; the stride is the 3 x 3's."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if inputs != outputs or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's output."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Trunk(nn.Module):
    """WideResNet-50-2 up to layer3."""

    def __init__(self):
        """Makes the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, count in enumerate((3, 4, 6)):
            width, outputs = 128 * 2**stage, 256 * 2**stage
            blocks = []
            for i in range(count):
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(Bottleneck(inputs, width, outputs, stride))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From normalised images [b, 3, h, w] to features [b, 384, h/8, w/8]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer1(F.max_pool2d(x, 3, 2, 1))
        layer2 = self.layer2(x)
        layer3 = resize(self.layer3(layer2), layer2.shape[2:])
        x = torch.cat([layer2, layer3], 1)
        b, c, h, w = x.shape
        return x.view(b, CHANNELS, c // CHANNELS, h, w).mean(2)


class LocalReconstructor(nn.Module):
    """Features to their reconstruction and the prediction of the global output."""

    def __init__(self):
        """Makes the layers of the published width."""
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, 768, 3, 2, 1)
        self.conv2 = nn.Conv2d(768, 1536, 3, 2, 1)
        self.conv3 = nn.Conv2d(1536, 1536, 3, 1, 1)
        self.deconv1 = nn.ConvTranspose2d(1536, 768, 4, 2, 1)
        self.deconv2 = nn.ConvTranspose2d(768, CHANNELS, 4, 2, 1)
        self.deconv3 = nn.ConvTranspose2d(CHANNELS, 2 * CHANNELS, 5, 1, 2)
        for i, width in enumerate((768, 1536, 1536, 768, CHANNELS, 2 * CHANNELS)):
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [b, 384, h, w] to [b, 768, h, w]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x = F.relu(self.bn4(self.deconv1(x)))
        x = F.relu(self.bn5(self.deconv2(x)))
        return F.relu(self.bn6(self.deconv3(x)))


class GlobalAutoencoder(nn.Module):
    """A normalised image to features, through one 64-d vector."""

    def __init__(self, size: int):
        """Makes the layers for square images of `size` pixels a side."""
        super().__init__()
        *self.sizes, self.last = decoder_sizes(size)
        inputs = 3
        for i, width in enumerate((32, 32, 64, 64, 64), start=1):
            setattr(self, f"enconv{i}", nn.Conv2d(inputs, width, 4, 2, 1))
            inputs = width
        self.enconv6 = nn.Conv2d(64, 64, size // 32)
        for i in range(1, 6):
            setattr(self, f"deconv{i}", nn.Conv2d(64, 64, 4, 1, 2))
        self.deconv7 = nn.Conv2d(64, 64, 3, 1, 1)
        self.deconv8 = nn.Conv2d(64, CHANNELS, 3, 1, 1)
        for i in range(1, 13):
            width = 32 if i < 3 else 64
            norm = nn.BatchNorm2d(width, eps=1e-4, affine=False)
            setattr(self, f"bn2d{i}", norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [b, 3, h, w] to [b, 384, h/8, w/8]."""
        for i in range(1, 7):
            x = getattr(self, f"enconv{i}")(x)
            x = F.relu(getattr(self, f"bn2d{i}")(x))
        for i, size in enumerate(self.sizes, start=1):
            x = getattr(self, f"deconv{i}")(resize(x, (size, size)))
            x = F.relu(getattr(self, f"bn2d{i + 6}")(x))
        x = self.deconv7(resize(x, (self.last, self.last)))
        return self.deconv8(F.relu(self.bn2d12(x)))


class Ulsad(nn.Module):
    """Trunk, channel statistics, both networks, and the maps' constants."""

    def __init__(self, size: int):
        """Makes everything for square images of `size` pixels a side."""
        super().__init__()
        self.trunk = Trunk().eval().requires_grad_(False)
        self.local = LocalReconstructor()
        self.global_ = GlobalAutoencoder(size)
        offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
        kernel = torch.exp(-0.5 * (offsets / BLUR_SIGMA) ** 2)
        for name, values in {
            "image_mean": torch.tensor(IMAGENET_MEAN).view(3, 1, 1),
            "image_std": torch.tensor(IMAGENET_STD).view(3, 1, 1),
            "mean": torch.zeros(CHANNELS, 1, 1),
            "std": torch.ones(CHANNELS, 1, 1),
            "blur": (kernel / kernel.sum()).expand(2, 1, 1, -1).clone(),
            "offset": torch.zeros(2, 1, 1),  # calibration of local and global map
            "scale": torch.ones(2, 1, 1),
        }.items():
            self.register_buffer(name, values)

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """From uint8 [b, 3, h, w] to standardised floats."""
        return (image.float() / 255 - self.image_mean) / self.image_std

    @torch.no_grad()
    def extract(self, normalized: torch.Tensor) -> torch.Tensor:
        """Standardised features of a normalised image."""
        return (self.trunk(normalized).float() - self.mean) / self.std

    def losses(self, features: torch.Tensor, normalized: torch.Tensor):
        """Local, attention and consistency loss."""
        local, g = self.local(features).float(), self.global_(normalized).float()
        r, p = local[:, :CHANNELS], local[:, CHANNELS:]
        with torch.no_grad():
            target = attention(features, features)
        attended = attention(g, features)
        return torch.stack(
            [
                distance(features, r).mean(),
                distance(target, attended, dim=2).mean(),
                distance(g, p).mean(),
            ]
        )

    def predict(self, image: torch.Tensor) -> torch.Tensor:
        """From uint8 images [b, 3, h, w] to fused maps [b, h, w]."""
        normalized = self.normalize(image)
        x = self.extract(normalized)
        local, g = self.local(x).float(), self.global_(normalized).float()
        r, p = local[:, :CHANNELS], local[:, CHANNELS:]
        maps = torch.stack([distance(x, r), distance(g, p)], 1)
        maps = resize(maps, image.shape[2:])
        maps = F.pad(maps, (BLUR_RADIUS,) * 4, mode="reflect")
        maps = F.conv2d(maps, self.blur, groups=2)
        maps = F.conv2d(maps, self.blur.transpose(2, 3), groups=2)
        return ((maps - self.offset) * self.scale).mean(1)

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes PyTorch-named arrays; every one has to fit and none may be missing."""
        state = {k: torch.from_numpy(v.copy()) for k, v in arrays.items()}
        result = self.load_state_dict(state, strict=False)
        missing = [k for k in result.missing_keys if "num_batches_tracked" not in k]
        constants = {"image_mean", "image_std", "blur"}
        if result.unexpected_keys or set(missing) - constants:
            raise ValueError(f"Expected the arrays of {type(self)}, found {result}.")


def make_optimizer(model: Ulsad) -> torch.optim.Adam:
    """The published optimizer of both networks."""
    parameters = [*model.local.parameters(), *model.global_.parameters()]
    return torch.optim.Adam(parameters, lr=2e-4, weight_decay=2e-5)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, at half-pixel centres."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def distance(a: torch.Tensor, b: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """The published distance: mean (a - b)^2 + 0.5 (1 - cos(a, b)) over `dim`."""
    cosine = F.cosine_similarity(a, b, dim=dim, eps=1e-8)
    return (a - b).square().mean(dim) + 0.5 * (1 - cosine)


def attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(384)) k: [b, 384, h, w] twice, to [b, h * w, 384]."""
    q, k = (x.flatten(2).transpose(1, 2) for x in (queries, keys))
    return F.scaled_dot_product_attention(q, k, k)
