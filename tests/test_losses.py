from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ulsad_jax.methods.ulsad import losses
from ulsad_jax.runtime.errors import UserError

SHAPE = (3, 4, 5, 6)


def draw_outputs(seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    names = ("features", "local", "predicted_global", "global_")
    return {name: rng.normal(size=shape).astype(np.float32) for name in names}


def cosine(a, b):
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / norms


def attend(queries, keys):
    """Position by position, in float64."""
    b, h, w, c = queries.shape
    q, k = (x.astype(float).reshape(b, h * w, c) for x in (queries, keys))
    out = np.zeros_like(q)
    for image, i in np.ndindex(b, h * w):
        scores = np.exp(k[image] @ q[image, i] / np.sqrt(c))
        out[image, i] = scores @ k[image] / scores.sum()
    return out.reshape(queries.shape)


def entry(term, weight=1.0, **hyperparameters):
    return {"term": term, "weight": weight, **hyperparameters}


def full_config():
    return {
        "local": entry("local", 0.5, cosine_weight=0.2),
        "attention": entry("attention", 2.0, cosine_weight=0.3),
        "consistency": entry("consistency", 3.0),
    }


@pytest.mark.parametrize("cosine_weight", [0.0, 0.5, 2.0])
def test_distance_closed_forms(cosine_weight):
    a = draw_outputs()["local"]

    def distance(a, b):
        return losses.distance(a, b, cosine_weight=cosine_weight)

    energy = np.square(a).mean(-1)
    np.testing.assert_allclose(distance(a, a), 0, atol=1e-5)
    expected = 4 * energy + 2 * cosine_weight
    np.testing.assert_allclose(distance(a, -a), expected, rtol=1e-5)
    expected = 4 * energy  # the same direction
    np.testing.assert_allclose(distance(a, 3 * a), expected, rtol=1e-4, atol=1e-5)
    zero = np.zeros_like(a)  # its cosine is 0, as in PyTorch
    np.testing.assert_allclose(distance(a, zero), energy + cosine_weight, rtol=1e-5)
    np.testing.assert_allclose(distance(zero, zero), cosine_weight)


def test_distance_of_random_vectors():
    outputs = draw_outputs()
    a, b = outputs["local"], outputs["global_"]
    expected = np.square(a - b).mean(-1) + 0.7 * (1 - cosine(a, b))
    ours = losses.distance(a, b, cosine_weight=0.7)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6])
def test_distance_has_finite_gradients_at_tiny_vectors(scale):
    b = draw_outputs()["local"]
    for a in (scale * b, scale * draw_outputs(1)["local"]):
        gradients = jax.grad(
            lambda a, b: losses.distance(a, b, cosine_weight=0.5).sum(), argnums=(0, 1)
        )
        for pair in ((a, b), (b, a), (a, a)):
            assert all(np.isfinite(g).all() for g in gradients(*pair))


def test_attention_against_loops():
    outputs = draw_outputs()
    q, k = outputs["global_"], outputs["features"]
    np.testing.assert_allclose(losses.attention(q, k), attend(q, k), atol=1e-5)


def test_attention_of_one_constant_is_that_constant():
    x = np.broadcast_to(draw_outputs()["features"][:, :1, :1], SHAPE)
    np.testing.assert_allclose(losses.attention(x, x), x, rtol=1e-5)


def test_attention_reads_one_key_when_it_fits_best():
    x = 100 * np.eye(6, dtype=np.float32).reshape(1, 2, 3, 6)
    np.testing.assert_allclose(losses.attention(x, x), x, atol=1e-4)
    order = np.array([3, 1, 5, 0, 2, 4])
    queries = x.reshape(6, 6)[order].reshape(x.shape)
    np.testing.assert_allclose(losses.attention(queries, x), queries, atol=1e-4)


def test_terms_by_their_formulas():
    outputs = draw_outputs()
    x, r, p, g = (
        outputs[name] for name in ("features", "local", "predicted_global", "global_")
    )
    for term, (a, b) in {
        losses.local_term: (x, r),
        losses.attention_term: (attend(x, x), attend(g, x)),
        losses.consistency_term: (g, p),
    }.items():
        expected = np.square(a - b).mean(-1) + 0.5 * (1 - cosine(a, b))
        np.testing.assert_allclose(term(outputs), expected.mean((1, 2)), rtol=1e-4)


def test_dfr_is_the_local_term_without_cosine():
    outputs = draw_outputs()
    dfr = losses.make_loss_fn({"dfr": entry("local", cosine_weight=0.0)})
    total, means = dfr(outputs)
    expected = np.square(outputs["features"] - outputs["local"]).mean()
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert means.keys() == {"dfr"}


def test_total_weights_the_means():
    outputs = draw_outputs()
    total, means = losses.make_loss_fn(full_config())(outputs)
    assert float(means["local"]) == pytest.approx(
        float(losses.local_term(outputs, cosine_weight=0.2).mean()), rel=1e-6
    )
    weighted = 0.5 * means["local"] + 2 * means["attention"] + 3 * means["consistency"]
    assert float(total) == pytest.approx(float(weighted), rel=1e-6)


