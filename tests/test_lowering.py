"""Every jitted program lowers for GPUs and TPUs, with what convolutions are there."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh

from tests import runs
from ulsad_jax.methods import patchcore
from ulsad_jax.nn.convolution import convolve_transposed
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import setup, steps
from ulsad_jax.runs.validation import make_validation_step
from ulsad_jax.runtime.devices import find_devices
from ulsad_jax.scoring.calibration import Calibration
from ulsad_jax.scoring.prediction import Weights, make_predict_step
from ulsad_jax.scoring.thresholds import Thresholds
from ulsad_jax.sweep import wave
from ulsad_jax.trunks import base as trunks
from ulsad_jax.trunks import features
from ulsad_jax.trunks.pyramid import FeaturePyramid

PLATFORMS = ("tpu", "cuda")
# Where programs are made, and how many. A new one is lowered here, too.
PROGRAMS = {
    "artifact.py": 1,  # the predict step
    "export_onnx.py": 1,  # runs on CPUs
    "methods/padim.py": 1,
    "methods/patchcore.py": 2,  # within each other
    "methods/ulsad/loss_check.py": 2,
    "runs/loss_inspection.py": 2,  # parts of the training step
    "runs/steps.py": 2,
    "runs/validation.py": 1,
    "runtime/devices.py": 1,  # with several processes; a maximum
    "scoring/prediction.py": 1,
    "sweep/wave.py": 3,
    "trunks/features.py": 2,
    "trunks/weights.py": 1,
}


def lower(function, *arguments):
    """The results' shapes; raises where a platform has no such operation."""
    exported = export.export(function, platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    return jax.tree.unflatten(exported.out_tree, exported.out_avals)


@functools.cache
def make(method="ulsad+padim+pooled"):
    """The smallest system, in bfloat16: (config, setup)."""
    fields = {"method": method, "train.dtype": "bfloat16"}
    config = config_lib.resolve(runs.make_config(Path("data"), fields))
    return config, setup.make(config)


@functools.cache
def shapes(method="ulsad+padim+pooled"):
    """Shapes of (state, batch, key)."""
    config, made = make(method)
    spec, key = (
        made.spec(config.train.batch_size, 20),
        jax.eval_shape(jax.random.key, 0),
    )
    init = steps.make_init(made.method, spec)
    return lower(init, key), spec.batch, key


def test_every_program_is_here():
    package = Path(setup.__file__).parents[1]
    found = {
        path.relative_to(package).as_posix(): path.read_text().count("jax.jit")
        for path in package.rglob("*.py")
    }
    assert {path: n for path, n in found.items() if n} == PROGRAMS


@pytest.mark.parametrize(
    "method",
    [
        "ulsad+padim+words",
        "patchcore+pca",
        "dfr+rd+fastflow+cflow",
        "efficientad",
        "draem",
    ],
)
def test_training_step(method):
    step = steps.make_train_step(make(method)[1].method, find_devices(1), "jit")
    state, losses = lower(step, *shapes(method))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes(method)[0])
    assert all(loss.dtype == jnp.float32 for loss in losses.values())


def test_coreset():
    key, patches = shapes()[2], jax.ShapeDtypeStruct((5000, 160), np.float32)
    run = jax.jit(functools.partial(patchcore.choose, count=70, dimensions=128))
    assert lower(run, key, patches).shape == (70,)


def test_step_of_a_wave():
    config, made = make("ulsad")
    numbers = wave.take_numbers(config, ["optimizer.learning_rate"])
    one = numbers, *shapes("ulsad")
    members = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), one)
    mesh = Mesh(np.array(jax.devices()[:1]), (wave.MEMBER,))
    step = wave.vectorize(wave.make_update(made.method), mesh)
    states, losses = lower(step, *members)
    assert losses["total"].shape == (3,)
    lower(jax.jit(lambda states, i: jax.tree.map(lambda x: x[i], states)), states, 0)


def test_finish_validation_and_prediction():
    made = make("ulsad+padim")[1]
    state, batch, _ = shapes("ulsad+padim")
    model = lower(jax.jit(made.method.finish), state).model
    step = make_validation_step(made.method)
    losses, maps, _ = lower(step, model, batch, 0, {})
    assert "total" in losses
    image = batch.image
    trunk = jax.eval_shape(made.pyramid.init, jax.random.key(0), image)
    channels = np.ones(batch.features.shape[-1], np.float32)
    weights = Weights(
        trunk,
        features.ChannelStatistics(channels, channels, np.diag(channels)),
        model,
        Calibration(dict.fromkeys(maps, 0.0), dict.fromkeys(maps, 1.0)),
        Thresholds(),
    )
    predict = make_predict_step(made.pyramid, made.method, top_share=0.01)
    assert lower(predict, weights, image).anomaly_map.shape == image.shape[:3]


@pytest.mark.parametrize(
    "architecture", ["tf_efficientnet_lite0", "vit_small_patch14_dinov2"]
)
def test_features(architecture):
    """And the images beside them, and drawn weights."""
    pyramid = FeaturePyramid(architecture, jnp.bfloat16, image_size=(64, 64))
    image = jax.ShapeDtypeStruct((2, 112, 112, 3), np.uint8)
    trunk = jax.eval_shape(pyramid.init, jax.random.key(0), image)
    run = jax.jit(functools.partial(features.apply, pyramid))
    assert lower(run, trunk, image).dtype == jnp.float32
    resize = jax.jit(functools.partial(features.resize_images, pyramid))
    assert lower(resize, image).shape == (2, 64, 64, 3)
    lower(jax.jit(functools.partial(trunks.draw, architecture)), shapes()[2])


def test_check_of_the_losses(monkeypatch):
    """Its programs are lowered where they are called."""
    jit, names = jax.jit, []

    def lowered(function):
        def run(*arguments):
            names.append(function.__name__)
            lower(jit(function), *arguments)
            return jit(function)(*arguments)

        return run

    monkeypatch.setattr(jax, "jit", lowered)
    config = config_lib.resolve(runs.make_config(Path("data")))
    made = setup.make(config)
    assert made.method.check(made.spec(4)) == ""
    assert {*names} == {"run", "alone"}


def test_transposed_convolutions_are_plain_on_gpus_alone():
    """As they are lowered for one platform: without the choice between them."""
    x = jax.ShapeDtypeStruct((8, 32, 32, 64), np.float32)
    kernel = jax.ShapeDtypeStruct((4, 4, 64, 64), np.float32)
    run = functools.partial(convolve_transposed, stride=2, padding=1)

    def gradients(x, kernel):
        return jax.grad(lambda *both: jnp.sum(run(*both) ** 2), (0, 1))(x, kernel)

    for platform, dilated in (("tpu", True), ("cuda", False)):
        exported = export.export(jax.jit(gradients), platforms=[platform])(x, kernel)
        text = exported.mlir_module()
        assert "stablehlo.convolution" in text
        assert ("lhs_dilate = [2, 2]" in text) == dilated
