"""What a trunk is pretrained for, on two sound views of each scene and a defective one.

At each position of layer2 and of layer3:

- contrast: a position's features are closer to those of the same position in the last
  view, under other light and noise and a small shift, than to those of positions that
  show another texture, another shape or a defect (InfoNCE, van den Oord et al. 2018,
  over positions as in Wang et al., "Dense Contrastive Learning", CVPR 2021). It is
  taken on the standardised features themselves, without a head, as anomaly detection
  takes distances between these;
- defects: whether a position holds a defect, read by a linear head.

On both layers together, as the feature pyramid gives them:

- novelty: the most anomalous position of a scene's views is a defect. This is what
  ULSAD's local map has to say, with reconstructions that stand for those of its network
  before and after training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ulsad_jax.models.layers import Conv, normalize_image, resize
from ulsad_jax.models.resnet import ResNet
from ulsad_jax.pretraining.scenes import SHAPES
from ulsad_jax.pretraining.views import VIEWS, View

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

OBJECTIVES = ("contrast", "defects", "novelty")
STRIDES = (8, 16)  # of layer2 and layer3
# Of novelty: how much of a sound view's features the reconstruction of another has.
LEARNED = (0.0, 1.0)
SHARPNESS = 3.0  # power of an error, by which the largest one stands out
OWN_VARIANCE = 0.9  # share of the scene's own variance in standardisation


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
    """The objectives' losses; contrast and defects are means over layer2 and layer3.

    Args:
        layers: of the views.
        views: [3 * scenes, ...]: the first view of every scene, the second, the last.
        temperature: of the contrast.
    """
    losses: dict[str, list[jax.Array]] = {"contrast": [], "defects": []}
    for layer, stride in zip(layers, STRIDES, strict=True):
        defect = _largest(views.defect, stride)
        label = _center(views.texture * SHAPES + views.shape, stride)
        cross_entropy = optax.sigmoid_binary_cross_entropy(layer.defect, defect)
        losses["defects"].append(cross_entropy.mean())
        losses["contrast"].append(
            contrast(layer.features, label, defect > 0.5, temperature=temperature)
        )
    layer2, layer3 = (layer.features for layer in layers)
    features = jnp.concatenate([layer2, resize(layer3, layer2.shape[1:3])], -1)
    losses["novelty"] = [novelty(features, _largest(views.defect, STRIDES[0]))]
    return {name: sum(values) / len(values) for name, values in losses.items()}


def contrast(
    features: Float[Array, "3*n h w c"],
    label: Int[Array, "3*n h w"],
    is_defect: Bool[Array, "3*n h w"],
    *,
    temperature: float,
) -> Float[Array, ""]:
    """InfoNCE from the positions of the first n views to those of the last n.

    Args:
        features: of every position; standardised here by the batch.
        label: positions with the same label are not told apart.
        is_defect: positions that are like no other; they are never asked for.
        temperature: divides the cosines.
    """
    centered = features - features.mean((0, 1, 2))
    scaled = centered / (jnp.sqrt(jnp.square(centered).mean((0, 1, 2))) + 1e-3)
    unit = scaled / (jnp.linalg.norm(scaled, axis=-1, keepdims=True) + 1e-6)
    first, _, last = jnp.split(unit.reshape(-1, unit.shape[-1]), VIEWS)
    label_first, _, label_last = jnp.split(label.ravel(), VIEWS)
    sound = ~jnp.split(is_defect.ravel(), VIEWS)[-1]
    cosines = first @ last.T / temperature
    alike = (label_first[:, None] == label_last) & sound
    alike &= ~jnp.eye(len(label_first), dtype=bool)
    others = jax.nn.logsumexp(jnp.where(alike, -jnp.inf, cosines), axis=1)
    loss = others - jnp.diagonal(cosines)
    return (loss * sound).sum() / jnp.maximum(sound.sum(), 1)


def novelty(
    features: Float[Array, "3*n h w c"], defect: Float[Array, "3*n h w"]
) -> Float[Array, ""]:
    """How surely the largest reconstruction error of a scene is at its defect.

    Features are standardised by the scene's sound views, as ULSAD's are by a category's
    training images. Their reconstruction is `LEARNED` times those of the first view at
    the same place, without the negative half, which ULSAD's network cannot make.

    Args:
        features: of every position.
        defect: in 0..1; scenes without one count for nothing, positions beside one are
            neither.

    Returns:
        The mean of -log(share of the defect in the sum of errors ** SHARPNESS over the
        second and the last view).
    """
    first, second, last = jnp.split(features, VIEWS)
    sound = jnp.concatenate([first, second], 1)
    mean, variance = (f((1, 2), keepdims=True) for f in (sound.mean, sound.var))
    variance = OWN_VARIANCE * variance + (1 - OWN_VARIANCE) * features.var((0, 1, 2))
    first, second, last = (
        (x - mean) / jnp.sqrt(variance + 1e-6) for x in (first, second, last)
    )
    defect = jnp.split(defect, VIEWS)[-1]
    near = nn.max_pool(defect[..., None], (3, 3), padding="SAME")[..., 0]
    is_defect, is_sound = defect > 0.5, near < 0.05
    is_defect = jnp.concatenate([jnp.zeros_like(is_defect), is_defect], 1)
    is_sound = jnp.concatenate([jnp.ones_like(is_sound), is_sound], 1)
    losses = []
    for learned in LEARNED:
        reconstruction = learned * jnp.maximum(first, 0)
        errors = [
            _smooth(jnp.square(x - reconstruction).mean(-1)) for x in (second, last)
        ]
        logits = SHARPNESS * jnp.log(jnp.concatenate(errors, 1) + 1e-4)

        def total(where, logits=logits):
            return jax.nn.logsumexp(jnp.where(where, logits, -1e9), (1, 2))

        losses.append(jax.nn.softplus(total(is_sound) - total(is_defect)))
    has_defect = is_defect.any((1, 2))
    loss = sum(losses) / len(losses)
    return (loss * has_defect).sum() / jnp.maximum(has_defect.sum(), 1)


def _smooth(x: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    """Averages over neighbours with weights 1, 2, 1, as a map's blur does."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4


def _center(x: Int[Array, "b h w"], stride: int) -> Int[Array, "b h/s w/s"]:
    return x[:, stride // 2 :: stride, stride // 2 :: stride]


def _largest(x: Float[Array, "b h w"], stride: int) -> Float[Array, "b h/s w/s"]:
    b, h, w = x.shape
    cells = x.reshape(b, h // stride, stride, w // stride, stride)
    return cells.max((2, 4))
