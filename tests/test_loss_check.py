"""Terms that somebody wrote, tried before anything is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from tests import runs
from ulsad_jax.methods.ulsad import loss_check, losses
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import setup
from ulsad_jax.runtime.errors import UserError

HERE = "tests.test_loss_check"


def make_config(terms=None, **fields):
    """Small, with the published terms or with those of this file by name."""
    config = default.get_config()
    config.image_size = (64, 96)
    config.model.local_width = 8
    config.update_from_flattened_dict(fields)
    if terms is not None:
        for name in list(config.losses):
            del config.losses[name]
        for name in terms:
            config.losses[name] = {"term": f"{HERE}:{name}", "weight": 1.0}
    return config


def make(config):
    return setup.make(config_lib.resolve(config))


def check(config):
    """What is said before training."""
    return setup.check(make(config), config)


def draw_outputs(config):
    made = make(config)
    return loss_check.draw_outputs(made.method.networks, made.spec(8))


def rooted(outputs):
    return jnp.sqrt(jnp.abs(outputs["features"] - outputs["local"])).mean((1, 2, 3))


def hidden_root(outputs):
    x = outputs["local"]
    return jnp.where(x > 0, jnp.sqrt(x), 0).mean((1, 2, 3))


def logarithm(outputs):
    return jnp.log(outputs["local"]).mean((1, 2, 3))


def mean(outputs):
    return outputs["local"].mean()


def positions(outputs):
    return outputs["local"].mean(-1)


def counted(outputs):
    return (outputs["local"] > 1).sum((1, 2, 3))


def compared(outputs):
    return outputs["local"].mean((1, 2, 3)) > 0


def nothing(outputs):
    outputs["local"].mean((1, 2, 3))


def listed(outputs):
    return list(outputs["local"].mean((1, 2, 3)))


def misspelt(outputs):
    return outputs["globl_code"].mean(1)


def late(outputs, *, step):
    used = sum(outputs[name].mean((1, 2, 3)) for name in loss_check.SCORED)
    return jnp.where(step > 500, 1.0, 0.0) * used


def early(outputs, *, step):
    return jnp.where(step > 5, 0.0, 1.0) * outputs["local"].mean((1, 2, 3))


def codes(outputs):
    return outputs["global_code"].mean(1) + outputs["local_code"].mean((1, 2, 3))


def dead(outputs):
    return outputs["features"].mean((1, 2, 3))


def spread(outputs):
    each = outputs["local"].mean((1, 2, 3))
    return (each - each.mean()) ** 2


def spread_later(outputs, *, step):
    return jnp.where(step > 500, 1.0, 0.0) * spread(outputs)


def noisy(outputs, *, image, key):
    noise = jax.random.normal(key, outputs["local"].shape)
    errors = jnp.square(outputs["local"] + noise - outputs["features"])
    return errors.mean((1, 2, 3)) + image.mean((1, 2, 3))


def image_sum(outputs, *, image):
    return outputs["local"].mean((1, 2, 3)) * image.sum()


def chosen(outputs, *, share=0.5):
    return outputs["local"].mean((1, 2, 3)) * (2 if share > 0.3 else 1)


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_drawn_outputs_are_like_those_of_the_networks(activation):
    config = make_config(**{"model.output_activation": activation})
    drawn, images = draw_outputs(config)
    assert (images.shape, images.dtype) == ((2, 64, 96, 3), jnp.uint8)
    networks = make(config).method.networks
    image = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.uint8)
    x = jax.ShapeDtypeStruct((2, 8, 12, 384), jnp.float32)
    expected, _ = jax.eval_shape(
        lambda *a: networks.init_with_output(*a, train=False),
        jax.random.key(0),
        x,
        image,
    )
    assert jax.tree.map(lambda a: (a.shape, a.dtype), drawn) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )
    lowest = {name: float(value.min()) for name, value in drawn.items()}
    assert (lowest["local"] == 0) == (activation == "relu")
    assert lowest["global_code"] == 0 and lowest["global_"] < 0


def test_gradients_are_those_of_each_term_alone():
    """One term's gradient that is not finite leaves the others as they are."""
    config = make_config()
    config.losses.rooted = {"term": f"{HERE}:rooted", "weight": 1.0}
    outputs, image = draw_outputs(config)
    values, gradients = loss_check.differentiate(
        losses.make_loss_fn(config.losses), outputs, image, 0
    )
    total, means = losses.make_loss_fn(config.losses)(outputs)
    assert values == pytest.approx(
        {"total": float(total)} | {k: float(v) for k, v in means.items()}, rel=1e-5
    )
    for name, term in losses.TERMS.items():
        expected = jax.grad(lambda o, term=term: term(o).mean())(outputs)
        for output, found in gradients[name].items():
            np.testing.assert_allclose(found, expected[output], atol=1e-7)
    assert not np.isfinite(gradients["rooted"]["local"]).all()
    assert not any(gradients["rooted"]["global_"].ravel())


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("rooted", r"finite gradient.*'rooted' on random outputs.*to local.*sqrt\(x"),
        ("hidden_root", r"finite gradient.*'hidden_root'.*jnp\.where does not hide"),
        ("logarithm", r"finite value.*'logarithm' on random outputs, found -inf"),
        ("mean", r"'mean' \(.*:mean\).*shape \(2,\).*found shape \(\)\. Average over"),
        ("positions", r"shape \(2,\), float32, found shape \(2, 8, 12\)"),
        ("counted", r"found int32, which has no gradient"),
        ("compared", r"found bool, which has no gradient"),
        ("nothing", r"found NoneType\. Return a jax\.numpy array"),
        ("listed", r"found list\. Return a jax\.numpy array"),
        (
            "misspelt",
            r"features, .*global_code, .*\), found 'globl_code' in .*"
            r"test_loss_check\.py, line \d+.*Did you mean 'global_code'\?",
        ),
    ],
)
def test_terms_that_cannot_be_trained_with(term, message):
    with pytest.raises(UserError, match=message):
        check(make_config([term]))


