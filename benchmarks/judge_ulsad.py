"""ULSAD trained on a frozen trunk, in memory: image AUROC by type, and of each map."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart
from ulsad_jax import evaluation, features, inference, scoring, training
from ulsad_jax.decisions import Thresholds
from ulsad_jax.losses import make_loss_fn
from ulsad_jax.metrics import image as metrics
from ulsad_jax.models.pyramid import FeaturePyramid

# Of a category's results, those that are no type's image AUROC.
LOCAL, GLOBAL, PIXEL = "local map", "global map", "pixel_auroc"


class Measure:
    """Image AUROC in 0..1 of ULSAD on a trunk, of one category's test images.

    Programs are made once: all trunks, categories and seeds share what is compiled.

    Args:
        epochs: of training.
        seeds: of initial weights and order; results are averaged over them.
        size: side of the images in pixels.
        whiten: whether features are whitened, whatever the trunk.
        layers: of the trunk, see `FeaturePyramid.layers`.
    """

    def __init__(
        self, *, epochs: int, seeds: list[int], size: int, whiten: bool, layers: str
    ):
        self.config = config = quickstart.get_config()
        self.epochs, self.seeds, self.size, self.whiten = epochs, seeds, size, whiten
        pyramid = FeaturePyramid(config.trunk.architecture, layers=layers)
        self.model = model = training.make_model(config)
        self.optimizer = training.make_optimizer(**config.optimizer)
        self.apply_pyramid = jax.jit(pyramid.apply)
        self.predict = inference.make_predict_step(pyramid, model)
        self.step = training.make_train_step(
            model, make_loss_fn(config.losses), self.optimizer
        )
        self.maps = jax.jit(
            lambda variables, x, image: scoring.raw_maps(
                model.apply(variables, x, image, train=False), (size, size)
            )
        )

    def __call__(self, trunk, category) -> dict[str, float]:
        """By type, its images' AUROC; `LOCAL`, `GLOBAL`; `PIXEL`, the pixels'.

        `LOCAL` and `GLOBAL` are means over types when an image's score is the maximum
        of that map alone.
        """
        train = self._extract(trunk, category.train)
        statistics = features.channel_statistics(train, whiten=self.whiten)
        x = statistics.standardize(train)
        held = statistics.standardize(self._extract(trunk, category.validation))
        found = []
        for seed in self.seeds:
            variables = self._fit(x, category.train, category.name, seed)
            weights = inference.Weights(
                trunk.variables,
                statistics,
                variables,
                self._calibrate(variables, held, category.validation),
                Thresholds(),
            )
            found.append(self._score(weights, category))
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}

    def _extract(self, trunk, images):
        return features.extract(
            lambda image: self.apply_pyramid(trunk.variables, image),
            _batches(images, self.config.evaluation.batch_size),
            len(images),
        )[0]

    def _fit(self, x, images, name: str, seed: int) -> dict:
        """Trains from scratch; returns the networks' variables."""
        count, rows_a_step = len(images), self.config.train.batch_size
        shapes = [(rows_a_step, *a.shape[1:]) for a in (x, images)]
        state = training.init_state(
            self.model,
            self.optimizer,
            training.initial_key(seed, name),
            features=jax.ShapeDtypeStruct(shapes[0], jnp.float32),
            image=jax.ShapeDtypeStruct(shapes[1], jnp.uint8),
        )
        steps = training.steps_per_epoch(count, rows_a_step)
        for epoch in range(self.epochs):
            order = training.epoch_order(count, seed=seed, category=name, epoch=epoch)
            for rows in order[: steps * rows_a_step].reshape(steps, -1):
                state, _ = self.step(state, x[rows], images[rows])
        return state.variables

    def _calibrate(self, variables, x, images) -> scoring.Calibration:
        count, batch = len(images), self.config.evaluation.batch_size
        maps = [
            self.maps(variables, x[part], images[part])
            for part in np.array_split(np.arange(count), -(-count // batch))
        ]
        local, global_ = (np.concatenate(m) for m in zip(*maps, strict=True))
        return scoring.calibrate(local, global_, method=self.config.calibration)

    def _score(self, weights, category) -> dict[str, float]:
        prediction, truth = evaluation.predict_split(
            lambda image: self.predict(weights, image),
            _batches(category.test, self.config.evaluation.batch_size, category),
            types=category.types,
            image_size=(self.size, self.size),
        )
        pixel = evaluation.pixel_level(
            truth.masks, truth.has_mask, prediction.anomaly_map
        )

        def by_type(score) -> dict[str, float]:
            return metrics.by_type(truth.types, score)

        return by_type(prediction.score) | {
            LOCAL: float(np.mean(list(by_type(prediction.local_score).values()))),
            GLOBAL: float(np.mean(list(by_type(prediction.global_score).values()))),
            PIXEL: pixel["pixel_auroc"],
        }


def _batches(images, size: int, category=None):
    """Batches as `data.pipeline` makes them; the last one repeats the first images."""
    for start in range(0, len(images), size):
        rows = np.arange(start, start + size)
        valid, index = rows < len(images), rows % len(images)
        batch = {"image": images[index], "index": index, "valid": valid}
        if category is not None:
            batch["label"] = np.array([category.types[i] != "good" for i in index])
            batch["gt_mask"] = category.masks[index]
            batch["has_mask"] = category.has_mask[index]
        yield batch