def test_one_term_twice_under_two_names():
    config = {"a": entry("local", cosine_weight=0.0), "b": entry("local", 0.25)}
    total, means = losses.make_loss_fn(config)(draw_outputs())
    assert float(total) == pytest.approx(float(means["a"] + 0.25 * means["b"]))
    assert means["a"] != means["b"]


def test_gradient_of_the_total_is_the_weighted_sum():
    outputs = draw_outputs()
    config = full_config()

    def gradient(config):
        return jax.grad(lambda o: losses.make_loss_fn(config)(o)[0])(outputs)

    single = {
        name: gradient({name: entry_ | {"weight": 1.0}})
        for name, entry_ in config.items()
    }
    expected = jax.tree.map(
        lambda *parts: sum(
            entry_["weight"] * part
            for entry_, part in zip(config.values(), parts, strict=True)
        ),
        *single.values(),
    )
    ours = gradient(config)
    for name in ("local", "predicted_global", "global_"):
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-6)
        assert np.abs(ours[name]).max() > 0


@pytest.mark.parametrize("rows", [[0, 1], [1], [0, 2]])
def test_masked_rows_do_not_count(rows):
    outputs = draw_outputs()
    padded = {name: value.copy() for name, value in outputs.items()}
    valid = np.isin(np.arange(SHAPE[0]), rows)
    for value in padded.values():
        value[~valid] = 0
    loss_fn = losses.make_loss_fn(full_config())
    total, means = loss_fn(padded, jnp.asarray(valid))
    expected, expected_means = loss_fn({k: v[rows] for k, v in outputs.items()})
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    for name in means:
        assert float(means[name]) == pytest.approx(
            float(expected_means[name]), rel=1e-5
        )


def test_a_batch_of_padding_only_is_zero():
    total, _ = losses.make_loss_fn(full_config())(draw_outputs(), jnp.zeros(3, bool))
    assert float(total) == 0


@pytest.fixture
def own_terms(tmp_path, monkeypatch):
    (tmp_path / "own_terms.py").write_text(
        "def power(outputs, *, exponent=2):\n"
        "    return (abs(outputs['local']) ** exponent).mean((1, 2, 3))\n"
        "def anything(outputs, **options):\n"
        "    return outputs['local'].mean((1, 2, 3)) + len(options)\n"
        "def scalar(outputs):\n"
        "    return outputs['local'].mean()\n"
        "def nothing():\n"
        "    return 0\n"
        "def keywords(*, a=1):\n"
        "    return a\n"
        "def ramp(outputs, *, step, length):\n"
        "    share = step / length\n"
        "    return share * (share < 1) * outputs['local'].mean((1, 2, 3)) + (\n"
        "        (share >= 1) * outputs['local'].mean((1, 2, 3)))\n"
        "def given(outputs, *, step, image, key):\n"
        "    import jax\n"
        "    drawn = jax.random.uniform(key, (len(outputs['local']),))\n"
        "    return drawn + image.mean((1, 2, 3)) + step\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_own_term(own_terms):
    outputs = draw_outputs()
    config = {"mine": entry("own_terms:power", 0.1, exponent=3), "l": entry("local")}
    total, means = losses.make_loss_fn(config)(outputs)
    expected = (np.abs(outputs["local"]) ** 3).mean()
    assert float(means["mine"]) == pytest.approx(expected, rel=1e-5)
    assert float(total) == pytest.approx(0.1 * expected + float(means["l"]), rel=1e-5)


def test_own_term_that_takes_any_hyperparameter(own_terms):
    outputs = draw_outputs()
    config = {"mine": entry("own_terms:anything", a=1, b=2)}
    total, _ = losses.make_loss_fn(config)(outputs)
    assert float(total) == pytest.approx(2 + outputs["local"].mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "at least one entry.*local, attention, consistency"),
        ({"a": entry("huber")}, r"losses\.a\.term.*local, attention, consistency"),
        ({"a": entry("local", lam=1)}, r"losses\.a .*cosine_weight.*\['lam'\]"),
        ({"a": {"term": "local"}}, r"losses\.a .*Add 'weight'"),
        ({"a": {"weight": 1.0}}, r"losses\.a .*Add 'term'"),
        ({"a": "local"}, r"losses\.a .*dictionary.*\{\"term\": 'local', \"weight\": 1"),
        ({"a": entry("no_such_module:f")}, "importable.*no_such_module.*PYTHONPATH"),
        ({"a": entry("own_terms:g")}, "importable.*'g'.*Correct the name"),
        ({"a": entry("own_terms:power", base=2)}, r"exponent.*\['base'\]"),
        ({"a": entry("locla")}, r"found 'locla'.*Did you mean 'local'\?"),
        ({"a": entry("own_terms:powr")}, r"importable.*Did you mean 'power'\?"),
        (
            {"a": entry("own_terms:power", exponnet=2)},
            r"\['exponnet'\].*Did you mean 'exponent'\?",
        ),
        ({"a": entry("own_terms:nothing")}, r"outputs first, found \(\)"),
        ({"a": entry("own_terms:keywords")}, r"outputs first, found \(\*, a=1\)"),
    ],
)
def test_config_errors(own_terms, config, message):
    with pytest.raises(UserError, match=message):
        losses.make_loss_fn(config)


