from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ulsad_jax
from configs import sweep as sweep_config
from tests import runs
from ulsad_jax.runs import run as experiment
from ulsad_jax.runtime import lock
from ulsad_jax.runtime.errors import UserError, reported
from ulsad_jax.sweep import run as sweep

HOLD = """
import sys
from pathlib import Path
from ulsad_jax.runtime import lock

with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A new folder that another process holds, and the process."""
    folder = tmp_path / "new" / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        cwd=runs.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield folder, process
    process.kill()
    process.communicate()


def test_second_process_is_told_who_holds_it_until_that_is_killed(held):
    folder, process = held
    told = rf"found process {process.pid} on {re.escape(socket.gethostname())}, since 2"
    with pytest.raises(UserError, match=told), lock.hold(folder):
        pass
    assert (folder / ".lock").exists()
    process.kill()
    process.wait()
    assert (folder / ".lock").exists()
    with lock.hold(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_folder_that_stays_empty_is_not_left_behind(held):
    folder, process = held
    process.communicate(b"")
    assert process.returncode == 0
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    with pytest.raises(UserError), lock.hold(folder):
        raise UserError("something else")
    assert folder.exists()  # it was there before


def test_run_is_one_command_s(finished, data, tmp_path):
    """Training and evaluation write to it; prediction does not."""
    run = runs.copy(finished, tmp_path)
    with lock.hold(run.workdir):
        with pytest.raises(UserError, match=f"by one command at a time.*{os.getpid()}"):
            runs.train(run.config, run.workdir)
        with pytest.raises(UserError, match="Wait until it has ended, or give another"):
            experiment.evaluate(run.workdir)
        detector = ulsad_jax.Detector.load(run.workdir)
    image = data / "bottle" / "test" / "good" / "000.png"
    before = runs.read_scores(run.workdir)
    scores = {row["name"]: float(row["score"]) for row in before}
    assert detector(image).score == pytest.approx(scores["good/000"], rel=1e-5)
    experiment.evaluate(run.workdir)
    assert runs.read_scores(run.workdir) == before
    names = {path.name for path in run.workdir.iterdir()}
    assert names == {path.name for path in finished.workdir.iterdir()}


def test_sweep_is_one_command_s_and_so_are_its_members(data, tmp_path):
    config = sweep_config.add_sweep(runs.make_config(data, {"train.num_epochs": 1}))
    config.sweep.grid.seed = (0,)
    with (
        lock.hold(tmp_path / "sweep"),
        pytest.raises(UserError, match="at work in it"),
    ):
        sweep.train(config.copy_and_resolve_references(), tmp_path / "sweep")
    sweep.train(config.copy_and_resolve_references(), tmp_path / "sweep")
    member = tmp_path / "sweep" / "members" / "bottle-seed_0"
    (member / "results.json").unlink()
    with lock.hold(member), pytest.raises(UserError, match=re.escape(str(member))):
        sweep.train(config.copy_and_resolve_references(), tmp_path / "sweep")
    sweep.train(config, tmp_path / "sweep")
    assert (member / "results.json").exists()
    assert not list((tmp_path / "sweep").rglob(".lock"))


def test_file_of_a_killed_command_does_not_fill_a_folder(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("half a li")
    runs.train(runs.make_config(data, {"train.num_epochs": 1}), tmp_path / "run")


def test_holder_that_has_not_said_its_name_yet(tmp_path):
    with lock.hold(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(UserError, match="another process"), lock.hold(tmp_path):
            pass


def test_many_at_once(tmp_path):
    """None enters while another is inside, although each removes file and folder."""
    folder, inside, most, entered = tmp_path / "a" / "b", [], [], []

    def enter():
        for _ in range(200):
            try:
                with lock.hold(folder):
                    inside.append(1)
                    most.append(len(inside))
                    entered.append(1)
                    inside.pop()
            except UserError:
                pass

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(entered) >= 1


def test_folder_that_goes_while_it_is_made(tmp_path, monkeypatch):
    """Between mkdir's attempt and its look at what is there."""
    folder, made = tmp_path / "run", Path.mkdir

    def lose_once(path, *args, **kwargs):
        monkeypatch.undo()
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    monkeypatch.setattr(Path, "mkdir", lose_once)
    with lock.hold(folder):
        assert (folder / ".lock").exists()
    assert Path.mkdir is made and not folder.exists()


def test_link_to_nowhere_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError), lock.hold(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock.hold(tmp_path):
        pass
    told = capsys.readouterr().out
    assert told == (
        f"The file system of {tmp_path} has no locks: see to it that no other command "
        "writes there meanwhile.\n"
    )


def test_file_system_that_is_read_only(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")

    def fail(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        message = (
            r"error: Expected .*\.lock, found: the disk is read-only: give a folde"
        )
        with pytest.raises(SystemExit, match=message), reported():
            lock.hold(workdir).__enter__()


@pytest.mark.parametrize("below", ["", "run"])
def test_file_in_the_place_of_the_folder(data, tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="a file where a folder should"), reported():
        runs.train(runs.make_config(data), tmp_path / "file" / below)
