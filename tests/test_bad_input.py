"""What a person may get wrong on the command line, and what a full disk does."""

import errno
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import folder as folder_config
from tests import runs, trees
from ulsad_jax.data import prepare as builder
from ulsad_jax.data import records
from ulsad_jax.methods.ulsad import losses
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import data as data_lib
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs import run_files
from ulsad_jax.runtime import errors, files
from ulsad_jax.runtime.checkpoint import CheckpointStore
from ulsad_jax.runtime.errors import UserError, reported
from ulsad_jax.runtime.writer import Writer
from ulsad_jax.trunks import sources
from ulsad_jax.trunks import weights as pretrained

# Anything a file may be called that is not a path.
NAMES = ["a b", "a_b", "it's", '"q"', "ü漢字", "<b>&amp;", "-x", "a,b", "$(ls)", "100%"]


def make_folder_config(root: Path, **fields):
    config = folder_config.get_config(str(root))
    cache = {"dataset.cache_dir": str(root.parent / "cache")}
    config.update_from_flattened_dict(runs.FIELDS | cache | fields)
    return config


def write_pixels(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


# Roots and categories


@pytest.mark.parametrize(
    ("root", "category", "message"),
    [
        ("none", "all", "Expected the data root of 'mvtec_ad'.*nothing there.*none"),
        ("data/bottle", "all", r"Expected categories.*found none\. Give the folder"),
        ("data", "botle", r"\(bottle, cable\), found 'botle'"),
        ("data", "bottle,botle", r"\(bottle, cable\), found 'botle'"),
        ("data", "../x", r"\(bottle, cable\), found '\.\./x'"),
        ("data", "bottle,", r"\(bottle, cable\), found ''"),
        ("data", "", "config.dataset.category to be some text"),
    ],
)
def test_root_or_category_that_is_not_there(data, tmp_path, root, category, message):
    (tmp_path / "data").symlink_to(data)
    config = runs.make_config(tmp_path / root, category=category)
    with pytest.raises(UserError, match=message):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("category", ["cable, bottle", "cable,bottle,cable"])
def test_list_of_categories(data, category):
    config = runs.make_config(data, category=category)
    assert data_lib.list_categories(config) == ["cable", "bottle"]


def test_layout_of_another_data_set(data):
    config = runs.make_config(data, {"dataset.name": "mvtec_loco"})
    with pytest.raises(UserError, match=r"defects_config\.json.*or use the config of"):
        data_lib.open_data(config, "bottle")


@pytest.mark.parametrize("category", ["../x", "a/b", ".x", ""])
def test_synthetic_category_that_is_no_name(tmp_path, category):
    config = runs.make_config(
        tmp_path / "root", {"dataset.name": "synthetic"}, category=category
    )
    with pytest.raises(UserError, match="category"):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "root").exists()


