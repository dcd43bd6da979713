from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulsad_jax.methods.ulsad.autoencoder import GlobalAutoencoder, decoder_sizes
from ulsad_jax.methods.ulsad.local import LocalReconstructor
from ulsad_jax.methods.ulsad.networks import Networks
from ulsad_jax.trunks import base
from ulsad_jax.trunks.pyramid import FeaturePyramid
from ulsad_jax.trunks.resnet import TRUNKS

SIZES = [(64, 64), (64, 96), (96, 64), (128, 128), (256, 256), (320, 224)]
LITE = [f"tf_efficientnet_lite{i}" for i in range(3)]
SMALL = (64, 96)  # pixels of the tests that compute


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes(module, *inputs, **kwargs):
    """A module's variables and outputs, without computing them."""
    return jax.eval_shape(
        lambda *x: module.init_with_output(jax.random.key(0), *x, **kwargs)[::-1],
        *inputs,
    )


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def small_inputs(batch=3, channels=8):
    rng = np.random.default_rng(0)
    height, width = SMALL
    features = rng.normal(size=(batch, height // 8, width // 8, channels))
    images = rng.random((batch, height, width, 3))
    return features.astype(np.float32), images.astype(np.float32)


def draw_variables(module, *inputs, **kwargs):
    """Variables like trained ones; `init` would compile for much longer."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.size / 8, 1))
        if path[-1].key in ("var", "scale"):
            value = 1 + np.abs(value)
        return value.astype(np.float32)

    variables, _ = shapes(module, *inputs, **kwargs)
    return jax.tree_util.tree_map_with_path(draw, variables)


@pytest.fixture(scope="module")
def variables():
    return draw_variables(Networks(local_width=16), *small_inputs(), train=False)


@functools.cache
def predictor(**options):
    model = Networks(local_width=16, **options)
    return jax.jit(lambda *args: model.apply(*args, train=False))


def predict(variables, features, images, **options):
    return predictor(**options)(variables, features, images)


@pytest.mark.parametrize("architecture", TRUNKS)
def test_trunk_shapes(architecture):
    module = TRUNKS[architecture].make()
    _, outputs = shapes(module, spec(2, 64, 96, 3))
    expansion = 4 if module.bottleneck else 1
    assert {name: output.shape for name, output in outputs.items()} == {
        "layer1": (2, 16, 24, 64 * expansion),
        "layer2": (2, 8, 12, 128 * expansion),
        "layer3": (2, 4, 6, 256 * expansion),
    }


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    # Published counts of parameters, less those of layer4 and the classifier.
    [
        ("resnet18", 11_689_512 - 8_393_728 - 513_000),
        ("resnet34", 21_797_672 - 13_114_368 - 513_000),
        ("resnet50", 25_557_032 - 14_964_736 - 2_049_000),
        ("wide_resnet50_2", 68_883_240 - 41_971_712 - 2_049_000),
        ("wide_resnet101_2", 126_886_696 - 41_971_712 - 2_049_000),
    ],
)
def test_trunk_parameters(architecture, parameters):
    variables, _ = shapes(TRUNKS[architecture].make(), spec(1, 64, 64, 3))
    assert count(variables["params"]) == parameters


@pytest.mark.parametrize("architecture", [*TRUNKS, *LITE])
def test_folded_trunk_has_a_bias_for_every_batch_norm(architecture):
    image, trunk = spec(1, 64, 64, 3), base.find(architecture)
    whole, _ = shapes(trunk.make(), image)
    folded, _ = shapes(trunk.make(folded=True), image)
    assert folded.keys() == {"params"}
    # Of scale, shift, mean and variance one number is left.
    assert count(folded) == count(whole["params"]) - count(whole["batch_stats"]) / 2
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), whole)
    assert jax.tree.map(np.shape, trunk.fold(ones)) == jax.tree.map(np.shape, folded)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_folded_trunk_computes_the_same(architecture):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *SMALL, 3)).astype(np.float32)
    shape, _ = shapes(TRUNKS[architecture].make(), image)
    low = {"kernel": -0.1, "mean": -0.5, "bias": -0.5, "scale": 0.5, "var": 0.5}
    width = {"kernel": 0.2}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(
            low[path[-1].key] + width.get(path[-1].key, 1) * rng.random(x.shape)
        ),
        shape,
    )
    before = jax.device_get(variables)
    expected = jax.jit(TRUNKS[architecture].make().apply)(variables, image)
    found = jax.jit(TRUNKS[architecture].make(folded=True).apply)(
        TRUNKS[architecture].fold(variables), image
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(found[name], value, atol=atol)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize("architecture", TRUNKS)
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_pyramid_has_384_channels(architecture, dtype):
    image = spec(2, 64, 96, 3, dtype=dtype)
    _, features = shapes(FeaturePyramid(architecture), image)
    assert features.shape == (2, 8, 12, 384)
    assert features.dtype == jnp.float32


@pytest.mark.parametrize("size", SIZES)
def test_output_shapes(size):
    height, width = size
    grid = (2, height // 8, width // 8)
    features, image = spec(*grid, 384), spec(2, *size, 3)
    _, outputs = shapes(Networks(), features, image, train=False)
    codes = {
        "local_code": (2, height // 32, width // 32, 1536),
        "global_code": (2, 64),
    }
    maps = ("features", "local", "predicted_global", "global_")
    found = {name: output.shape for name, output in outputs.items()}
    assert found == dict.fromkeys(maps, (*grid, 384)) | codes
    for output in outputs.values():
        assert output.dtype == jnp.float32
    _, features = shapes(FeaturePyramid("resnet18"), image)
    assert features.shape == (*grid, 384)


@pytest.mark.parametrize(
    ("batch", "size"), [(32, (224, 256)), (8, (160, 1024)), (16, (160, 640))]
)
def test_encoder_of_an_oblong_image_can_be_trained(batch, size):
    """Its last kernel is as large as the grid that it sees: 7 x 8, 5 x 32, 5 x 20."""
    model, image = GlobalAutoencoder(8), spec(batch, *size, 3)
    variables, _ = shapes(model, image, train=False)

    def loss(variables, image):
        output, code = model.apply(variables, image, train=False)
        return output.sum() + code.sum()

    found = jax.eval_shape(jax.grad(loss), variables, image)
    kernel = found["params"]["enconv6"]["kernel"]
    assert kernel.shape == (size[0] // 32, size[1] // 32, 64, 64)


def test_parameter_counts():
    local, _ = shapes(LocalReconstructor(), spec(1, 32, 32, 384), train=False)
    global_, _ = shapes(GlobalAutoencoder(384), spec(1, 256, 256, 3), train=False)
    assert count(local["params"]) == 65_487_744
    assert count(global_["params"]) == 1_030_720
    both, _ = shapes(
        Networks(), spec(1, 32, 32, 384), spec(1, 256, 256, 3), train=False
    )
    assert count(both["params"]) == 65_487_744 + 1_030_720


@pytest.mark.parametrize(
    ("extent", "sizes"),
    [
        (64, (1, 2, 3, 7, 15, 8)),
        (96, (1, 3, 5, 11, 23, 12)),
        (128, (1, 4, 7, 15, 31, 16)),
        (256, (3, 8, 15, 31, 63, 32)),
    ],
)
def test_decoder_sizes(extent, sizes):
    assert decoder_sizes(extent) == sizes


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_output_activation(variables, activation):
    outputs = predict(variables, *small_inputs(), output_activation=activation)
    lowest = min(outputs["local"].min(), outputs["predicted_global"].min())
    assert lowest < 0 if activation == "identity" else lowest == 0
    assert outputs["global_"].min() < 0  # linear in either case


def test_relu_only_clips_the_identity(variables):
    inputs = small_inputs()
    relu = predict(variables, *inputs, output_activation="relu")
    identity = predict(variables, *inputs, output_activation="identity")
    for name in ("local", "predicted_global"):
        clipped = np.maximum(identity[name], 0)
        np.testing.assert_allclose(relu[name], clipped, atol=1e-6)


def test_evaluation_does_not_mix_images(variables):
    features, images = small_inputs()
    together = predict(variables, features, images)
    for i in range(len(images)):
        alone = predict(variables, features[i : i + 1], images[i : i + 1])
        for name in together:
            np.testing.assert_allclose(alone[name][0], together[name][i], atol=1e-5)


def test_training_updates_every_running_statistic(variables):
    apply = jax.jit(
        lambda *args: Networks(16).apply(*args, train=True, mutable=["batch_stats"])
    )
    outputs, updates = apply(variables, *small_inputs())
    old = jax.tree.leaves(variables["batch_stats"])
    new = jax.tree.leaves(updates["batch_stats"])
    assert len(old) == len(new) == 2 * (6 + 12)
    for before, after in zip(old, new, strict=True):
        assert (before != after).all()
    evaluated = predict(variables, *small_inputs())
    assert np.abs(outputs["global_"] - evaluated["global_"]).max() > 1e-2


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_keeps_float32_outside(train):
    features, images = small_inputs()
    variables, outputs = shapes(
        Networks(16, dtype=jnp.bfloat16),
        spec(*features.shape),
        spec(*images.shape),
        train=train,
    )
    for leaf in jax.tree.leaves((variables, outputs)):
        assert leaf.dtype == jnp.float32
    variables, pyramid = shapes(
        FeaturePyramid("resnet18", jnp.bfloat16), spec(*images.shape)
    )
    for leaf in jax.tree.leaves((variables, pyramid)):
        assert leaf.dtype == jnp.float32


def test_bfloat16_is_near_float32(variables):
    exact = predict(variables, *small_inputs())
    coarse = predict(variables, *small_inputs(), dtype=jnp.bfloat16)
    for name in ("local", "predicted_global", "global_"):
        error = np.linalg.norm(coarse[name] - exact[name])
        assert 0 < error < 0.05 * np.linalg.norm(exact[name])


def test_pyramid_takes_bytes_or_floats():
    model = FeaturePyramid("resnet18")
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (1, *SMALL, 3), dtype=np.uint8)
    as_float = (image / 255).astype(np.float32)
    variables = draw_variables(model, as_float)
    features = [jax.jit(model.apply)(variables, x) for x in (image, as_float)]
    np.testing.assert_allclose(*features, rtol=1e-4, atol=1e-5)
    assert np.abs(features[0]).max() > 0


def test_codes_are_what_the_decoders_read(variables):
    """Flax's own record of the layers says so."""
    features, image = small_inputs()
    outputs, state = Networks(16).apply(
        variables,
        features,
        image,
        train=False,
        capture_intermediates=lambda module, _: module.name in ("bn3", "bn2d6"),
        mutable=["intermediates"],
    )
    seen = state["intermediates"]
    (local,) = seen["local"]["bn3"]["__call__"]
    (global_,) = seen["global"]["bn2d6"]["__call__"]
    np.testing.assert_array_equal(outputs["local_code"], local)
    np.testing.assert_array_equal(
        outputs["global_code"], np.maximum(global_[:, 0, 0], 0)
    )


def test_pyramid_of_a_single_layer():
    """resnet18 has 128 channels in layer2 and 256 in layer3: together, as they are."""
    image = np.random.default_rng(3).integers(0, 256, (1, *SMALL, 3), dtype=np.uint8)
    both = FeaturePyramid("resnet18")
    variables = draw_variables(both, image)

    def extract(layers):
        model = FeaturePyramid("resnet18", layers=layers)
        return np.asarray(jax.jit(model.apply)(variables, image))

    whole = np.asarray(jax.jit(both.apply)(variables, image))
    np.testing.assert_array_equal(extract("layer2+layer3"), whole)
    layer2, layer3 = whole[..., :128], whole[..., 128:]
    # Each channel fills three bins.
    np.testing.assert_allclose(extract("layer2"), layer2.repeat(3, -1), rtol=1e-5)
    # Two channels fill three bins: one, the mean of both, the other.
    first, second = layer3[..., ::2], layer3[..., 1::2]
    expected = np.stack([first, (first + second) / 2, second], -1)
    found = extract("layer3").reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
