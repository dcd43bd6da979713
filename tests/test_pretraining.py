import json
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from configs import pretrain
from ulsad_jax import pretrained
from ulsad_jax.errors import Interrupted, UserError
from ulsad_jax.pretraining import loop, objectives, scenes, shapes, views

TINY = {
    "scenes.count": 64,
    "scenes.size": 40,
    "view_size": 32,
    "batch_size": 4,
    "num_steps": 4,
    "checkpoint_every": 2,
}


def make_config(**fields):
    config = pretrain.get_config()
    config.update_from_flattened_dict(TINY | fields)
    return config


@pytest.fixture(scope="module")
def drawn():
    return jax.device_get(scenes.draw_scenes(jax.random.key(3), size=40, count=64))


@pytest.fixture(scope="module")
def pair(drawn):
    """Views of every scene."""
    keys = jax.random.split(jax.random.key(0), len(drawn.image))
    cut = jax.vmap(lambda k, s, o: views.make_views(k, s, o, 32))
    return jax.device_get(jax.jit(cut)(keys, drawn, np.roll(drawn.image, 1, 0)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    loop.run(make_config(), workdir)
    return workdir


def test_scenes_follow_from_the_key(drawn):
    again = scenes.draw_scenes(jax.random.key(3), size=40, count=64)
    other = scenes.draw_scenes(jax.random.key(4), size=40, count=64)
    np.testing.assert_array_equal(again.image, drawn.image)
    assert np.mean(np.asarray(other.image) != drawn.image) > 0.9


def test_scenes_are_varied_and_labelled(drawn):
    assert drawn.image.shape == (64, 40, 40, 3)
    assert drawn.image.dtype == np.uint8
    assert len({image.tobytes() for image in drawn.image}) == 64
    grey = [np.ptp(image.astype(int), axis=-1).max() <= 1 for image in drawn.image]
    assert 0.15 < np.mean(grey) < 0.65
    assert len(np.unique(drawn.texture)) > 50
    assert drawn.texture.max() < scenes.TEXTURES
    assert len(np.unique(drawn.shape)) > 20
    assert drawn.shape.max() < scenes.SHAPES
    assert 0.05 < np.mean(drawn.shape > 0) < 0.7
    assert 0.1 < np.mean((drawn.shape == 0).all((1, 2))) < 0.5  # bare textures


def test_signed_distance_of_a_disc():
    disc = jax.tree.map(jnp.zeros_like, shapes.make_contour(jax.random.key(0)))
    disc = disc._replace(aspect=jnp.ones(()), is_glyph=jnp.zeros((), bool))
    axis = jnp.arange(-8.0, 9.0)
    place = jnp.stack(jnp.meshgrid(axis, axis), -1)
    found = shapes.signed_distance(disc, place, jnp.asarray(5.0))
    expected = jnp.hypot(place[..., 0], place[..., 1]) - 5
    near = expected > -2.5  # nearer to the outline than to the centre
    np.testing.assert_allclose(found[near], expected[near], atol=1e-4)
    assert (found[~near] < 0).all()


def test_first_view_has_no_defect(pair):
    assert not pair.defect[:, 0].any()
    share = np.mean(pair.defect[:, 1].max((1, 2)) > 0.5)
    assert 0.7 < share < 1  # tried three times, with 0.65


def test_views_show_the_scene(drawn, pair):
    assert pair.image.shape == (64, 2, 32, 32, 3)
    assert pair.image.min() >= 0
    assert pair.image.max() <= 1
    for row in range(64):  # classes are cut where the image is
        windows = np.lib.stride_tricks.sliding_window_view(drawn.texture[row], (32, 32))
        for view in range(2):
            assert (windows == pair.texture[row, view]).all((2, 3)).any()


def test_a_defect_is_where_something_changed():
    flat = jnp.full((32, 32, 3), 0.5)
    for seed in range(20):
        changed, defect = views._add_defect(jax.random.key(seed), flat, flat)
        difference = np.abs(np.asarray(changed - flat)).max(-1)
        assert (difference[np.asarray(defect) == 0] < 1e-6).all()
        assert (difference[np.asarray(defect) > 0.5] > 0.02).all()


def test_contrast_of_features_that_are_all_alike():
    """Nothing is told apart: the loss is the logarithm of the number of choices."""
    features = jnp.ones((4, 3, 3, 8))
    label = jnp.arange(9).reshape(1, 3, 3) + 9 * jnp.array([0, 1, 0, 1])[:, None, None]
    sound = jnp.zeros((4, 3, 3), bool)
    loss = objectives.contrast(features, label, sound, temperature=0.1)
    np.testing.assert_allclose(loss, np.log(18), rtol=1e-5)
    same = objectives.contrast(features, 0 * label, sound, temperature=0.1)
    np.testing.assert_allclose(same, 0, atol=1e-5)


def test_contrast_never_asks_for_defects():
    key = jax.random.key(0)
    first = jax.random.normal(key, (2, 3, 3, 16))
    second = first.at[:, 0].set(jax.random.normal(jax.random.key(1), (2, 3, 16)))
    label = jnp.arange(18).reshape(2, 3, 3)
    label = jnp.concatenate([label, label])
    features = jnp.concatenate([first, second])
    none = jnp.zeros((4, 3, 3), bool)
    asked = objectives.contrast(features, label, none, temperature=0.1)
    spared = objectives.contrast(
        features, label, none.at[2:, 0].set(True), temperature=0.1
    )
    assert spared < 0.2 < asked


def test_novelty_of_features_that_are_all_alike():
    """Every distance is 0: the loss counts the sound positions."""
    defect = jnp.zeros((4, 3, 3)).at[2, 0, :2].set(1.0)  # 7 sound in the first scene
    loss = objectives.novelty(jnp.ones((4, 3, 3, 8)), defect)
    np.testing.assert_allclose(loss, np.log(1 + 7), rtol=1e-5)


def test_novelty_is_distance_to_what_the_clean_view_shows_anywhere():
    """A defect that is far costs nothing; what only moved is no novelty."""
    clean = 3 * jax.random.normal(jax.random.key(0), (2, 3, 3, 16))
    moved = clean[:, ::-1]
    defect = jnp.zeros((4, 3, 3)).at[2:, 1, 1].set(1.0)
    foreign = moved.at[:, 1, 1].set(30.0)
    far = objectives.novelty(jnp.concatenate([clean, foreign]), defect)
    np.testing.assert_allclose(far, 0, atol=1e-5)
    near = objectives.novelty(jnp.concatenate([clean, moved]), defect)
    np.testing.assert_allclose(near, np.log(1 + 8), rtol=1e-3)
    # A stain of the clean view is no novelty, either.
    known = clean.at[:, 0, 0].set(30.0)
    stained = objectives.novelty(jnp.concatenate([known, foreign]), defect)
    assert stained > near


def test_novelty_without_defects_asks_for_nothing():
    features = jax.random.normal(jax.random.key(0), (4, 3, 3, 8))
    value, gradient = jax.value_and_grad(objectives.novelty)(
        features, jnp.zeros((4, 3, 3))
    )
    assert value == 0
    assert not np.asarray(gradient).any()


def test_resumed_is_uninterrupted(finished, tmp_path, monkeypatch):
    """Stopped by a signal after step 3, between checkpoints."""
    stop = []

    @contextmanager
    def signals():
        yield stop

    choose = loop._choose

    def choose_and_stop(scenes, config, step):
        if step == 2:
            stop.append(15)
        return choose(scenes, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_signals", signals)
        patch.setattr(loop, "_choose", choose_and_stop)
        with pytest.raises(Interrupted):
            loop.run(make_config(), tmp_path)
    loop.run(make_config(), tmp_path)
    ours, theirs = (
        pretrained.load_trunk(
            architecture="resnet18",
            source="file",
            repository="",
            path=str(folder / loop.TRUNK),
            seed=0,
        )
        for folder in (tmp_path, finished)
    )
    assert ours.identity.sha256 == theirs.identity.sha256


def test_the_file_says_where_it_comes_from(finished):
    path = finished / loop.TRUNK
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    trunk = pretrained.load_trunk(
        architecture="resnet18", source="file", repository="", path=str(path), seed=0
    )
    assert about["sha256"] == trunk.identity.sha256
    assert json.loads(about["config"]) == json.loads(
        json.dumps(make_config().to_dict())
    )
    assert about["seed"] == "0"


def test_another_config_in_the_same_folder(finished):
    with pytest.raises(UserError, match="another in"):
        loop.run(make_config(learning_rate=1.0), finished)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "resnet99"),
        ("view_size", 48),
        ("view_size", 24),
        ("batch_size", 100),
        ("num_steps", 0),
        ("temperature", 0.0),
        ("objectives.contrast", 0.0),
    ],
)
def test_fields_out_of_range(field, value, tmp_path):
    others = {"objectives.defects": 0.0, "objectives.novelty": 0.0}
    config = make_config(**{field: value} | others)
    with pytest.raises(UserError, match=field.split(".")[0]):
        loop.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_builtin_trunk_is_what_its_metadata_says():
    with safe_open(pretrained.BUILTIN, framework="numpy") as file:
        about = file.metadata()
    trunk = pretrained.load_trunk(
        architecture="resnet18", source="builtin", repository="", path="", seed=0
    )
    assert trunk.identity.source == "builtin:resnet18"
    assert trunk.identity.sha256 == about["sha256"]
    recipe = pretrain.get_config().to_dict()
    assert json.loads(about["config"]) == json.loads(json.dumps(recipe))
