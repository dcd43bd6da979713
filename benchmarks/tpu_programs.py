"""Defines what `tpu_compile.py` compiles: chips, cells, and a program for each.

Every function of `PROGRAMS` returns a jitted function, and its arguments' shapes with
their places on the chips.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

SYSTEMS = {"small": "configs.small", "published": "configs.default"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as Google publishes it (docs.cloud.google.com/tpu/docs/v5e, v5p and v4).

    Attributes:
        flops: peak in bfloat16, per second.
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        links: to other chips, bytes per second, all together.
        accelerator: prefix of the accelerator type.
        cores: that the accelerator type counts per chip.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    accelerator: str
    cores: int


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, "v5litepod", 1),
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, "v4", 2),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, "v5p", 2),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A program to compile.

    Attributes:
        system: one of `SYSTEMS`.
        program: one of `PROGRAMS`.
        topology: chips to compile for, such as "v5e:2x2".
        batch: number of images; in a sweep that of each member.
    """

    system: str
    program: str
    topology: str
    batch: int

    @property
    def name(self) -> str:
        """The cell's key in the file."""
        return f"{self.system}, {self.program}, {self.topology}, {self.batch}"

    @property
    def chip(self) -> Chip:
        """The kind of its chips."""
        return CHIPS[self.topology.partition(":")[0]]

    @property
    def count(self) -> int:
        """Number of its chips."""
        return math.prod(map(int, self.topology.partition(":")[2].split("x")))


def make_setup(cell: Cell) -> tuple[Any, Any]:
    """Returns the resolved config of a cell in bfloat16, and its `setup.Setup`."""
    import importlib

    from ulsad_jax.runs import config as config_lib
    from ulsad_jax.runs import setup

    config = importlib.import_module(SYSTEMS[cell.system]).get_config()
    config.train.dtype, config.train.batch_size = "bfloat16", cell.batch
    if cell.program.startswith("padim"):
        config.method = "padim"
    config = config_lib.resolve(config)
    return config, setup.make(config)


def place(tree: Any, chips: list[Any], axis: str, *, split: bool) -> Any:
    """Returns shapes with a sharding: split along the first axis, or whole."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(chips), (axis,))
    sharding = NamedSharding(mesh, PartitionSpec(axis) if split else PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def get_shapes(cell: Cell, made: Any) -> tuple[Any, Any, Any]:
    """Returns shapes of a state, a batch and a random key."""
    import jax

    spec, key = made.spec(cell.batch, 209), jax.eval_shape(jax.random.key, 0)
    return (
        jax.eval_shape(functools.partial(made.method.init, spec=spec), key),
        spec.batch,
        key,
    )


def make_training(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the training step, and its arguments' shapes."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from ulsad_jax.runs import steps
    from ulsad_jax.runtime.devices import DATA, Devices

    _, made = make_setup(cell)
    state, batch, key = get_shapes(cell, made)
    shards_state = cell.program == "train_sharded"
    devices = Devices(Mesh(np.array(chips), (DATA,)), shards_state)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(state, devices.choose_places(state)),
    )
    step = steps.make_train_step(made.method, devices, "jit")
    whole = functools.partial(place, chips=chips, axis=DATA, split=False)
    return step, (state, place(batch, chips, DATA, split=True), whole(key))


def make_finish(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns PaDiM's `finish`, and its argument's shapes."""
    import jax

    from ulsad_jax.runtime.devices import DATA

    _, made = make_setup(cell)
    state, _, _ = get_shapes(cell, made)
    return jax.jit(made.method.finish), (place(state, chips, DATA, split=False),)


def make_features(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the trunk, and its arguments' shapes."""
    import jax

    from ulsad_jax.runtime.devices import DATA
    from ulsad_jax.trunks import features

    _, made = make_setup(cell)
    trunk, image = get_trunk(made, cell.batch)
    return jax.jit(functools.partial(features.apply, made.pyramid)), (
        place(trunk, chips, DATA, split=False),
        place(image, chips, DATA, split=True),
    )


def get_trunk(made: Any, batch: int) -> tuple[Any, Any]:
    """Returns shapes of the trunk's variables and of a batch of images."""
    import jax
    import numpy as np

    image = jax.ShapeDtypeStruct((batch, *made.input_size, 3), np.uint8)
    return jax.eval_shape(made.pyramid.init, jax.random.key(0), image), image


def make_inference(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the predict step over as many chips as divide the batch."""
    import jax
    import numpy as np

    from ulsad_jax.runtime.devices import DATA
    from ulsad_jax.scoring.calibration import Calibration
    from ulsad_jax.scoring.prediction import Weights, make_predict_step
    from ulsad_jax.scoring.thresholds import Thresholds
    from ulsad_jax.trunks.features import ChannelStatistics

    chips = chips[: math.gcd(len(chips), cell.batch)]
    config, made = make_setup(cell)
    trunk, image = get_trunk(made, cell.batch)
    state, batch, _ = get_shapes(cell, made)
    state = jax.eval_shape(made.method.finish, state)
    channels = np.zeros(batch.features.shape[-1], np.float32)
    whitening = np.zeros((len(channels),) * 2, np.float32) if made.whiten else None
    maps = jax.eval_shape(made.method.maps, state.model, batch)
    scale = dict.fromkeys(maps, np.float32(1))
    weights = Weights(
        trunk,
        ChannelStatistics(channels, channels, whitening),
        state.model,
        Calibration(scale, scale),
        Thresholds(),
    )
    weights = jax.tree.map(
        lambda x: x if hasattr(x, "shape") else np.float32(x), weights
    )
    step = make_predict_step(
        made.pyramid, made.method, top_share=config.score.top_share, keep_maps=True
    )
    return step, (
        place(weights, chips, DATA, split=False),
        place(image, chips, DATA, split=True),
    )


def make_sweep(cell: Cell, chips: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the training step of a wave of eight members."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from ulsad_jax.sweep import wave

    config, made = make_setup(cell)
    numbers = wave.take_numbers(config, ["optimizer.learning_rate"])
    one = numbers, *get_shapes(cell, made)
    all_ = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype), one)
    step = wave.vectorize(
        wave.make_update(made.method), Mesh(np.array(chips), (wave.MEMBER,))
    )
    return step, place(all_, chips, wave.MEMBER, split=True)


PROGRAMS = {
    "train": make_training,
    "train_sharded": make_training,
    "predict": make_inference,
    "features": make_features,
    "sweep": make_sweep,
    "padim_update": make_training,
    "padim_finish": make_finish,
}
