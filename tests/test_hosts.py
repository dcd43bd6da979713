"""Several processes on one machine, which talk through the loopback device."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import runs
from ulsad_jax.runtime.errors import UserError

# Every process compiles for itself: more quickly still than other tests do.
FLAGS = "--xla_backend_optimization_level=0"
PATIENCE = 900  # seconds, for machines that are busy
LONG = {"train.num_epochs": 5000}


def start(config, workdir, count, *more, last=()):
    """Starts `count` processes of train.py; returns them and the files they write.

    `more` are flags of all, `last` those of the last one alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    category = config.dataset.category
    fields = [
        f"--config.{name}={config_value(config, name)}"
        for name in [*runs.FIELDS, "dataset.root", "dataset.cache_dir"]
    ]
    processes = []
    for i in range(count):
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={count}",
            f"--process_id={i}",
            *more,
            *(last if i == count - 1 else ()),
        ]
        log = workdir.parent / f"{workdir.name}-{count}-{i}.log"
        command = [
            sys.executable,
            "train.py",
            f"--config=configs/mvtec_ad.py:{category}",
        ]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, f"--workdir={workdir}", *fields, *flags],
                cwd=runs.REPOSITORY,
                env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FLAGS}"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        processes.append((process, log))
    return processes


def config_value(config, name):
    for part in name.split("."):
        config = config[part]
    return config


def wait(processes):
    """Exit statuses and outputs; what does not end is killed."""
    deadline = time.monotonic() + PATIENCE
    try:
        statuses = [p.wait(max(1, deadline - time.monotonic())) for p, _ in processes]
    finally:
        for process, _ in processes:
            process.kill()
    return statuses, [log.read_text() for _, log in processes]


def run(config, workdir, count, *more):
    statuses, outputs = wait(start(config, workdir, count, *more))
    assert statuses == [0] * count, outputs
    return outputs


def wait_for_epoch(workdir, epoch, processes):
    """Until an epoch is reported."""
    deadline = time.monotonic() + PATIENCE
    path = workdir / "bottle" / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= epoch:
            return
        if any(process.poll() is not None for process, _ in processes):
            break
        time.sleep(0.05)
    pytest.fail(f"no epoch {epoch}: {wait(processes)}")


def assert_same_scores(found, expected):
    """The global network drifts like its loss (see `runs`), the local one hardly."""
    for a, b in zip(runs.read_scores(found), runs.read_scores(expected), strict=True):
        assert a["image"] == b["image"]
        for name, tolerance in (
            ("local_score", {"rel": 1e-2}),
            ("score", {"abs": 5e-3}),
        ):
            assert float(a[name]) == pytest.approx(float(b[name]), **tolerance)


@pytest.fixture(scope="module")
def by_four(data, tmp_path_factory):
    """Half of a run, by four processes, each with a share of the state; read-only."""
    workdir = tmp_path_factory.mktemp("by_four") / "run"
    config = runs.make_config(data, {"train.num_epochs": 2})
    outputs = run(config, workdir, 4, "--config.parallel.shard_state")
    return workdir, outputs


@pytest.fixture(scope="module")
def by_two(data, by_four, tmp_path_factory):
    """The same, gone on with by two processes, each with all of the state."""
    workdir = shutil.copytree(by_four[0], tmp_path_factory.mktemp("by_two") / "run")
    run(runs.make_config(data), workdir, 2)
    return workdir


def test_four_processes_train_as_one(by_four, finished):
    workdir, outputs = by_four
    runs.assert_same_losses(workdir, finished.workdir, epochs=2)
    assert runs.read_steps(workdir) == [6]
    # The first process alone says and writes anything.
    assert "epoch 2/2" in outputs[0]
    assert not any("epoch" in output for output in outputs[1:])
    assert len(list((workdir / "bottle" / "tensorboard").iterdir())) <= 2


def test_two_go_on_where_four_stopped(by_two, finished):
    runs.assert_same_losses(by_two, finished.workdir)
    assert_same_scores(by_two, finished.workdir)
    assert runs.read_steps(by_two) == runs.read_steps(finished.workdir)


def test_one_goes_on_where_four_stopped(data, by_four, finished, tmp_path):
    workdir = shutil.copytree(by_four[0], tmp_path / "run")
    runs.train(runs.make_config(data), workdir)
    runs.assert_same_losses(workdir, finished.workdir)
    assert_same_scores(workdir, finished.workdir)
    found, expected = map(runs.read_checkpoint, (workdir, finished.workdir))
    shapes = [jax.tree.map(np.shape, tree) for tree in (found, expected)]
    assert shapes[0] == shapes[1]


def test_a_signal_to_one_stops_both_at_one_step_and_a_death_too(data, by_two, tmp_path):
    workdir = shutil.copytree(by_two, tmp_path / "run")
    config = runs.make_config(data, LONG)
    processes = start(config, workdir, 2)
    wait_for_epoch(workdir, runs.EPOCHS + 3, processes)
    with pytest.raises(UserError, match=f"found process {processes[0][0].pid} on "):
        runs.train(config, workdir)  # the processes of one run share it, others do not
    processes[1][0].send_signal(signal.SIGTERM)
    statuses, outputs = wait(processes)
    assert statuses == [128 + signal.SIGTERM] * 2, outputs
    step = runs.read_steps(workdir)[-1]
    assert all(f"Stopped by SIGTERM after step {step}." in out for out in outputs)

    epochs = len(runs.read_metrics(workdir))
    processes = start(config, workdir, 2, "--heartbeat_seconds=20")
    wait_for_epoch(workdir, epochs + 3, processes)
    processes[1][0].kill()
    statuses, outputs = wait(processes)
    assert statuses[0] not in (0, -signal.SIGKILL), outputs
    # Our own words where a connection broke, JAX's where it waited for the other one.
    assert re.search("until the end, lost one|another task died", outputs[0]), outputs

    assert runs.read_steps(workdir)[-1] >= step
    last = len(runs.read_metrics(workdir)) + 1
    runs.train(runs.make_config(data, {"train.num_epochs": last}), workdir)
    assert [m["epoch"] for m in runs.read_metrics(workdir)] == list(range(1, last + 1))
    assert (workdir / "report.html").exists()


def test_processes_with_other_configs(data, tmp_path):
    """They would train something that is neither, or wait for each other for ever."""
    last = ["--config.optimizer.learning_rate=1e-3", "--config.dataset.root=elsewhere"]
    config = runs.make_config(data)
    statuses, outputs = wait(start(config, tmp_path / "run", 2, last=last))
    assert statuses == [1, 1], outputs
    for output in outputs:
        assert "same config, found another one than process 0's in process 1." in output
        assert "elsewhere" not in output  # hosts may have the data in other places
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed"], "error: Expected to find and join the other processes"),
        (["--num_processes=2"], "--coordinator, --num_processes and --process_id tog"),
    ],
)
def test_processes_that_cannot_be_joined(tmp_path, flags, message):
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    command = [sys.executable, "train.py", "--config=configs/quickstart.py"]
    command += [f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*command, *flags],
        cwd=runs.REPOSITORY,
        env=outside,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
