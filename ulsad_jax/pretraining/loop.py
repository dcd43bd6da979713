"""The pretraining loop: scenes in, a trunk's file out."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ulsad_jax import compilation, pretrained
from ulsad_jax import config as config_lib
from ulsad_jax.checkpoint import CheckpointStore
from ulsad_jax.errors import Interrupted, UserError
from ulsad_jax.models.resnet import ARCHITECTURES
from ulsad_jax.pretraining import objectives
from ulsad_jax.pretraining.scenes import Scene, draw_scenes
from ulsad_jax.pretraining.views import make_views
from ulsad_jax.progress import progress
from ulsad_jax.trainer import stop_signals

if TYPE_CHECKING:
    from jaxtyping import Array, Float
    from ml_collections import ConfigDict

CONFIG, CHECKPOINTS, TRUNK = "config.json", "checkpoints", "trunk.safetensors"
DRAWN_AT_ONCE = 64
REPORT_EVERY = 50  # steps


@flax.struct.dataclass
class State:
    """Everything that a step changes.

    Attributes:
        params: of the trunk and the heads of the objectives.
        batch_stats: of the trunk.
        opt_state: of the optimizer.
    """

    params: Any
    batch_stats: Any
    opt_state: optax.OptState


def run(config: ConfigDict, workdir: Path) -> str:
    """Pretrains a trunk, or goes on doing so.

    Args:
        config: see configs/pretrain.py.
        workdir: for checkpoints, losses and the trunk.

    Returns:
        What to tell the person.

    Raises:
        UserError: a field out of range; a work directory of another config; a loss
            that is not finite.
        Interrupted: by SIGTERM or SIGINT, after saving.
    """
    check(config)
    compilation.draw_by_kernel()
    _claim(config, workdir)
    model = objectives.Pretrainer(config.architecture)
    optimizer = make_optimizer(config)
    state = _init(model, optimizer, config)
    step_fn = make_step(model, optimizer, config)
    folder = workdir / CHECKPOINTS
    with (
        CheckpointStore(folder) as store,
        stop_signals() as stop,
    ):
        first = store.latest() or 0
        if first:
            state = _restore(store, first, state)
        scenes = draw(config) if first < config.num_steps else None
        losses: list[Mapping[str, jax.Array]] = []
        steps = progress(
            range(first, config.num_steps),
            "pretraining",
            total=config.num_steps - first,
            unit=" steps",
            announce=True,
        )
        for step in steps:
            state, new = step_fn(state, step, _choose(scenes, config, step))
            losses.append(new)
            done = step + 1
            if done % REPORT_EVERY == 0 or done == config.num_steps or stop:
                _report(workdir, done, losses)
                losses = []
            due = done % config.checkpoint_every == 0 or done == config.num_steps
            if due or stop:
                _save(store, done, state)
            if stop:
                store.wait()
                raise Interrupted(stop[0], done)
    path = workdir / TRUNK
    trunk = save_trunk(state, config, path)
    return f"Trunk: {path} (SHA-256 {trunk.identity.sha256[:12]})"


def check(config: ConfigDict) -> None:
    """Refuses what cannot be trained.

    Raises:
        UserError: names the field, the value and the rule.
    """
    largest = config.scenes.size
    rules = {
        "architecture": (
            config.architecture in ARCHITECTURES,
            f"one of {', '.join(ARCHITECTURES)}",
        ),
        "view_size": (
            config.view_size % 16 == 0 and 32 <= config.view_size <= largest,
            f"a multiple of 16 from 32 up to scenes.size, {largest}",
        ),
        "batch_size": (
            2 <= config.batch_size <= config.scenes.count,
            f"from 2 up to scenes.count, {config.scenes.count}",
        ),
        "num_steps": (config.num_steps >= 1, "from 1 up"),
        "temperature": (config.temperature > 0, "above 0"),
        "checkpoint_every": (config.checkpoint_every >= 1, "from 1 up"),
        "objectives": (
            set(config.objectives) == set(objectives.OBJECTIVES)
            and sum(config.objectives.values()) > 0,
            f"weights of {', '.join(objectives.OBJECTIVES)}, not all 0",
        ),
    }
    for field, (holds, rule) in rules.items():
        if not holds:
            raise UserError(
                f"Expected config.{field} to be {rule}, found {config[field]!r}. Set "
                f"it with --config.{field}=..."
            )


def draw(config: ConfigDict) -> Scene:
    """Draws all scenes, in host memory; fields are [count, size, size, ...]."""
    count, size = config.scenes.count, config.scenes.size
    key = jax.random.key(config.seed)
    parts = []
    bar = progress(None, "drawing", total=count, unit=" scenes", announce=True)
    with bar:
        for i in range(-(-count // DRAWN_AT_ONCE)):
            drawn = draw_scenes(
                jax.random.fold_in(key, i), size=size, count=DRAWN_AT_ONCE
            )
            parts.append(jax.device_get(drawn))
            bar.update(DRAWN_AT_ONCE)
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW on the kernels, warmed up, then down to nothing along a cosine."""
    warmup = min(100, config.num_steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.num_steps, 0.0
    )
    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.adamw(
            schedule,
            weight_decay=config.weight_decay,
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
        ),
    )


