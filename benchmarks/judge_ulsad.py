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


def make_measure(*, epochs: int, seeds: list[int], size: int, whiten: bool):
    """Returns `measure(trunk, category) -> {name: AUROC}`.

    The names are types, for the AUROC of their images; `LOCAL` and `GLOBAL`, for the
    mean over types when an image's score is the maximum of that map alone; `PIXEL`.

    Args:
        epochs: of training.
        seeds: of initial weights and order; results are averaged over them.
        size: side of the images in pixels.
        whiten: whether features are whitened, whatever the trunk.
    """
    config = quickstart.get_config()
    config.train.num_epochs = epochs
    pyramid = FeaturePyramid(config.trunk.architecture)
    model = training.make_model(config)
    optimizer = training.make_optimizer(**config.optimizer)
    loss_fn = make_loss_fn(config.losses)
    # Made once, so that every trunk, category and seed shares what is compiled.
    apply = jax.jit(pyramid.apply)
    predict = inference.make_predict_step(pyramid, model)
    step = training.make_train_step(model, loss_fn, optimizer)
    maps_of = jax.jit(
        lambda variables, x, image: scoring.raw_maps(
            model.apply(variables, x, image, train=False), (size, size)
        )
    )
    batch = config.evaluation.batch_size

    def extract(trunk, images):
        return features.extract(
            lambda image: apply(trunk.variables, image),
            _batches(images, batch),
            len(images),
        )[0]

    def fit(x, images, name: str, seed: int) -> dict:
        """Trains from scratch; returns the networks' variables."""
        count, rows_a_step = len(images), config.train.batch_size
        shapes = [(rows_a_step, *a.shape[1:]) for a in (x, images)]
        state = training.init_state(
            model,
            optimizer,
            training.initial_key(seed, name),
            features=jax.ShapeDtypeStruct(shapes[0], jnp.float32),
            image=jax.ShapeDtypeStruct(shapes[1], jnp.uint8),
        )
        steps = training.steps_per_epoch(count, rows_a_step)
        for epoch in range(epochs):
            order = training.epoch_order(count, seed=seed, category=name, epoch=epoch)
            for rows in order[: steps * rows_a_step].reshape(steps, -1):
                state, _ = step(state, x[rows], images[rows])
        return state.variables

    def calibrate(variables, x, images) -> scoring.Calibration:
        maps = [
            maps_of(variables, x[part], images[part])
            for part in np.array_split(np.arange(len(images)), -(-len(images) // batch))
        ]
        local, global_ = (np.concatenate(m) for m in zip(*maps, strict=True))
        return scoring.calibrate(local, global_, method=config.calibration)

    def measure(trunk, category) -> dict[str, float]:
        train = extract(trunk, category.train)
        statistics = features.channel_statistics(train, whiten=whiten)
        x = statistics.standardize(train)
        held = statistics.standardize(extract(trunk, category.validation))
        found = []
        for seed in seeds:
            variables = fit(x, category.train, category.name, seed)
            weights = inference.Weights(
                trunk.variables,
                statistics,
                variables,
                calibrate(variables, held, category.validation),
                Thresholds(),
            )
            found.append(_score(lambda image, w=weights: predict(w, image), category))
        return {name: float(np.mean([f[name] for f in found])) for name in found[0]}

    def _score(predict_one, category) -> dict[str, float]:
        prediction, truth = evaluation.predict_split(
            predict_one,
            _batches(category.test, batch, category),
            types=category.types,
            image_size=(size, size),
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

    return measure


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
