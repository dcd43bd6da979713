"""Takes steps of gradient descent, and estimates the memory that they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ulsad_jax.methods.base import TOTAL, State, count_bytes

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Losses = dict[str, Float[Array, ""]]

# Arrays per parameter: value, two moments, gradient. Updates are in place.
COPIES = 4
# Arrays per output of a layer: the output and what its normalisation keeps, both for
# the backward pass, and the gradient.
RETURNED = 3


def make_optimizer(
    *, learning_rate: Any, weight_decay: Any, **options: Any
) -> optax.GradientTransformation:
    """Makes Adam with L2 decay added to the gradient first, as PyTorch's Adam does.

    Args:
        learning_rate: number, or a scalar array that may be traced.
        weight_decay: the same.
        options: other arguments of `optax.adam`.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(learning_rate, **options)
    )


def init(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *shapes: Any,
    **options: Any,
) -> State:
    """Draws the initial weights of a network and initialises the optimizer.

    Args:
        network: module with parameters, and perhaps other variables, such as the
            statistics of batch norm.
        optimizer: optimizer of its parameters.
        key: random key of the weights.
        shapes: shapes of the network's inputs, trees of `jax.ShapeDtypeStruct`.
        options: other arguments of the network, such as `train`.
    """
    inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    model = dict(network.init(key, *inputs, **options))
    training = optimizer.init(model["params"])
    return State(jnp.zeros((), jnp.int32), model, training)


def step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable[[Any], tuple[jax.Array, Losses]],
    state: State,
    axis_name: str | None,
    *inputs: Any,
    **options: Any,
) -> tuple[State, Losses]:
    """Returns the state after one step, and the losses before it by name.

    Args:
        network: module that `init` was given.
        optimizer: optimizer of its parameters.
        loss_fn: function from the network's outputs to (total, its terms by name).
        state: state that `init` made, or this function.
        axis_name: see `Method.axis_name`.
        inputs: the network's inputs.
        options: other arguments of the network, such as `train`, and of `apply`, such
            as `rngs`.
    """
    others = [kind for kind in state.model if kind != "params"]

    def loss(params: Any) -> tuple[jax.Array, tuple[Losses, Any]]:
        model = state.model | {"params": params}
        outputs, updated = network.apply(model, *inputs, mutable=others, **options)
        total, terms = loss_fn(outputs)
        return total, (terms, updated)

    params = state.model["params"]
    gradient_fn = jax.value_and_grad(loss, has_aux=True)
    (total, (terms, updated)), gradients = gradient_fn(params)
    if axis_name is not None:
        mine = total, terms, gradients
        total, terms, gradients = jax.lax.pmean(mine, axis_name)
    updates, training = optimizer.update(gradients, state.training, params)
    params = optax.apply_updates(params, updates)
    model = {"params": params, **updated}
    return State(state.step + 1, model, training), {TOTAL: total, **terms}


def estimate_bytes(network: nn.Module, *shapes: Any, **options: Any) -> int:
    """Estimates the device memory that a step needs, in bytes.

    It counts the parameters with both moments and gradients, the outputs of every layer
    for a batch, and two batches: the current one and the next one.

    Args:
        network: module that `init` is given.
        shapes: shapes of the network's inputs.
        options: other arguments of the network, such as `train`.
    """

    def forward(key: jax.Array, *inputs: jax.Array) -> Any:
        variables = network.init(key, *inputs, **options)
        _, kept = network.apply(
            variables,
            *inputs,
            capture_intermediates=True,
            mutable=True,
            rngs={"dropout": key},
            **options,
        )
        return variables, kept["intermediates"]

    variables, returned = jax.eval_shape(forward, jax.random.key(0), *shapes)
    return (
        COPIES * count_bytes(variables)
        + RETURNED * count_bytes(returned)
        + 2 * count_bytes(shapes)
    )
