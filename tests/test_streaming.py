"""Features that do not fit in memory: computed for each batch, to the same end."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

from tests import runs
from tests.test_experiment import needs_cpu, stop_training
from tests.test_features import make_batches
from ulsad_jax.runtime import devices as parallel
from ulsad_jax.trunks import sources
from ulsad_jax.trunks import weights as pretrained
from ulsad_jax.trunks.pyramid import FeaturePyramid, feature_shapes

COUNTS, SIZE = (5, 2), (64, 96)
STREAMING = {"train.feature_memory": 0}


@pytest.fixture(scope="module", params=[False, True], ids=["scaled", "whitened"])
def normals(request):
    """The same images kept and streamed."""
    trunk = pretrained.load_trunk(
        architecture="resnet18", source="random", repository="", path="", seed=0
    )
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, *SIZE, 3), np.uint8) for n in COUNTS]

    def make_arguments():
        batches = [make_batches(split, range(len(split)), 2) for split in images]
        return FeaturePyramid("resnet18"), trunk.variables, batches, COUNTS

    how = {"whiten": request.param, "devices": parallel.find_devices()}
    kept = sources.keep(*make_arguments(), **how)
    streamed = sources.stream(*make_arguments(), image_size=SIZE, **how)
    return kept, streamed


def test_streamed_is_kept(normals):
    kept, streamed = normals
    runs.assert_same_arrays(streamed.statistics, kept.statistics)
    for one, other in zip(kept[:2], streamed[:2], strict=True):
        assert one.features.shape[1:] == (8, 12, 384)
        assert len(one) == len(other)
        for rows in ([0], [1, 0, 1]):  # batches of other sizes, in other orders
            (images, expected), (same, found) = one.batch(rows), other.batch(rows)
            np.testing.assert_array_equal(same, images)
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_kept_are_as_large_as_told(normals):
    kept = normals[0].train
    shapes = feature_shapes(FeaturePyramid("resnet18"), SIZE)
    told = sources.count_bytes(len(kept), SIZE, shapes)
    assert told == kept.features.nbytes + kept.images.nbytes


def test_device_memory_is_shared(normals, monkeypatch):
    """Features go there if they are little of it; streamed ones never."""
    kept, streamed = normals
    rows = np.array([1, 0])
    size = sum(part.features.nbytes + part.images.nbytes for part in kept[:2])
    for memory, goes in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(sources, "device_bytes", lambda memory=memory: memory)
        placed = sources.place(kept, parallel.find_devices())
        for part, before in zip(placed[:2], kept[:2], strict=True):
            assert isinstance(part.features, jax.Array) == goes
            runs.assert_same_arrays(part.batch(rows), before.batch(rows))
        assert placed.statistics is kept.statistics
        assert sources.place(streamed, parallel.find_devices()) is streamed


@needs_cpu
def test_on_cpus_features_stay_where_they_are(normals):
    assert sources.place(normals[0], parallel.find_devices()) is normals[0]


@needs_cpu
def test_training_from_device_memory(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "device_bytes", lambda: 2**30)
    runs.train(finished.config, tmp_path / "run")
    runs.assert_same_category(tmp_path / "run", finished.workdir)


def test_memory_of_the_machine():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < parallel.host_bytes() <= physical


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, data):
    """A run as `finished`, but for its memory; read-only."""
    workdir = tmp_path_factory.mktemp("streamed") / "run"
    config = runs.make_config(data, STREAMING)
    return runs.Run(workdir, config, runs.train(config, workdir))


def test_streamed_training_is_that_of_kept_features(finished, streamed):
    """To rounding in the first steps, and to what Adam makes of it in later ones."""
    pairs = zip(
        runs.read_metrics(finished.workdir),
        runs.read_metrics(streamed.workdir),
        strict=True,
    )
    for (one, other), tolerance in zip(pairs, (1e-4, 5e-3, 5e-3, 5e-3), strict=True):
        assert other == pytest.approx(one, rel=tolerance)


@needs_cpu
def test_streamed_training_resumes(streamed, tmp_path, monkeypatch):
    stop_training(monkeypatch, streamed.config, tmp_path / "run", 2, 1)
    runs.train(streamed.config, tmp_path / "run")
    runs.assert_same_category(tmp_path / "run", streamed.workdir)


def test_kept_run_goes_on_streaming(finished, tmp_path, capsys):
    """The memory is the machine's; another one may go on with the run."""
    run = runs.copy(finished, tmp_path)
    config = run.config.copy_and_resolve_references()
    fields = STREAMING | {"train.num_epochs": runs.EPOCHS + 1}
    config.update_from_flattened_dict(fields)
    runs.train(config, run.workdir)
    assert "14 images: 1 MiB of memory, more than" in capsys.readouterr().out
    assert len(runs.read_metrics(run.workdir)) == runs.EPOCHS + 1