# Images


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A run on images of every kind and name, with hidden files among them.

    Three normal test images have one stem.
    """
    root = tmp_path_factory.mktemp("odd") / "my images"
    trees.write_folder(root, train=4, test={"good": 2, "dent": 2, "sp <i>": 1})
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 41), dtype=np.uint8)
    colour = rng.integers(0, 256, (40, 41, 3), dtype=np.uint8)
    train = root / "train" / "good"
    write_pixels(train / "grey.png", grey)
    write_pixels(train / "rgba.png", colour, "RGBA")
    write_pixels(train / "palette.png", colour, "P")
    write_pixels(train / "16 bit.png", grey.astype(np.uint16) * 257)
    trees.write_image(root / "test" / "good" / "000.jpg")
    trees.write_image(root / "test" / "OK" / "000.png")
    for name in NAMES:
        trees.write_image(root / "test" / "dent" / f"{name}.png")
        trees.write_mask(root / "ground_truth" / "dent" / f"{name}_mask.png")
    (root / "ground_truth" / "dent" / "001_mask.png").unlink()
    for sub in ("train/good", "test/dent", "ground_truth/dent"):
        for name in (".DS_Store", "Thumbs.db", "._000.png"):
            (root / sub / name).write_text("no image")
    workdir = root.parent / "run"
    fields = {"evaluation.pictures_per_type": -1, "evaluation.write_maps": True}
    config = make_folder_config(root, **fields)
    return workdir, runs.train(config, workdir)


def test_images_of_every_kind_and_name(odd):
    workdir, _ = odd
    scores = runs.read_scores(workdir, files.safe_name("my images"))
    stems = {Path(row["image"]).stem for row in scores if row["type"] == "dent"}
    assert stems == {"000", "001", *NAMES}
    assert all(np.isfinite(float(row["score"])) for row in scores)


def test_pictures_stay_in_their_folder(odd):
    workdir, _ = odd
    pictures = workdir / files.safe_name("my images") / "pictures"
    kinds = {files.safe_name(kind) for kind in ("good", "dent", "sp <i>")}
    assert {f.name for f in pictures.iterdir()} == kinds
    found = sorted(pictures.rglob("*.png"))
    assert len(found) == 4 + 2 + 1 + len(NAMES)
    assert all(len(p.relative_to(pictures).parts) == 2 for p in found)


def test_images_of_one_stem_stay_apart(odd):
    workdir, _ = odd
    (category,) = run_files.read(workdir).categories
    names = {scored.name for scored in category.scores if scored.type == "good"}
    stems = ("001", "good/000.jpg", "good/000.png", "OK/000")
    assert names == {f"good/{stem}" for stem in stems}
    pictures = {scored.picture for scored in category.scores}
    assert len(pictures) == len(category.scores)
    assert all(picture.is_file() for picture in pictures)
    maps = list((workdir / "maps").rglob("*.tiff"))
    assert len(maps) == len(category.scores)


def test_image_without_a_mask_counts_for_image_metrics(odd):
    workdir, printed = odd
    metrics = runs.read_results(workdir)["categories"]["my images"]
    assert metrics["test_anomalous"] == 3 + len(NAMES)
    assert metrics["image_auroc"] is not None
    assert metrics["pixel_auroc"] is not None
    assert metrics["pixel_images_left_out"] == 1
    assert "pixel metrics leave out 1 anomalous images" in printed


def test_broken_image_of_one_category_keeps_the_others(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    cut_off(root / "cable" / "test" / "cut" / "000.png")
    config = runs.make_config(root, category="bottle,cable")
    with pytest.raises(UserError, match=r"readable image file.*cut/000\.png.*Replace"):
        runs.train(config, tmp_path / "run")
    assert runs.read_results(tmp_path / "run", "bottle")["metrics"]
    assert runs.read_steps(tmp_path / "run", "bottle")
    shutil.copy(data / "cable/test/cut/000.png", root / "cable/test/cut/000.png")
    assert "mean" in runs.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "Expected images under.*none"),
        (1, r"at least two objects.*found 1 .*train/good\)\. Add"),
        (2, r"batch of 4 training images, without the 1 .*, found 1\. Add images"),
        (4, r"found 3\. Set --config\.train\.batch_size to 3 or less"),
    ],
)
def test_too_few_training_images(tmp_path, count, message):
    root = trees.write_folder(tmp_path / "few", train=count)
    (root / "train" / "good").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=message):
        runs.train(make_folder_config(root), tmp_path / "run")


@pytest.mark.parametrize(
    ("fraction", "found", "advice"),
    [
        (0.99, "without the 11 for validation, found 1", "Lower"),
        (0.8, "without the 10 for validation, found 2", "Set .*size to 2 .*, or lower"),
    ],
)
def test_too_much_is_held_out(tmp_path, fraction, found, advice):
    root = trees.write_folder(tmp_path / "data", train=12)
    config = make_folder_config(root, **{"dataset.validation_fraction": fraction})
    message = rf"batch of 4 .*{found}\. {advice} --config\.dataset\.validation_fraction"
    with pytest.raises(UserError, match=message):
        runs.train(config, tmp_path / "run")


def test_name_that_is_not_utf_8(tmp_path):
    name = tmp_path / os.fsdecode(b"\xe9.png")
    with pytest.raises(UserError, match=r"UTF-8, found b'.*\\xe9\.png'.*Rename"):
        records.check([records.Record(name, "train")], tmp_path)


def test_undefined_metrics_are_said_in_the_run_s_own_words(tmp_path, capsys, recwarn):
    root = trees.write_folder(tmp_path / "sound", train=6, test={"good": 2})
    config = make_folder_config(root, **{"train.num_epochs": 1})
    runs.train(config, tmp_path / "run")
    assert "[sound] AUROC is undefined" in capsys.readouterr().out
    assert not [w for w in recwarn if "undefined" in str(w.message)]
    assert runs.read_results(tmp_path / "run")["mean"]["image_auroc"] is None


def test_files_that_are_not_used_are_named_in_every_run(tmp_path, capsys):
    root = trees.write_folder(tmp_path / "caps", test={"good": 1, "dent": 1})
    trees.write_images(root / "train" / "good" / "monday", 2)
    said = r"\[caps\] 2 files not used: .* train/good/monday/000\.png, .*001\.png\n"
    for _ in range(2):
        data_lib.open_data(make_folder_config(root), "caps")
        assert re.search(said, capsys.readouterr().out)
    shutil.rmtree(root / "train" / "good" / "monday")
    data_lib.open_data(make_folder_config(root), "caps")
    assert "not used" not in capsys.readouterr().out


# Configs


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (1.0, r"a dictionary, found 1\.0\. Write it as"),
        ({"term": "local", "weight": "1"}, r"mine\.weight to be a number, found '1'"),
        ({"term": "local", "weight": True}, r"mine\.weight to be a number"),
        ({"term": "local", "weight": math.nan}, r"mine\.weight to be a finite .*nan"),
        ({"term": "local", "weight": -math.inf}, r"mine\.weight to be a finite"),
        (
            {"term": "local", "weight": 1.0, "cosine_weight": math.inf},
            r"mine\.cosine_weight to be a finite number, found inf\. .*--config\.lo",
        ),
        (
            {"term": "math:pi", "weight": 1.0},
            "as a function.*not a callable",
        ),
        ({"term": ":f", "weight": 1.0}, "your own as module:attribute, found ':f'"),
        (
            {"term": "tests.test_bad_input:needs_alpha", "weight": 1.0},
            r"takes \(alpha, beta; without a default: alpha\), found \[\]",
        ),
    ],
)
def test_wrong_loss_entry(data, tmp_path, entry, message):
    config = runs.make_config(data)
    config.losses.mine = entry
    with pytest.raises(UserError, match=message):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def needs_alpha(outputs, *, alpha, beta=1.0):
    return alpha * beta * outputs["features"].mean((1, 2, 3))


def test_loss_entry_named_as_the_sum():
    with pytest.raises(UserError, match=r"another name than config\.losses\.total"):
        losses.make_loss_fn({"total": {"term": "local", "weight": 1.0}})


def test_config_of_one_s_own_that_lacks_a_field(data):
    config = runs.make_config(data)
    with config.unlocked():
        del config.train.dtype
    with pytest.raises(UserError, match=r"config\.train\.dtype.*default\.get_config"):
        config_lib.validate(config)


def test_cache_folder_must_be_named(data):
    config = runs.make_config(data, {"dataset.cache_dir": ""})
    with pytest.raises(UserError, match=r"config\.dataset\.cache_dir to be some text"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("program", "flags", "message", "traceback"),
    [
        ("train.py", ["--config=broken.py"], "no_such_field", True),
        ("train.py", ["--config=words.txt"], "error: Expected a config file", False),
        ("eval.py", ["--selection=first"], "best_validation_loss", False),
    ],
)
def test_command_line(tmp_path, program, flags, message, traceback):
    """An error of a config file's own is the one that needs its traceback."""
    (tmp_path / "broken.py").write_text(
        "from configs import quickstart\n\n"
        "def get_config():\n    return quickstart.get_config().no_such_field\n"
    )
    (tmp_path / "words.txt").write_text("no program at all")
    done = subprocess.run(
        [sys.executable, runs.REPOSITORY / program, *flags, "--workdir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(runs.REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert ("Traceback" in done.stderr) == traceback
    assert not (tmp_path / "run").exists()


# Work directories


@pytest.mark.parametrize("lost", ["bottle/checkpoints", "bottle"])
def test_evaluation_without_checkpoints(finished, tmp_path, lost):
    workdir = runs.copy(finished, tmp_path).workdir
    shutil.rmtree(workdir / lost)
    with pytest.raises(UserError, match=r"category 'bottle'.*those of none.*train\.py"):
        experiment.evaluate(workdir)
    assert not (workdir / "bottle" / "checkpoints").exists()


def test_evaluation_of_a_folder_that_has_another_name(odd, tmp_path):
    workdir = shutil.copytree(odd[0], tmp_path / "copy")
    root = trees.write_folder(tmp_path / "renamed", train=1)
    with pytest.raises(UserError, match=r"'renamed'.*my_images.*the name it had"):
        experiment.evaluate(workdir, root=str(root))
    assert not (workdir / "renamed").exists()


def test_trunk_is_made_anew_by_training_alone(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    trunk = run.workdir / files_of.TRUNK
    identity = pretrained.load_saved_trunk(trunk).identity
    trunk.unlink()
    with pytest.raises(UserError, match=r"the run's trunk.*train\.py command again"):
        experiment.evaluate(run.workdir)
    runs.train(run.config, run.workdir)
    assert pretrained.load_saved_trunk(trunk).identity == identity


def test_results_that_were_cut_off_are_made_anew(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    (run.workdir / "bottle" / "results.json").write_text("{")
    runs.train(run.config, run.workdir)
    assert runs.read_results(run.workdir) == runs.read_results(finished.workdir)


@pytest.mark.parametrize("name", ["config.json", "maps", ".lock"])
def test_category_named_like_a_file_of_the_run(tmp_path, name):
    root = trees.write_folder(tmp_path / name, train=6, test={"good": 2, "dent": 1})
    fields = {"train.num_epochs": 1, "evaluation.write_maps": True}
    workdir = tmp_path / "run"
    runs.train(make_folder_config(root, **fields), workdir)
    (folder,) = (path.parent for path in workdir.glob("*/checkpoints"))
    assert re.fullmatch(re.escape(name.strip(".")) + "-[0-9a-f]{8}", folder.name)
    assert len(list((workdir / "maps" / folder.name).rglob("*.tiff"))) == 3
    assert list(runs.read_results(workdir)["categories"]) == [name]
    assert str(workdir) in experiment.evaluate(workdir)
    assert files_of.find_category(workdir, name) == folder


# Disks


class Full:
    """Stands for `Path.write_bytes` on a disk with room for three bytes."""

    def __init__(self, monkeypatch):
        self._write = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda path, data: self(path, data))

    def __call__(self, path, data):
        self._write(path, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    files.replace(tmp_path / "a.json", "old")
    Full(monkeypatch)
    message = r"error: .*a\.json, found: the disk is full: free some space"
    with pytest.raises(SystemExit, match=message), reported():
        files.replace(tmp_path / "a.json", "new and longer")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_full_disk_at_the_start(data, tmp_path, monkeypatch):
    config = runs.make_config(data)
    with monkeypatch.context() as patch:
        Full(patch)
        message = r"config\.json, found: the disk is full"
        with pytest.raises(SystemExit, match=message), reported():
            runs.train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    runs.train(config, tmp_path / "run")  # there is room now


def test_full_disk_when_evaluating_keeps_earlier_results(
    finished, tmp_path, monkeypatch
):
    workdir = runs.copy(finished, tmp_path).workdir
    Full(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        experiment.evaluate(workdir)
    assert runs.read_scores(workdir) == runs.read_scores(finished.workdir)
    assert runs.read_results(workdir) == runs.read_results(finished.workdir)


def test_no_room_for_a_checkpoint(tmp_path, monkeypatch):
    """Orbax is not asked: of a full disk it makes pages of tracebacks."""
    array = {"x": jnp.zeros(1000)}
    with CheckpointStore(tmp_path, metric="loss", largest=False) as store:
        save = {"model": array, "optimizer": array, "progress": {}}
        save |= {"calibration": {"a": 1.0}, "metrics": {"loss": 1.0}}
        store.save(1, **save)
        store.wait()
        usage = shutil.disk_usage(tmp_path)._replace(free=7999)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="free disk space for a checkpoint"):
            store.save(2, **save)
        assert store.latest() == store.select(best=True) == 1
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: usage._replace(free=8000)
        )
        store.save(2, **save)
        store.wait()
        assert store.latest() == 2


def test_full_disk_while_preparing_data(tmp_path, monkeypatch):
    root = trees.write_folder(tmp_path / "data", train=6)

    def fail(*arguments):
        raise RuntimeError("write() failed: No space left on device; at byte 7")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "to_example", fail)
        with pytest.raises(SystemExit, match=r"cache.*the disk is full"), reported():
            runs.train(make_folder_config(root), tmp_path / "run")
    prepared = builder.find_builder("folder")(root=root, data_dir=tmp_path / "cache")
    assert not prepared.is_prepared()
    prepared.download_and_prepare()  # there is room now
    assert len(prepared.as_data_source("train")) == 6


def test_other_errors_of_libraries_stay_what_they_are():
    with pytest.raises(RuntimeError, match="else"), errors.storage_errors("/"):
        raise RuntimeError("something else")


def test_full_disk_for_tensorboard(tmp_path, monkeypatch):
    """tensorboardX would try again when the program ends, and print a traceback."""
    writer = Writer(tmp_path, "bottle")
    events = writer._tensorboard.file_writer.event_writer

    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    close = events.close
    monkeypatch.setattr(events, "flush", fail)
    with pytest.raises(OSError, match="No space left"), writer:
        pass
    assert events.close() is None  # what happens when the program ends
    monkeypatch.undo()
    close()


# Memory


@pytest.mark.parametrize(
    ("ask", "amount"),
    [
        (lambda: np.zeros(2**46), "512 TiB"),
        (lambda: _sort(2**45), "131072.00 GiB"),
        (lambda: bytearray(2**60), "what this command needs"),
    ],
    ids=["NumPy", "XLA", "Python"],
)
def test_memory_that_does_not_suffice(ask, amount):
    with pytest.raises(SystemExit) as stopped, reported():
        ask()
    message = stopped.value.code
    assert message.startswith(f"error: Expected memory for {amount}, found too little.")
    for field in ("train.batch_size", "evaluation.batch_size", "image_size"):
        assert f"config.{field}" in message
    for field in ("model.local_width", "train.feature_memory"):
        assert f"config.{field}" in message


def _sort(count):
    return jax.jit(lambda x: jnp.sort(jnp.broadcast_to(x, (count,))))(1.0)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="else"), reported():
        raise RuntimeError("something else")


# Ctrl-C


def test_ctrl_c_before_training(data, tmp_path, monkeypatch, capfd):
    config = runs.make_config(data)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def leave(status):
        raise SystemExit(status)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "extract", stop)
        patch.setattr(os, "_exit", leave)
        with pytest.raises(SystemExit) as stopped, reported():
            runs.train(config, tmp_path / "run")
    assert stopped.value.code == 130
    assert "Run the same command again" in capfd.readouterr().err
    runs.train(config, tmp_path / "run")
    assert runs.read_results(tmp_path / "run", "bottle")["metrics"]