def make_step(
    model: objectives.Pretrainer,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
) -> Callable[..., tuple[State, dict[str, Float[Array, ""]]]]:
    """Jits one update: `step(state, number, scenes) -> (state, losses)`."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1 << 30)
    views_of = functools.partial(make_views, size=config.view_size)
    weights = config.objectives.to_dict()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, number: int, scenes: Scene):
        keys = jax.random.split(jax.random.fold_in(key, number), config.batch_size)
        others = jnp.roll(scenes.image, 1, axis=0)
        views = jax.vmap(views_of)(keys, scenes, others)  # [batch, 2, ...]
        views = jax.tree.map(
            lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), views
        )

        def loss(params):
            layers, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                views.image,
                train=True,
                mutable=["batch_stats"],
            )
            losses = objectives.measure(layers, views, temperature=config.temperature)
            total = sum(weights[name] * value for name, value in losses.items())
            return total, (losses, updated["batch_stats"])

        gradient_fn = jax.value_and_grad(loss, has_aux=True)
        (_, (losses, batch_stats)), gradients = gradient_fn(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), losses

    return step


def save_trunk(state: State, config: ConfigDict, path: Path) -> pretrained.Trunk:
    """Writes the trunk with its provenance; kernels in float16."""
    variables = {
        "params": state.params["trunk"],
        "batch_stats": state.batch_stats["trunk"],
    }
    about = {
        "license": "Apache-2.0",
        "trained_on": "images drawn by ulsad_jax.pretraining, no others",
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "seed": str(config.seed),
        "commit": _commit(),
        "jax": metadata.version("jax"),
    }
    return pretrained.save_pretrained(variables, config.architecture, path, about=about)


def _init(
    model: objectives.Pretrainer,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
) -> State:
    @jax.jit
    def init(key: jax.Array) -> State:
        image = jnp.zeros((2, config.view_size, config.view_size, 3))
        variables = model.init(key, image, train=True)
        params = variables["params"]
        return State(params, variables["batch_stats"], optimizer.init(params))

    # Placed as a restored state is, so that both compile alike.
    return jax.device_put(init(jax.random.key(config.seed)), jax.devices()[0])


def _choose(scenes: Scene, config: ConfigDict, step: int) -> Scene:
    """The scenes of a step: a function of the seed and the step."""
    rng = np.random.default_rng([config.seed, step])
    rows = rng.choice(config.scenes.count, config.batch_size, replace=False)
    return jax.tree.map(lambda x: x[rows], scenes)


def _claim(config: ConfigDict, workdir: Path) -> None:
    """Makes the work directory this config's, or checks that it is."""
    path = workdir / CONFIG
    if path.exists():
        found = json.loads(path.read_text())
        if found != json.loads(json.dumps(config.to_dict())):
            raise UserError(
                f"Expected {workdir} to be a run of this config, found another in "
                f"{path}. Give another --workdir, or the run's own values."
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, path)


def _save(store: CheckpointStore, step: int, state: State) -> None:
    model = {"params": state.params, "batch_stats": state.batch_stats}
    store.save(step, model=model, optimizer=state.opt_state, progress={})


def _restore(store: CheckpointStore, step: int, state: State) -> State:
    model, opt_state, _ = store.restore_training(
        step,
        model={"params": state.params, "batch_stats": state.batch_stats},
        optimizer=state.opt_state,
    )
    return State(model["params"], model["batch_stats"], opt_state)


def _report(workdir: Path, step: int, losses: list[Mapping[str, jax.Array]]) -> None:
    """Adds the mean losses to losses.jsonl and prints them."""
    means = {
        name: float(np.mean([float(loss[name]) for loss in losses]))
        for name in losses[0]
    }
    wrong = [name for name, value in means.items() if not np.isfinite(value)]
    if wrong:
        raise UserError(
            f"Expected finite losses, found {means[wrong[0]]} in {wrong[0]!r} before "
            f"step {step}. Lower --config.learning_rate."
        )
    with (workdir / "losses.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **means}) + "\n")
    text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    print(f"step {step}: {text}", flush=True)


def _commit() -> str:
    """The commit of this checkout, or "" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
