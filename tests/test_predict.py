from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ulsad_jax
from tests import runs, trees
from ulsad_jax import predict, predictions
from ulsad_jax.detector import Detector
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring.result import columns

SCORES = columns(("global", "local"))
COLUMNS = ("image", "name", *SCORES, "width", "height", "error")
BAD = ("broken/bomb.png", "broken/cut.jpg", "broken/empty.png", "broken/text.png")


def read_json(folder):
    lines = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_bomb(path):
    """A few bytes that claim to be 20000 x 20000 pixels."""
    Image.new("RGB", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (20000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Eleven images, four of which are none, and files that are not looked at."""
    folder = tmp_path_factory.mktemp("mixed") / "images"
    broken = folder / "broken"
    trees.write_image(folder / "a.png", size=(50, 30))
    trees.write_image(folder / "a.jpg", size=(60, 90))
    trees.write_image(folder / "sub" / "deep" / "a.png", mode="RGBA")
    trees.write_image(folder / "sub" / "grey.png", mode="L")
    trees.write_image(folder / "sub" / "palette.png", mode="P")
    trees.write_image(broken / "tiny.png", size=(2, 3))
    wide = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    Image.fromarray(wide).save(folder / "sub" / 'wide, "16" bit é.png')
    (broken / "text.png").write_text("not an image")
    (broken / "empty.png").write_bytes(b"")
    trees.write_image(broken / "cut.jpg", size=(200, 200))
    (broken / "cut.jpg").write_bytes((broken / "cut.jpg").read_bytes()[:2000])
    write_bomb(broken / "bomb.png")
    (folder / "notes.txt").write_text("no image")
    trees.write_image(folder / ".hidden" / "a.png")
    trees.write_image(folder / ".b.png")
    return folder


@pytest.fixture(scope="module")
def predicted(finished, mixed, tmp_path_factory):
    """(exit status, folder) of everything that can be written."""
    output = tmp_path_factory.mktemp("predicted") / "new" / "results"
    flags = [f"--workdir={finished.workdir}", f"--output={output}"]
    kinds = ["--overlays", "--masks", "--maps"]
    return predict.main([*flags, os.fspath(mixed), *kinds]), output


@pytest.fixture(scope="module")
def detector(finished):
    return ulsad_jax.Detector.load(finished.workdir)


def test_bad_files_are_error_rows(predicted):
    status, output = predicted
    assert status == 1
    rows = runs.read_table(output / "scores.csv")
    assert len(rows) == 11
    assert [row["name"] for row in rows if row["error"]] == list(BAD)
    for row in rows:
        assert bool(row["score"]) != bool(row["error"])
    errors = {row["name"]: row["error"] for row in rows}
    assert "178956970 pixels" in errors["broken/bomb.png"]
    assert "truncated" in errors["broken/cut.jpg"]


def test_json_lines_say_what_the_table_says(predicted):
    rows, lines = runs.read_table(predicted[1] / "scores.csv"), read_json(predicted[1])
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        assert list(row) == list(line) == list(COLUMNS)
        for name, value in line.items():
            assert row[name] == ("" if value is None else str(value))


def test_rows_are_what_the_detector_says(predicted, detector):
    for line in read_json(predicted[1]):
        if line["error"] is None:
            result = detector(line["image"])
            row = result.row()
            for name in SCORES:
                assert line[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5)
            shape = (line["height"], line["width"])
            assert result.mask.shape == shape
            assert line["mask_share"] == line["mask_area"] / math.prod(shape)


def test_pictures_mirror_the_tree_at_the_inputs_size(predicted, detector, mixed):
    output = predicted[1]
    good = [
        row["name"]
        for row in runs.read_table(output / "scores.csv")
        if not row["error"]
    ]
    for kind, ending in (("overlays", ".png"), ("masks", ".png"), ("maps", ".tiff")):
        folder = output / kind
        found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert found == {name + ending for name in good}
    for name in good:
        result = detector(mixed / name)
        with Image.open(output / "maps" / f"{name}.tiff") as image:
            assert image.mode == "F"
            np.testing.assert_allclose(image, result.anomaly_map, rtol=1e-4, atol=1e-5)
        with Image.open(output / "masks" / f"{name}.png") as image:
            mask = np.asarray(image)
            np.testing.assert_array_equal(mask, result.mask * np.uint8(255))
        with Image.open(output / "overlays" / f"{name}.png") as image:
            assert np.asarray(image).shape == (*result.mask.shape, 3)


def test_nothing_is_drawn_unasked(finished, data, tmp_path):
    """And a data set's test images get the scores of the evaluation."""
    test, output = data / "bottle" / "test", tmp_path / "out"
    flags = [f"--workdir={finished.workdir}", f"--output={output}", "--category=bottle"]
    assert predict.main([*flags, str(test)]) == 0
    assert {path.name for path in output.iterdir()} == {"scores.csv", "scores.jsonl"}
    found = {row["image"]: row for row in runs.read_table(output / "scores.csv")}
    expected = runs.read_scores(finished.workdir)
    assert len(found) == len(expected)
    for row in expected:
        ours = found[row["image"]]
        assert ours["is_anomalous"] == row["is_anomalous"]
        for name in ("score", "normalized_score", "local_score", "global_score"):
            assert float(ours[name]) == pytest.approx(float(row[name]), rel=1e-4)


def test_the_program(finished, mixed, tmp_path):
    command = [sys.executable, "-m", "ulsad_jax.predict", "a.png", "sub/*.png"]
    flags = [f"--workdir={finished.workdir}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(
        [*command, *flags, "--image_threshold=1e9"],
        cwd=mixed,
        env={**os.environ, "PYTHONPATH": str(runs.REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 images, 0 anomalous, 0 failed.")
    assert len(read_json(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=W", "--output=O"], "required: INPUT"),
        (["I", "--workdir=W"], "required: --output"),
        (["I", "--output=O"], "required: --workdir"),
        (["I", "--workdir=W", "--output=O", "--overlay"], "--overlay"),
        (["I", "--workdir=W", "--output=O", "--selection=best"], "best"),
        (["I", "--workdir=W", "--output=O", "--image_threshold=high"], "high"),
        (["I", "--workdir=W", "--output=O", "--image_threshold=nan"], "finite number"),
        (["I", "--workdir=W", "--output=O", "--batch_size=0"], "batch_size"),
        (["I", "--workdir=I", "--output=O"], "the folder of a run"),
        (["I", "--workdir=W", "--output=O", "--category=cable"], "(bottle)"),
        (["I/none.png", "--workdir=W", "--output=O"], "none.png"),
        (["I/*.bmp", "--workdir=W", "--output=O"], "*.bmp"),
        (["I", "E", "--workdir=W", "--output=O"], "empty"),
        (["I", "--workdir=W", "--output=I/out"], "inside"),
        (["I", "--workdir=W", "--output=I"], "new or empty folder"),
        (["I", "--workdir=W", "--output=I/a.png"], "a file at"),
    ],
    ids=str,
)
def test_usage(finished, mixed, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    names = {"W": finished.workdir, "O": tmp_path / "out", "I": mixed}
    names["E"] = tmp_path / "empty"

    def fill(argument):
        head, equals, tail = argument.rpartition("=")
        first, slash, rest = tail.partition("/")
        return f"{head}{equals}{names.get(first, first)}{slash}{rest}"

    try:
        status = predict.main([fill(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def list_names(*arguments):
    inputs = predictions.find_inputs([os.fspath(a) for a in arguments])
    return [inputs.name(path) for path in inputs]


def test_damaged_checkpoint_is_one_line(finished, mixed, tmp_path):
    """Orbax's tasks would tell of it, each with a traceback, until the end."""
    workdir = runs.copy(finished, tmp_path).workdir
    last = workdir / "bottle" / "checkpoints" / str(3 * runs.EPOCHS)
    for path in (last / "model").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = [sys.executable, "-m", "ulsad_jax.predict", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, str(mixed), f"--output={tmp_path / 'out'}"],
        cwd=runs.REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: Expected checkpoint {last.name} in {last.parent} ")
    assert "delete it, and run the train.py command again" in line


@pytest.fixture
def tree(tmp_path):
    for name in ("x/1.png", "x/s/1.png", "y/1.png", "y/2.JPG", "y/[1].png", "y/3.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def test_names_of_inputs(tree):
    assert list_names(tree / "x") == ["1.png", "s/1.png"]
    assert list_names(tree / "x" / "s") == ["1.png"]
    assert list_names(tree / "x", tree / "y") == [
        *("x/1.png", "x/s/1.png", "y/1.png", "y/2.JPG", "y/[1].png")
    ]
    assert list_names(tree / "x/1.png", tree / "y/1.png") == ["x/1.png", "y/1.png"]
    assert list_names(tree / "y/1.png") == ["1.png"]
    assert list_names(tree / "y/[1].png") == ["[1].png"]
    assert list_names(tree / "y/[12].*") == ["1.png", "2.JPG"]
    assert list_names(tree / "**/1.png") == ["x/1.png", "x/s/1.png", "y/1.png"]
    assert list_names(tree / "y/3.txt") == ["3.txt"]  # asked for: an error row


def test_each_file_is_read_once(tree, monkeypatch):
    monkeypatch.chdir(tree)
    for arguments in (
        ["x", "x/s", "x/1.png"],
        ["x/1.png", "./x", "x/../x"],
        ["x", "x/**/*.png"],
        ["x/*", tree / "x" / "1.png"],
    ):
        names = list_names(*arguments)
        assert sorted(name.removeprefix("x/") for name in names) == ["1.png", "s/1.png"]
    assert list_names("y", "y/3.txt")[-1] == "3.txt"  # a search leaves it out


def test_inputs_are_found_as_they_are_read(tree):
    """A folder of any size is never a list."""
    inputs = iter(predictions.find_inputs([str(tree / "x"), str(tree / "y")]))
    next(inputs)
    (tree / "y" / "0.png").write_bytes(b"")
    assert "0.png" in [path.name for path in inputs]


def test_link_into_an_input_is_no_place_for_results(tree):
    (tree / "link").symlink_to(tree / "x")
    inputs = predictions.find_inputs([str(tree / "x")])
    with pytest.raises(UserError, match="inside"):
        predictions.check_output(tree / "link" / "out", inputs)


def test_links_to_folders_are_followed_but_never_in_circles(tree):
    for link, target in {
        "x/day": "../y",
        "x/s/up": "..",  # to a folder above
        "x/s/self": ".",
        "x/s/top": "../..",  # above where the search begins: not into it again
        "y/back": "../x",
        "x/gone": "nothing",
        "x/.hidden": "../y",
    }.items():
        (tree / link).symlink_to(target)
    y = ["1.png", "2.JPG", "[1].png"]
    found = ["1.png", *(f"day/{n}" for n in y), "s/1.png", *(f"s/top/y/{n}" for n in y)]
    assert list_names(tree / "x") == found
    assert sorted(list_names(tree / "x/**")) == sorted(found)
    assert sorted(list_names(tree / "x/**/*.*")) == sorted(found)
    assert list_names(tree / "x/day") == [*y, "back/1.png", "back/s/1.png"]
    assert list_names(tree / "x", tree / "x/day/2.JPG") == found


def test_results_in_a_folder_that_a_link_leads_to_are_refused(tree):
    (tree / "x" / "day").symlink_to(tree / "y")
    inputs = predictions.find_inputs([str(tree / "x")])
    with pytest.raises(UserError, match=r"inside .*day"):
        predictions.check_output(tree / "y" / "out", inputs)
    predictions.check_output(tree / "out", inputs)


def test_linked_folder_is_predicted_as_training_reads_it(finished, data, tmp_path):
    test = data / "bottle" / "test"
    for kind in test.iterdir():
        link = tmp_path / "in" / kind.name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(kind)
    flags = [f"--workdir={finished.workdir}", f"--output={tmp_path / 'out'}"]
    assert predict.main([*flags, str(tmp_path / "in")]) == 0
    names = {f"{row['name']}.png" for row in runs.read_scores(finished.workdir)}
    assert {row["name"] for row in read_json(tmp_path / "out")} == names


KINDS = {"overlays": True, "masks": True, "maps": True}


def test_names_that_endings_make_too_long(detector, tmp_path):
    folder = tmp_path / "in" / ("d" * 255) / ("漢" * 85)
    names = ["n" * 250 + str(i) + ".png" for i in range(3)]
    names += ["漢" * 83 + "é.png", "é" * 125 + ".png", "short.png"]
    for name in names:
        trees.write_image(folder / name)
    inputs = predictions.find_inputs([str(tmp_path / "in")])
    counts = predictions.predict_files(detector, inputs, tmp_path / "out", **KINDS)
    assert (counts.images, counts.failed) == (6, 0)
    rows = read_json(tmp_path / "out")
    assert {Path(row["name"]).name for row in rows} == set(names)
    for kind, ending in (("overlays", ".png"), ("masks", ".png"), ("maps", ".tiff")):
        within = tmp_path / "out" / kind / folder.relative_to(tmp_path / "in")
        found = [path.name for path in within.iterdir()]
        assert len(found) == 6 and f"short.png{ending}" in found
        assert all(name.endswith(ending) for name in found)


def test_picture_that_cannot_be_written_is_an_error_row(detector, tmp_path):
    """Its name is the folder of another picture, or the path becomes too long."""
    trees.write_image(tmp_path / "in" / "a.png")
    trees.write_image(tmp_path / "in" / "a.png.png" / "b.png")
    trees.write_image(tmp_path / "in" / "c.png")
    inputs = predictions.find_inputs([str(tmp_path / "in")])
    counts = predictions.predict_files(detector, inputs, tmp_path / "out", **KINDS)
    assert (counts.images, counts.failed) == (3, 1)
    rows = {row["name"]: row for row in read_json(tmp_path / "out")}
    assert str(tmp_path / "out/overlays/a.png.png") in rows["a.png.png/b.png"]["error"]
    assert rows["a.png.png/b.png"]["score"] is not None
    assert (tmp_path / "out/maps/c.png.tiff").exists()


def test_image_that_is_replaced_by_one_of_another_size(detector, tmp_path, monkeypatch):
    trees.write_image(tmp_path / "in" / "0.png")
    predict = detector.predict

    def replace(batch, **options):
        trees.write_image(tmp_path / "in" / "0.png", size=(20, 20))
        return predict(batch, **options)

    monkeypatch.setattr(detector, "predict", replace)
    inputs = predictions.find_inputs([str(tmp_path / "in")])
    predictions.predict_files(detector, inputs, tmp_path / "out", **KINDS)
    assert "another size" in read_json(tmp_path / "out")[0]["error"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_full_disk_stops_a_prediction(finished, tmp_path, monkeypatch, number):
    for i in range(3):
        trees.write_image(tmp_path / "in" / f"{i}.png")
    save, written = Image.Image.save, []

    def fail(image, path, *args, **options):
        if written:
            raise OSError(number, os.strerror(number))
        written.append(path)
        save(image, path, *args, **options)

    monkeypatch.setattr(Image.Image, "save", fail)
    flags = [f"--workdir={finished.workdir}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        predict.main([*flags, "--masks", str(tmp_path / "in")])
    assert f"error: Expected to read or write {tmp_path / 'out'}" in stopped.value.code
    assert [row["name"] for row in read_json(tmp_path / "out")] == ["0.png"]


def test_second_prediction_into_one_folder_is_refused(
    finished, mixed, tmp_path, monkeypatch, capsys
):
    """It began when the folder was still empty."""
    flags = [f"--workdir={finished.workdir}", f"--output={tmp_path / 'out'}"]
    load, statuses = Detector.load, []

    def load_after_another(*args, **options):
        monkeypatch.setattr(Detector, "load", load)
        statuses.append(predict.main([*flags, str(mixed / "a.png")]))
        return load(*args, **options)

    monkeypatch.setattr(Detector, "load", load_after_another)
    statuses.append(predict.main([*flags, "--masks", str(mixed / "sub")]))
    assert statuses == [0, 2]
    assert "the rows of another prediction" in capsys.readouterr().err
    assert [row["name"] for row in read_json(tmp_path / "out")] == ["a.png"]
    assert len(runs.read_table(tmp_path / "out" / "scores.csv")) == 1
    assert not (tmp_path / "out" / "masks").exists()
    assert predict.main([*flags, str(mixed / "a.png")]) == 2  # nor what a crash left


def test_warnings_of_a_decoder_name_the_file(finished, tmp_path):
    for i in range(6):
        trees.write_palette_with_transparency(tmp_path / "in" / f"{i}.png")
    flags = [f"--workdir={finished.workdir}", f"--output={tmp_path / 'out'}"]
    with pytest.warns(UserWarning, match="Palette images") as caught:
        assert predict.main([*flags, str(tmp_path / "in")]) == 0
    texts = [str(w.message) for w in caught if "Palette images" in str(w.message)]
    expected = [f"{tmp_path / 'in' / str(i)}.png: Palette images" for i in range(6)]
    assert sorted(text[: len(expected[0])] for text in texts) == expected


def test_file_that_goes_while_it_is_predicted(detector, tmp_path, monkeypatch):
    for i in range(3):
        trees.write_image(tmp_path / "in" / f"{i}.png")
    predict = detector.predict

    def remove(batch, **options):
        (tmp_path / "in" / "1.png").unlink()
        return predict(batch, **options)

    monkeypatch.setattr(detector, "predict", remove)
    inputs = predictions.find_inputs([str(tmp_path / "in")])
    counts = predictions.predict_files(
        detector, inputs, tmp_path / "out", overlays=True
    )
    assert (counts.images, counts.failed) == (3, 1)
    rows = read_json(tmp_path / "out")
    assert [row["error"] is None for row in rows] == [True, False, True]


def test_few_images_are_in_memory(detector, tmp_path, monkeypatch):
    """Decoding waits for the rows to be written."""
    image = tmp_path / "in" / "0.png"
    trees.write_image(image)
    for i in range(1, 60):
        (image.parent / f"{i}.png").write_bytes(image.read_bytes())
    decoded, ahead = 0, []
    prepare, write_row = detector.prepare, predictions._write_row

    def count(path):
        nonlocal decoded
        decoded += 1
        return prepare(path)

    def note(row, table, lines):
        write_row(row, table, lines)
        ahead.append(decoded - len(read_json(tmp_path / "out")))

    monkeypatch.setattr(detector, "prepare", count)
    monkeypatch.setattr(predictions, "_write_row", note)
    inputs = predictions.find_inputs([str(image.parent)])
    counts = predictions.predict_files(detector, inputs, tmp_path / "out")
    assert counts.images == decoded == len(ahead) == 60
    assert max(ahead) < 2 * detector.batch_size + predictions.THREADS + 1
