"""Implements DRAEM: drawn defects are repaired, and found by the difference.

Zavrtanik, Kristan & Skočaj, "DRÆM - A Discriminatively Trained Reconstruction Embedding
for Surface Anomaly Detection", ICCV 2021, arXiv 2108.07610. Losses and schedule are
those of the authors' program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ulsad_jax.methods import descent
from ulsad_jax.methods.base import IMAGES, TOTAL, Batch, Method, Spec, State
from ulsad_jax.methods.draem.defects import draw_defects
from ulsad_jax.methods.draem.networks import Networks
from ulsad_jax.nn.layers import multiply
from ulsad_jax.runtime.rules import POSITIVE, Rule, at_least

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# From these shares of the updates on, the rate is multiplied once more.
MILESTONES, SLOWER = (0.8, 0.9), 0.2
WINDOW, SIGMA = 11, 1.5  # of the structural similarity, in pixels
STABLE_MEAN, STABLE_VARIANCE = 0.01**2, 0.03**2  # its constants, for images in 0..1
FOCUS = 2  # exponent of the focal loss
SMOOTH = 1e-5  # share by which it mistrusts the mask


@dataclasses.dataclass(frozen=True)
class Draem(Method):
    """DRAEM: the map is the probability that a pixel is defective.

    Attributes:
        repair_width: number of channels, at the images' size, of the network that
            repairs.
        segment_width: that of the network that finds defects.
        learning_rate: Adam's.
    """

    takes: ClassVar[str] = IMAGES
    published_epochs: ClassVar[float | None] = 700
    rules: ClassVar[Mapping[str, Rule]] = {
        "methods.draem.repair_width": at_least(1),
        "methods.draem.segment_width": at_least(1),
        "methods.draem.learning_rate": POSITIVE,
    }

    repair_width: int = 128
    segment_width: int = 64
    learning_rate: float = 1e-4

    @functools.cached_property
    def network(self) -> Networks:
        """Both networks."""
        dtype = jnp.dtype(self.dtype)
        return Networks(self.repair_width, self.segment_width, dtype, self.axis_name)

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Draws the initial weights, and notes how many updates there will be.

        Training that goes on for longer keeps that number.
        """
        optimizer = optax.adam(self.learning_rate)
        state = descent.init(self.network, optimizer, key, _shape(spec), train=True)
        planned = jnp.asarray(spec.num_updates, jnp.int32)
        training = {"adam": state.training, "planned": planned}
        return state.replace(training=training)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes one step of Adam on images with drawn defects."""
        image = _scale(batch)
        keys = jax.random.split(key, len(image))
        return self.learn(state, image, *draw_defects(image, keys))

    def learn(
        self,
        state: State,
        image: Float[Array, "b h w 3"],
        defective: Float[Array, "b h w 3"],
        mask: Float[Array, "b h w"],
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes one step of Adam.

        Args:
            state: state before the update.
            image: images in 0..1.
            defective: the same with defects.
            mask: 1 where there is one, else 0.
        """
        planned = state.training["planned"]

        def loss_fn(outputs):
            terms = measure(image, mask, *outputs)
            means = {name: x.mean() for name, x in terms.items()}
            return sum(means.values()), means

        passed = sum((state.step >= share * planned) for share in MILESTONES)
        new, losses = descent.step(
            self.network,
            optax.adam(self.learning_rate * SLOWER**passed),
            loss_fn,
            state.replace(training=state.training["adam"]),
            self.axis_name,
            defective,
            train=True,
        )
        training = {"adam": new.training, "planned": planned}
        return new.replace(training=training), losses

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns the losses in inference mode.

        Each image has a defect of its own, the same at every step.
        """
        del step
        image = _scale(batch)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch.index)
        defective, mask = draw_defects(image, keys)
        terms = measure(image, mask, *self.network.apply(model, defective, train=False))
        means = {name: x.mean(where=batch.valid) for name, x in terms.items()}
        return {TOTAL: sum(means.values()), **means}

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the map `defect`: the probability that a pixel is defective."""
        _, logits = self.network.apply(model, _scale(batch), train=False)
        return {"defect": jax.nn.softmax(logits)[..., 1]}

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory of a step, see `descent.estimate_bytes`."""
        return descent.estimate_bytes(self.network, _shape(spec), train=True)


METHODS = {"draem": Draem}


def measure(
    image: Float[Array, "b h w 3"],
    mask: Float[Array, "b h w"],
    repaired: Float[Array, "b h w 3"],
    logits: Float[Array, "b h w 2"],
) -> dict[str, Float[Array, " b"]]:
    """Returns the loss terms of each image, which are added up.

    Args:
        image: images without defects, in 0..1.
        mask: 1 where the defects were drawn, else 0.
        repaired: see `Networks`.
        logits: see `Networks`.
    """
    return {
        "square": jnp.square(repaired - image).mean((1, 2, 3)),
        "structure": 1 - compare_structure(repaired, image).mean((1, 2, 3)),
        "focal": measure_focal(logits, mask).mean((1, 2)),
    }


def compare_structure(
    x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Returns the structural similarity of images in 0..1, with zeros around them.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural
    Similarity", IEEE Transactions on Image Processing 2004, equation 13.
    """
    moments = [x, y, x * x, y * y, x * y]
    blurred = jnp.concatenate(moments, axis=-1)
    for axis in (1, 2):
        blurred = multiply(_blur_matrix(blurred.shape[axis]), blurred, axis)
    x, y, xx, yy, xy = jnp.split(blurred, len(moments), axis=-1)
    covariance, variances = xy - x * y, xx - x * x + yy - y * y
    similar = (2 * x * y + STABLE_MEAN) * (2 * covariance + STABLE_VARIANCE)
    return similar / ((x * x + y * y + STABLE_MEAN) * (variances + STABLE_VARIANCE))


def measure_focal(
    logits: Float[Array, "b h w 2"], mask: Float[Array, "b h w"]
) -> Float[Array, "b h w"]:
    """Returns the focal loss of every pixel (Lin et al., ICCV 2017).

    Both classes count alike.

    Args:
        logits: logits of "normal" and "defective".
        mask: 1 on defective pixels, else 0.
    """
    normal, defective = jnp.moveaxis(jax.nn.softmax(logits), -1, 0)
    right = jnp.where(mask > 0, defective, normal)
    right = (1 - SMOOTH) * right + SMOOTH * (1 - right) + SMOOTH
    return -((1 - right) ** FOCUS) * jnp.log(right)


def _scale(batch: Batch) -> Float[Array, "b h w 3"]:
    return batch.image / jnp.float32(255)


def _shape(spec: Spec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.batch.image.shape, jnp.float32)


@functools.cache
def _blur_matrix(size: int) -> Float[np.ndarray, "n n"]:
    offsets = np.arange(size) - np.arange(size)[:, None]
    kernel = np.exp(-0.5 * (np.arange(WINDOW) - WINDOW // 2) ** 2 / SIGMA**2)
    inside = np.exp(-0.5 * (offsets / SIGMA) ** 2) / kernel.sum()
    return np.where(np.abs(offsets) <= WINDOW // 2, inside, 0)
