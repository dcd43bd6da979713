"""Implements EfficientAD: a student and an autoencoder imitate a small teacher.

Batzner, Heckler & König, "EfficientAD: Accurate Visual Anomaly Detection at
Millisecond-Level Latencies", WACV 2024, arXiv 2303.14535. No pretrained teacher is at
hand: the first part of the updates distils one from the trunk's features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from ulsad_jax.methods import descent
from ulsad_jax.methods.base import TOTAL, Batch, Method, Spec, State, count_bytes
from ulsad_jax.methods.efficientad.networks import BORDER, SIZES, Learners, Pdn
from ulsad_jax.nn.layers import resize
from ulsad_jax.runtime.rules import NOT_NEGATIVE, POSITIVE, SHARE, Rule, one_of

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from ulsad_jax.methods.efficientad.networks import Description

HARD_QUANTILE = 0.999  # of an image's squared differences; the others teach nothing
STRENGTH = 0.2  # largest relative change of brightness, contrast or saturation
GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue
LATE, SLOWER = 0.95, 0.1  # from this share of the updates on, the rate is multiplied
# A teacher's channel with a smaller deviation has learned nothing: its targets, the
# standardised features, have a deviation of 1.
LEAST_STD = 0.01


@dataclasses.dataclass(frozen=True)
class EfficientAd(Method):
    """EfficientAD: the maps are squared differences of descriptions.

    Attributes:
        size: size of teacher and student, "small" or "medium".
        distill_share: share of the updates that train the teacher, one at least.
        learning_rate: Adam's.
        weight_decay: factor of the L2 decay that is added to the gradient.
    """

    # The teacher's in the paper, and those of student and autoencoder.
    published_updates: ClassVar[float | None] = 60_000 + 70_000
    rules: ClassVar[Mapping[str, Rule]] = {
        "methods.efficientad.size": one_of(*SIZES),
        "methods.efficientad.distill_share": SHARE,
        "methods.efficientad.learning_rate": POSITIVE,
        "methods.efficientad.weight_decay": NOT_NEGATIVE,
    }

    size: str = "small"
    distill_share: float = 0.5
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Draws the initial weights, and plans the two parts of the updates.

        Training that goes on for longer keeps the plan.
        """
        channels, image = spec.batch.features.shape[-1], spec.batch.image
        optimizer = self._make_optimizer(self.learning_rate)
        keys = jax.random.split(key)
        teacher = descent.init(self._make_teacher(channels), optimizer, keys[0], image)
        learners = descent.init(
            self._make_learners(channels), optimizer, keys[1], image, image, train=True
        )
        distilling = max(1, int(self.distill_share * spec.num_updates))
        moments = {"mean": jnp.zeros(channels), "square": jnp.ones(channels)}
        model = {"teacher": teacher.model, "learners": learners.model, **moments}
        training = {
            "teacher": teacher.training,
            "learners": learners.training,
            "distilling": jnp.asarray(distilling, jnp.int32),
            "learning": jnp.asarray(spec.num_updates - distilling, jnp.int32),
        }
        return State(teacher.step, model, training)

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Takes one step of Adam: of the teacher, or of student and autoencoder."""
        distilling = state.step < state.training["distilling"]
        return jax.lax.cond(distilling, self._distill, self._learn, state, batch, key)

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns the losses on unchanged images; `TOTAL` leaves out the teacher's.

        So checkpoints of both parts rank alike: a student that has not learned yet is
        as far from the standardised teacher as can be.
        """
        del step
        raw, *outputs = self.describe(model, batch)
        teacher = standardize(model, raw)
        terms = measure(teacher, teacher, *outputs)
        terms["distillation"] = _mean_square(place_features(batch), raw)
        means = {k: x.mean(where=batch.valid) for k, x in terms.items()}
        return {TOTAL: sum(means[k] for k in terms if k != "distillation"), **means}

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the maps `student` (local defects) and `autoencoder` (logical ones).

        `student` is the mean squared difference between the teacher's description and
        the student's, `autoencoder` that between the autoencoder's and the student's.
        """
        raw, imitation, prediction, decoded = self.describe(model, batch)
        pairs = {
            "student": (standardize(model, raw), imitation),
            "autoencoder": (decoded, prediction),
        }
        border = ((0, 0), (BORDER, BORDER), (BORDER, BORDER), (0, 0))
        found = {}
        for name, (x, y) in pairs.items():
            grid = jnp.square(x - y).mean(-1, keepdims=True)
            padded = jnp.pad(grid, border)
            found[name] = resize(padded, batch.image.shape[1:3])[..., 0]
        return found

    def describe(self, model: Any, batch: Batch) -> tuple[Description, ...]:
        """Returns the teacher's description and `Learners`' outputs, for inference."""
        channels = model["mean"].size
        teacher = self._make_teacher(channels)
        raw = teacher.apply(model["teacher"], batch.image)
        learners = self._make_learners(channels)
        return raw, *learners.apply(model["learners"], batch.image, train=False)

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory of a step, see `descent.estimate_bytes`."""
        channels, image = spec.batch.features.shape[-1], spec.batch.image
        teacher, learners = self._make_teacher(channels), self._make_learners(channels)
        return (
            descent.estimate_bytes(teacher, image)
            + descent.estimate_bytes(learners, image, image, train=True)
            + 2 * count_bytes(spec.batch.features)
        )

    def _distill(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Trains the teacher to describe patches by the trunk's features."""
        del key
        target = place_features(batch)

        def loss_fn(raw):
            loss = _mean_square(target, raw).mean()
            return loss, _fill({"distillation": loss}) | measure_moments(raw)

        new, losses = descent.step(
            self._make_teacher(target.shape[-1]),
            self._make_optimizer(self.learning_rate),
            loss_fn,
            State(state.step, state.model["teacher"], state.training["teacher"]),
            self.axis_name,
            batch.image,
        )
        moments = {name: losses.pop(name) for name in ("mean", "square")}
        model = state.model | {"teacher": new.model} | moments
        training = state.training | {"teacher": new.training}
        return State(new.step, model, training), losses

    def _learn(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Trains the student and the autoencoder to describe as the teacher does."""
        model, training = state.model, state.training
        done = state.step - training["distilling"]
        change_key, dropout_key = jax.random.split(key)
        image = batch.image / jnp.float32(255)
        changed = change_colours(image, change_key)
        teacher = self._make_teacher(model["mean"].size)
        raw, other = (teacher.apply(model["teacher"], x) for x in (image, changed))
        moments = measure_moments(raw)
        if self.axis_name is not None:
            moments = jax.lax.pmean(moments, self.axis_name)
        for name, own in moments.items():  # the mean over all batches so far
            moments[name] = model[name] + (own - model[name]) / (done + 1)
        targets = (standardize(moments, x) for x in (raw, other))

        def loss_fn(outputs, targets=tuple(targets)):
            terms = {k: x.mean() for k, x in measure(*targets, *outputs).items()}
            return sum(terms.values()), _fill(terms)

        late = done >= LATE * training["learning"]
        new, losses = descent.step(
            self._make_learners(model["mean"].size),
            self._make_optimizer(self.learning_rate * jnp.where(late, SLOWER, 1.0)),
            loss_fn,
            State(state.step, model["learners"], training["learners"]),
            self.axis_name,
            *(image, changed),
            train=True,
            rngs={"dropout": dropout_key},
        )
        model = model | {"learners": new.model} | moments
        return State(new.step, model, training | {"learners": new.training}), losses

    def _make_teacher(self, channels: int) -> Pdn:
        return Pdn(channels, self.size, jnp.dtype(self.dtype))

    def _make_learners(self, channels: int) -> Learners:
        return Learners(channels, self.size, jnp.dtype(self.dtype))

    def _make_optimizer(self, rate: Any) -> optax.GradientTransformation:
        return descent.make_optimizer(
            learning_rate=rate, weight_decay=self.weight_decay
        )


METHODS = {"efficientad": EfficientAd}


def place_features(batch: Batch) -> Description:
    """Returns the trunk's features at the patches of a description."""
    size = tuple(n // 4 for n in batch.image.shape[1:3])
    return resize(batch.features, size)[:, BORDER:-BORDER, BORDER:-BORDER]


def measure_moments(raw: Description) -> dict[str, Float[Array, " c"]]:
    """Returns the mean of each channel, and that of its square."""
    return {"mean": raw.mean((0, 1, 2)), "square": jnp.square(raw).mean((0, 1, 2))}


def standardize(moments: Mapping[str, jax.Array], raw: Description) -> Description:
    """Standardises the teacher's description.

    Args:
        moments: `mean` and mean `square` of each channel.
        raw: the teacher's description.
    """
    variance = moments["square"] - jnp.square(moments["mean"])
    return (raw - moments["mean"]) / jnp.sqrt(jnp.maximum(variance, LEAST_STD**2))


def measure(
    teacher: Description,
    changed_teacher: Description,
    imitation: Description,
    prediction: Description,
    decoded: Description,
) -> dict[str, Float[Array, " b"]]:
    """Returns the loss terms of each image, which are added up.

    Args:
        teacher: the teacher's description.
        changed_teacher: the same of images with other colours.
        imitation: see `Learners`.
        prediction: see `Learners`.
        decoded: see `Learners`.
    """
    return {
        "student": take_hardest(jnp.square(teacher - imitation)),
        "autoencoder": _mean_square(changed_teacher, decoded),
        "student_autoencoder": _mean_square(decoded, prediction),
    }


def take_hardest(squares: Description) -> Float[Array, " b"]:
    """Returns each image's mean over its values from `HARD_QUANTILE` up."""
    flat = squares.reshape(len(squares), -1)
    count = flat.shape[1] - math.ceil(HARD_QUANTILE * (flat.shape[1] - 1))
    return jax.lax.top_k(flat, count)[0].mean(-1)


def change_colours(
    image: Float[Array, "b h w 3"], key: jax.Array
) -> Float[Array, "b h w 3"]:
    """Changes the brightness, the contrast or the saturation of each image."""
    kind_key, factor_key = jax.random.split(key)
    low, high = 1 - STRENGTH, 1 + STRENGTH
    kind = jax.random.randint(kind_key, len(image), 0, 3)
    factor = jax.random.uniform(factor_key, len(image), minval=low, maxval=high)
    return adjust(image, kind, factor)


def adjust(
    image: Float[Array, "b h w 3"], kind: Int[Array, " b"], factor: Float[Array, " b"]
) -> Float[Array, "b h w 3"]:
    """Moves images away from black, from their mean grey, or from greyscale.

    Args:
        image: images in 0..1.
        kind: 0 for the brightness, 1 for the contrast, 2 for the saturation.
        factor: factor of the difference to those; 1 changes nothing.
    """
    kind, factor = (x[:, None, None, None] for x in (kind, factor))
    grey = (image * jnp.asarray(GREY)).sum(-1, keepdims=True)
    mean = grey.mean((1, 2), keepdims=True)
    centre = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, mean, grey))
    return jnp.clip(factor * image + (1 - factor) * centre, 0, 1)


def _mean_square(x: Description, y: Description) -> Float[Array, " b"]:
    return jnp.square(x - y).mean((1, 2, 3))


def _fill(terms: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns all loss terms: 0 for those of the other part of the updates."""
    names = "distillation", "student", "autoencoder", "student_autoencoder"
    return {name: terms.get(name, jnp.zeros(())) for name in names}
