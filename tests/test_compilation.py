"""What is compiled once: by a program, and by its second start."""

from __future__ import annotations

import collections
import logging
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

from tests import runs, trees
from ulsad_jax.nn import layers
from ulsad_jax.runtime import compilation

PROGRAM = """
import collections, sys

import jax
from jax import monitoring
from ulsad_jax.runtime import compilation

events = collections.Counter()
monitoring.register_event_listener(lambda name, **_: events.update([name]))
compilation.keep(sys.argv[1])
jax.jit(lambda x: 2 * x + 1)(3.0).block_until_ready()
for name in ("hits", "misses"):
    print(events[f"/jax/compilation_cache/cache_{name}"])
"""


def run(folder, **environment):
    """Cache hits and misses of a program."""
    kept = {k: v for k, v in os.environ.items() if "JAX_COMPILATION_CACHE" not in k}
    kept = {k: v for k, v in kept.items() if "JAX_PERSISTENT_CACHE" not in k}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in ran.stdout.split()]


def test_second_start_compiles_nothing(tmp_path):
    hits, misses = run(tmp_path / "cache")
    assert (hits, misses > 0) == (0, True)
    assert list((tmp_path / "cache" / "xla").iterdir())
    assert run(tmp_path / "cache") == [misses, 0]


def test_folder_of_the_environment_is_taken(tmp_path):
    run(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_where_nothing_can_be_written(tmp_path, kind):
    """A run's folder may be on another machine than the one that made it."""
    place = tmp_path / "cache"
    if kind == "file":
        place.write_text("")
    else:
        place.mkdir(mode=0o500)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write everywhere")
    assert run(place)[0] == 0


def test_weights_do_not_depend_on_how_their_draws_are_compiled():
    def draw(key):
        kernels = (
            layers.xavier_uniform,
            layers.torch_uniform,
            nn.initializers.he_normal(),
        )
        return [init(key, (3, 5, 16, 24)) for init in kernels]

    plainly = jax.jit(draw, compiler_options=compilation.run_once())
    for a, b in zip(
        plainly(jax.random.key(0)), jax.jit(draw)(jax.random.key(0)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """A root with two categories of as many images."""
    root = tmp_path_factory.mktemp("alike") / "mvtec_ad"
    for category in ("bottle", "cable"):
        trees.write_mvtec_ad(root, category, train=10)
    return root


def list_compiled(caplog):
    """What was compiled: names of functions, with the arguments' shapes and places."""
    pattern = r"Compiling jit\((.*?)\) with global shapes and types (.*)"
    found = (re.match(pattern, r.getMessage(), re.S) for r in caplog.records)
    return [match.groups() for match in found if match]


@pytest.mark.parametrize("method", ["ulsad", "padim"])
def test_categories_of_equal_shapes_share_every_program(
    method, alike, tmp_path, caplog
):
    """Those of networks of another width than any other test's, and all others."""
    fields = {"model.local_width": 12, "methods.padim.channels": 12}
    fields |= {"image_size": (64, 96), "train.num_epochs": 1}
    config = runs.make_config(alike, fields, category="all", method=method)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        runs.train(config, tmp_path / "run")
    assert runs.read_scores(tmp_path / "run", "cable")
    compiled = list_compiled(caplog)
    traced = re.findall(r"Finished tracing (\w+) for", caplog.text)
    caplog.clear()  # a failure would show all of it
    times = collections.Counter(compiled)
    assert [name for name, shapes in times if times[name, shapes] > 1] == []
    own = collections.Counter(name for name, _ in compiled)
    expected = {"init", "update", "step", "predict"}  # `step` validates
    assert {name: own[name] for name in expected} == dict.fromkeys(expected, 1)
    assert traced.count("predict") == 1