def test_nothing_is_written_for_a_term_that_cannot_be_trained_with(data, tmp_path):
    config = runs.make_config(data)
    config.losses.mine = {"term": f"{HERE}:rooted", "weight": 1.0}
    with pytest.raises(UserError, match="finite gradient"):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_published_terms_train_everything():
    assert check(make_config()) == ""


@pytest.mark.parametrize(
    ("removed", "untrained"),
    [
        (["consistency"], ["local network (predicted_global)"]),
        (["attention"], []),  # consistency trains both networks
        (
            ["attention", "consistency"],
            ["the local network (predicted_global)", "all of the global network"],
        ),
    ],
)
def test_what_no_term_trains_is_said(removed, untrained):
    config = make_config()
    for name in removed:
        del config.losses[name]
    found = check(config)
    assert bool(found) == bool(untrained)
    assert all(text in found for text in untrained)


def test_a_weight_of_zero_trains_nothing():
    config = make_config(**{"losses.consistency.weight": 0.0})
    assert "predicted_global" in check(config)


def test_codes_alone_train_nothing_that_maps_are_made_of():
    found = check(make_config(["codes"]))
    assert "all of the local network (local, predicted_global)" in found
    assert "all of the global network (global_)" in found


def test_a_term_that_trains_nothing_is_said():
    config = make_config()
    config.losses.mine = {"term": f"{HERE}:dead", "weight": 1.0}
    assert check(config) == (
        "Loss term 'mine' has no gradient on random outputs: it trains nothing."
    )


def test_a_term_with_images_and_noise_of_its_own_is_tried():
    """Noise differs between an example alone and beside others: that says nothing."""
    config = make_config()
    config.losses.mine = {"term": f"{HERE}:noisy", "weight": 1.0}
    assert check(config) == ""


@pytest.mark.parametrize("term", ["spread", "spread_later", "image_sum"])
def test_a_term_of_the_batch_is_said(term):
    """It would be another loss in a filled batch, and under pmap."""
    config = make_config()
    config.losses.mine = {"term": f"{HERE}:{term}", "weight": 1.0}
    found = check(config)
    assert found.startswith("Loss term 'mine' gives an example another loss beside")
    assert found.count("\n") == 0


def test_python_conditions_on_a_traced_number():
    loss_fn = losses.make_loss_fn({"mine": {"term": f"{HERE}:chosen", "weight": 1.0}})
    outputs, _ = draw_outputs(make_config())
    with pytest.raises(UserError, match=r"until the step runs.*neither `if`.*Correct"):
        jax.jit(lambda n: loss_fn(outputs, numbers={"mine": {"share": n}}))(0.2)


def test_schedules_that_begin_or_end_with_nothing():
    assert check(make_config(["late"])) == ""
    found = check(make_config(["early"]))
    assert "predicted_global" in found and "(local" not in found
