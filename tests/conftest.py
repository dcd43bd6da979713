"""What must hold before JAX is imported, and what several modules share."""

from __future__ import annotations

import os
import shutil
import tempfile

# Programs that tests start find what this process, or another one, has compiled.
COMPILED = tempfile.mkdtemp(prefix="compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Toy networks take longer to compile than to train: what saves compile time, and keeps
# the steps about as fast. Programs that are given these variables do the same.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),  # the last one of a name holds
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network

import pytest  # noqa: E402

from tests import runs, trees  # noqa: E402

# From the longest one down, so that no process is left with one of them at the end.
LONG_FILES = [
    *("test_parallel", "test_hosts", "test_sweep", "test_experiment", "test_parity"),
    *("test_efficientad", "test_draem", "test_end_to_end", "test_loss_inspection"),
    *("test_winograd", "test_layers"),
]


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


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
