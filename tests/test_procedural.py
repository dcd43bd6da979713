from __future__ import annotations

import jax
import numpy as np
import pytest

from ulsad_jax.procedural import scenes
from ulsad_jax.procedural.pool import open_pool
from ulsad_jax.procedural.views import draw_views

SIZE, VIEW = 48, 32


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    return open_pool(folder, seed=3, formulas=20, instances=2, size=SIZE)


def test_images_are_a_function_of_seed_formula_and_instance(pool):
    formulas, instances = np.divmod(np.arange(64) % 40, 2)
    again = scenes.draw_images(3, formulas, instances, size=SIZE)
    np.testing.assert_array_equal(np.asarray(again)[:40], pool.reshape(40, SIZE, SIZE, 3))
    other = scenes.draw_images(4, formulas, instances, size=SIZE)
    assert (np.asarray(other) != np.asarray(again)).mean() > 0.8


def test_an_image_does_not_depend_on_those_drawn_with_it(pool):
    numbers = np.full(64, 7), np.full(64, 1)
    alone = np.asarray(scenes.draw_images(3, *numbers, size=SIZE))
    np.testing.assert_array_equal(alone[5], pool[7, 1])


def test_images_are_varied(pool):
    images = pool.reshape(40, -1).astype(np.float64)
    assert images.dtype == np.float64 and pool.dtype == np.uint8
    assert (images.std(1) > 2).all()  # nothing blank
    means = images.mean(1)
    assert means.std() > 20
    assert np.ptp(means) > 80
    distances = np.abs(images[:, None] - images[None]).mean(-1)
    assert distances[~np.eye(40, dtype=bool)].min() > 2  # no two alike
    colour = np.ptp(pool.astype(int), axis=-1).mean((2, 3)).ravel()
    assert (colour < 1).any() and (colour > 40).any()  # grey ones and vivid ones


def test_a_pool_is_drawn_once(tmp_path, monkeypatch):
    fields = {"seed": 1, "formulas": 2, "instances": 2, "size": SIZE}
    first = open_pool(tmp_path, **fields)
    monkeypatch.setattr("ulsad_jax.procedural.pool._draw", None)
    np.testing.assert_array_equal(open_pool(tmp_path, **fields), first)
    assert len(list(tmp_path.iterdir())) == 1


def test_views_agree_but_for_edits_light_and_noise(pool):
    images = pool[:, 0]
    views = jax.jit(draw_views, static_argnums=2)(jax.random.key(0), images, VIEW)
    first, second = np.asarray(views.images)
    edits = np.asarray(views.edits)
    assert first.shape == second.shape == (20, VIEW, VIEW, 3)
    assert edits.shape == (20, VIEW, VIEW)
    assert first.min() >= 0 and first.max() <= 1
    clean = edits < 1e-6
    assert 0.7 < clean.mean() < 1
    same = np.abs(first - second).mean(-1)[clean].mean()
    others = np.abs(first - np.roll(second, 1, 0)).mean()
    assert 0 < same < 0.6 * others
    assert edits.max() > 0.1