def test_own_term_of_the_wrong_shape(own_terms):
    loss_fn = losses.make_loss_fn({"mine": entry("own_terms:scalar")})
    with pytest.raises(UserError, match=r"'mine'.*\(3,\), float32, found shape \(\)"):
        loss_fn(draw_outputs())


def test_step_reaches_the_terms_that_ask_for_it(own_terms):
    outputs = draw_outputs()
    config = {"s": entry("own_terms:ramp", 2.0, length=8), "l": entry("local")}
    loss_fn = jax.jit(losses.make_loss_fn(config))
    plain = outputs["local"].mean()
    for step, share in ((0, 0), (2, 0.25), (8, 1), (99, 1)):
        total, means = loss_fn(outputs, step=step)
        assert float(means["s"]) == pytest.approx(share * plain, rel=1e-5)
        expected = 2 * share * plain + float(means["l"])
        assert float(total) == pytest.approx(expected, rel=1e-5)


def test_numbers_replace_those_of_the_config():
    outputs, config = draw_outputs(), full_config()
    numbers = {"local": {"weight": 4.0}, "consistency": {"cosine_weight": 0.1}}
    expected = losses.make_loss_fn(
        config
        | {
            "local": entry("local", 4.0, cosine_weight=0.2),
            "consistency": entry("consistency", 3.0, cosine_weight=0.1),
        }
    )(outputs)
    loss_fn = losses.make_loss_fn(config)
    found = jax.jit(lambda numbers: loss_fn(outputs, numbers=numbers))(numbers)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
    )
    before, _ = losses.make_loss_fn(config)(outputs)
    assert float(loss_fn(outputs)[0]) == float(before)


def test_numbers_vary_in_one_program():
    outputs, loss_fn = draw_outputs(), losses.make_loss_fn(full_config())
    weights = jnp.array([0.0, 0.5, 2.0])
    totals = jax.vmap(lambda w: loss_fn(outputs, numbers={"local": {"weight": w}})[0])
    expected = [
        loss_fn(outputs, numbers={"local": {"weight": float(w)}})[0] for w in weights
    ]
    np.testing.assert_allclose(totals(weights), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"locla": {"weight": 1.0}}, r"\(local, attention, consistency\), found locla"),
        ({"local": {"weigth": 1.0}}, r"losses\.local .*cosine_weight.*'weigth'"),
    ],
)
def test_numbers_of_nothing(numbers, message):
    with pytest.raises(UserError, match=message):
        losses.make_loss_fn(full_config())(draw_outputs(), numbers=numbers)


@pytest.mark.parametrize("keyword", losses.GIVEN)
def test_what_is_given_is_not_a_hyperparameter(own_terms, keyword):
    config = {"s": entry("own_terms:given", **{keyword: 3})}
    with pytest.raises(UserError, match=rf"losses\.s without `{keyword}`.*found 3"):
        losses.make_loss_fn(config)


def test_image_and_key_reach_the_terms_that_ask_for_them(own_terms):
    outputs, image = draw_outputs(), np.full((3, 32, 40, 3), 7, np.uint8)
    config = {name: entry("own_terms:given") for name in "ab"}
    loss_fn = jax.jit(losses.make_loss_fn(config))
    found = []
    for seed in (0, 0, 1):
        key = jax.random.key(seed)
        _, means = loss_fn(outputs, step=2, image=image, key=key)
        found.append([float(means[name]) - 7 - 2 for name in "ab"])
        assert all(0 < number < 1 for number in found[-1])
    assert found[0] == found[1]
    assert len({number for pair in found for number in pair}) == 4


@pytest.mark.parametrize(
    ("term", "found"),
    [
        (lambda outputs, *, epsilon: outputs["features"] ** epsilon, "TypeError"),
        (lambda outputs, *, epsilon: outputs["features"] - jnp.ones(5), "shapes"),
    ],
)
def test_a_term_that_cannot_compute(term, found, monkeypatch):
    """One message with the term, its numbers and the line of its file."""
    monkeypatch.setitem(losses.TERMS, "mine", term)
    fields = {"term": "mine", "weight": 1.0, "epsilon": "1e-3"}
    loss_fn = losses.make_loss_fn({"a": fields})
    place = r"'a' \(mine\).*test_losses.py, line \d+.*epsilon"
    with pytest.raises(UserError, match=f"(?s){place}") as raised:
        loss_fn({"features": jnp.ones((2, 3, 3, 4))})
    assert found in str(raised.value)
