"""Training as pure functions: networks, optimizer, state, step, order of images."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ulsad_jax.methods.ulsad.losses import TOTAL
from ulsad_jax.methods.ulsad.networks import Ulsad
from ulsad_jax.runtime import compilation
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks.features import ChannelStatistics
from ulsad_jax.trunks.pyramid import FeaturePyramid

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt8
    from ml_collections import ConfigDict


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: updates so far.
        params: of both networks, float32.
        batch_stats: running statistics of both networks.
        opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """What `Ulsad.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def make_model(config: ConfigDict) -> Ulsad:
    """The networks that a config describes."""
    return Ulsad(**config.model, dtype=jnp.dtype(config.train.dtype))


def make_pyramid(config: ConfigDict) -> FeaturePyramid:
    """The frozen network that a resolved config describes."""
    trunk, dtype = config.trunk, jnp.dtype(config.train.dtype)
    return FeaturePyramid(trunk.architecture, dtype, trunk.layers)


def make_optimizer(
    *, learning_rate: float, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """Adam with L2 decay: added to the gradient first, as PyTorch's Adam does."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adam(learning_rate, b1=b1, b2=b2, eps=eps),
    )


def category_seed(category: str) -> int:
    """A number of a category's own, so that results do not depend on the others."""
    return zlib.crc32(category.encode()) & 0x7FFFFFFF


def initial_key(seed: int, category: str) -> jax.Array:
    """Decides a category's initial weights."""
    return jax.random.fold_in(jax.random.key(seed), category_seed(category))


def init_state(
    model: Ulsad,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    features: jax.ShapeDtypeStruct,
    image: jax.ShapeDtypeStruct,
) -> TrainState:
    """Draws initial weights.

    Args:
        model: the networks.
        optimizer: see `make_optimizer`.
        key: decides the weights.
        features: shape of a batch of features.
        image: shape of a batch of images.
    """
    variables = _make_init(model, features, image)(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
    )


@functools.cache  # compiled once, for all seeds
def _make_init(
    model: Ulsad, features: jax.ShapeDtypeStruct, image: jax.ShapeDtypeStruct
) -> Callable[[jax.Array], Mapping[str, Any]]:
    @functools.partial(jax.jit, compiler_options=compilation.run_once())
    def init(key):
        return model.init(
            key,
            jnp.zeros(features.shape, features.dtype),
            jnp.zeros(image.shape, image.dtype),
            train=True,
        )

    return init


def make_train_step(
    model: Ulsad,
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Jits `make_update`'s function; the state is donated.

    Args:
        model: see `make_update`.
        loss_fn: see `make_update`.
        optimizer: see `make_update`.
        sharding: of the new state and the losses; by default as the inputs suggest.
    """
    update = make_update(model, loss_fn, optimizer)
    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def make_update(
    model: Ulsad, loss_fn: Callable, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """One update as a pure function: `update(state, features, image)`.

    It returns the new state, and the total and every term of the losses before the
    update. A model with an `axis_name` is given a device's share of the batch.
    """

    def update(
        state: TrainState,
        features: Float[Array, "b h/8 w/8 c"],
        image: UInt8[Array, "b h w 3"],
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        def loss(params):
            outputs, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                features,
                image,
                train=True,
                mutable=["batch_stats"],
            )
            total, terms = loss_fn(outputs, step=state.step)
            return total, (terms, updated["batch_stats"])

        gradient_fn = jax.value_and_grad(loss, has_aux=True)
        (total, (terms, batch_stats)), gradients = gradient_fn(state.params)
        if model.axis_name is not None:
            mine = total, terms, gradients
            total, terms, gradients = jax.lax.pmean(mine, model.axis_name)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, {TOTAL: total, **terms}

    return update


def steps_per_epoch(count: int, batch_size: int, *, validation: int = 0) -> int:
    """How many whole batches there are; the incomplete last one is left out.

    Args:
        count: training images.
        batch_size: images a step.
        validation: images beside them, for the message.

    Raises:
        UserError: not even one.
    """
    if count < batch_size:
        advice = ["add images"]
        if validation > 1:
            advice.insert(
                0,
                "lower --config.dataset.validation_fraction, which holds images out "
                "where there is no validation split",
            )
        if count > 1:
            smaller = f"set --config.train.batch_size to {count} or less (from 2 up)"
            advice.insert(0, smaller)
        text = ", or ".join(advice)
        raise UserError(
            f"Expected at least one batch of {batch_size} training images, without "
            f"the {validation} for validation, found {count}. "
            f"{text[0].upper()}{text[1:]}."
        )
    return count // batch_size


def epoch_order(
    count: int, *, seed: int, category: str, epoch: int
) -> Int[np.ndarray, " count"]:
    """The order of the training images: a function of (seed, category, epoch)."""
    rng = np.random.default_rng([seed, category_seed(category), epoch])
    return rng.permutation(count)


def model_tree(
    variables: Mapping[str, Any], statistics: ChannelStatistics
) -> dict[str, Any]:
    """The checkpoint item that evaluation reads."""
    channels = {"mean": statistics.mean, "std": statistics.std}
    if statistics.whitening is not None:
        channels["whitening"] = statistics.whitening
    return {"variables": dict(variables), "channels": channels}
