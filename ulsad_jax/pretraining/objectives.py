"""What a trunk is pretrained for, on two views of each scene.

All objectives hold at each position of layer2 and of layer3:

- contrast: a position's features are closer to those of the same position in the other
  view, under other light and noise and a small shift, than to those of positions that
  show another texture, another shape or a defect (InfoNCE, van den Oord et al. 2018,
  over positions as in Wang et al., "Dense Contrastive Learning", CVPR 2021);
- novelty: a defect's features are farther from whatever the clean view shows than any
  sound position's are, so that what varies in a material stays near and what is
  foreign to it does not;
- defects: whether a position holds a defect, read by a linear head.

Contrast and novelty are taken on the features themselves, standardised by the batch
and without a head, as anomaly detection takes distances between these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ulsad_jax.models.layers import Conv, normalize_image
from ulsad_jax.models.resnet import ResNet
from ulsad_jax.pretraining.scenes import SHAPES
from ulsad_jax.pretraining.views import View

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

OBJECTIVES = ("contrast", "novelty", "defects")
STRIDES = (8, 16)  # of layer2 and layer3
SHARPNESS = 10.0  # of novelty: logits a unit of distance


class Layer(NamedTuple):
    """What a layer says of each of its positions.

    Attributes:
        features: [b, h, w, c].
        defect: [b, h, w], the logit of a defect.
    """

    features: jax.Array
    defect: jax.Array


class Pretrainer(nn.Module):
    """A trunk with a linear head for defects on layer2 and on layer3.

    Attributes:
        architecture: of the trunk, a key of `resnet.ARCHITECTURES`.
    """

    architecture: str

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"], *, train: bool
    ) -> tuple[Layer, Layer]:
        """Returns layer2 and layer3."""
        trunk = ResNet(self.architecture, name="trunk")
        return tuple(
            Layer(features, Conv(1, (1, 1), name=f"defects_{stride}")(features)[..., 0])
            for stride, features in zip(
                STRIDES, trunk(normalize_image(image), train=train), strict=True
            )
        )


def measure(
    layers: tuple[Layer, Layer], views: View, *, temperature: float
) -> dict[str, Float[Array, ""]]:
    """The objectives' losses, each the mean over layer2 and layer3.

    Args:
        layers: of the views.
        views: [2 * scenes, ...]: the clean view of every scene, then the other views.
        temperature: of the contrast.
    """
    losses: dict[str, list[jax.Array]] = {name: [] for name in OBJECTIVES}
    for layer, stride in zip(layers, STRIDES, strict=True):
        defect = _largest(views.defect, stride)
        label = _center(views.texture * SHAPES + views.shape, stride)
        cross_entropy = optax.sigmoid_binary_cross_entropy(layer.defect, defect)
        losses["defects"].append(cross_entropy.mean())
        features = _standardize(layer.features)
        losses["contrast"].append(
            contrast(features, label, defect > 0.5, temperature=temperature)
        )
        losses["novelty"].append(novelty(features, defect))
    return {name: sum(values) / len(values) for name, values in losses.items()}


def contrast(
    features: Float[Array, "2*n h w c"],
    label: Int[Array, "2*n h w"],
    is_defect: Bool[Array, "2*n h w"],
    *,
    temperature: float,
) -> Float[Array, ""]:
    """InfoNCE from the positions of the first n views to those of the others.

    Args:
        features: of every position, standardised.
        label: positions with the same label are not told apart.
        is_defect: positions that are like no other; they are never asked for.
        temperature: divides the cosines.
    """
    unit = features / (jnp.linalg.norm(features, axis=-1, keepdims=True) + 1e-6)
    first, second = jnp.split(unit.reshape(-1, unit.shape[-1]), 2)
    label_1, label_2 = jnp.split(label.ravel(), 2)
    sound = ~jnp.split(is_defect.ravel(), 2)[1]
    cosines = first @ second.T / temperature
    alike = (label_1[:, None] == label_2) & sound
    alike &= ~jnp.eye(len(label_1), dtype=bool)
    others = jax.nn.logsumexp(jnp.where(alike, -jnp.inf, cosines), axis=1)
    loss = others - jnp.diagonal(cosines)
    return (loss * sound).sum() / jnp.maximum(sound.sum(), 1)


def novelty(
    features: Float[Array, "2*n h w c"], defect: Float[Array, "2*n h w"]
) -> Float[Array, ""]:
    """Asks that a defect is what lies farthest from the clean view of its scene.

    A position's logit l is its distance to the nearest position of the clean view,
    ||b - a||^2 / c, times SHARPNESS. The loss is log(1 + sum of exp(l) over sound
    positions / mean of exp(l) over the defect's): the cross-entropy of finding one
    position of the defect among all sound ones.

    Args:
        features: of every position, standardised: the first n views, which have no
            defect, then the others of the same scenes.
        defect: the largest share of a pixel of the cell that a defect changed, 0..1.

    Returns:
        The mean over the scenes that have a defect, 0 if none has.
    """
    clean, other = jnp.split(features.reshape(len(features), -1, features.shape[-1]), 2)
    defect = jnp.split(defect.reshape(len(defect), -1), 2)[1]
    products = jnp.einsum("npc,nqc->npq", other, clean)
    distances = (
        jnp.square(other).sum(-1)[:, :, None]
        + jnp.square(clean).sum(-1)[:, None]
        - 2 * products
    )
    logits = SHARPNESS * distances.min(-1) / features.shape[-1]

    def log_sum(of: Bool[Array, "n p"]) -> Float[Array, " n"]:
        return jax.nn.logsumexp(jnp.where(of, logits, -1e9), axis=1)

    is_defect, is_sound = defect > 0.5, defect < 0.05
    log_mean = log_sum(is_defect) - jnp.log(jnp.maximum(is_defect.sum(1), 1))
    loss = jax.nn.softplus(log_sum(is_sound) - log_mean)
    asked = is_defect.any(1) & is_sound.any(1)
    return (loss * asked).sum() / jnp.maximum(asked.sum(), 1)


def _standardize(features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    centered = features - features.mean((0, 1, 2))
    deviation = jnp.sqrt(jnp.square(centered).mean((0, 1, 2)))
    return centered / (deviation + 1e-3)


def _center(x: Int[Array, "b h w"], stride: int) -> Int[Array, "b h/s w/s"]:
    return x[:, stride // 2 :: stride, stride // 2 :: stride]


def _largest(x: Float[Array, "b h w"], stride: int) -> Float[Array, "b h/s w/s"]:
    b, h, w = x.shape
    cells = x.reshape(b, h // stride, stride, w // stride, stride)
    return cells.max((2, 4))
