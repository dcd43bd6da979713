"""What must hold before JAX is imported, and what several modules share."""

from __future__ import annotations

import os
import shutil
import tempfile

# Programs that tests start find what this process, or another one, has compiled.
COMPILED = tempfile.mkdtemp(prefix="compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network

import pytest  # noqa: E402

from tests import runs, trees  # noqa: E402


def pytest_unconfigure():
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A root in MVTec AD's layout; read-only.

    bottle: 3 batches of 4 an epoch, 7 test images; cable: 2 batches, 5 test images.
    """
    root = tmp_path_factory.mktemp("data") / "mvtec_ad"
    trees.write_mvtec_ad(root, "bottle", train=14, good=3)
    trees.write_mvtec_ad(root, "cable", train=10, good=4, defects=["cut"], per_defect=1)
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """A finished run; read-only: tests change copies of it (`runs.copy`)."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = runs.make_config(data)
    return runs.Run(workdir, config, runs.train(config, workdir))
