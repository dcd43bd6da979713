"""Layouts: small trees on disk -> records."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests import trees
from ulsad_jax.data import layouts
from ulsad_jax.data.layouts import magnetic_tile
from ulsad_jax.data.records import GOOD, TEST, TRAIN, VALIDATION, read_image, read_mask
from ulsad_jax.runtime.errors import UserError


def counts(records):
    return Counter((r.split, r.type) for r in records)


def by_name(records, split=TEST):
    return {r.name: r for r in records if r.split == split}


def read_all(records):
    """Opens every image and mask, as the builder does."""
    for record in records:
        size = read_image(record.image).shape[:2]
        for mask in record.masks:
            assert read_mask(mask, size=size)[0].any()


# What all layouts share.


def test_unknown_data_set(tmp_path):
    with pytest.raises(UserError, match=r"mvtec_ad, .*mvtec_loco, .*found 'mvtec'"):
        layouts.find_records("mvtec", tmp_path, "bottle")


@pytest.mark.parametrize("name", [n for n in layouts.known_layouts() if n != "table"])
def test_root_must_be_a_folder(tmp_path, name):
    with pytest.raises(UserError, match=r"folder, found nothing there: .*absent"):
        layouts.find_records(name, tmp_path / "absent", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder, found something else"):
        layouts.find_records(name, tmp_path / "file", "x")


@pytest.mark.parametrize("name", ["mvtec_ad", "mvtec_loco", "btad", "magnetic_tile"])
def test_no_category_found(tmp_path, name):
    with pytest.raises(UserError, match=f"categories of '{name}'.*found none"):
        layouts.find_categories(name, tmp_path)


def test_unknown_category_lists_those_found(tmp_path):
    trees.write_mvtec_ad(tmp_path, "cable")
    trees.write_mvtec_ad(tmp_path, "my_own")
    (tmp_path / "notes").mkdir()
    assert layouts.find_categories("mvtec_ad", tmp_path) == ["cable", "my_own"]
    with pytest.raises(UserError, match=r"\(cable, my_own\), found 'bottle'"):
        layouts.find_records("mvtec_ad", tmp_path, "bottle")


def test_a_category_may_have_test_images_alone(tmp_path):
    trees.write_mvtec_ad(tmp_path, "cable")
    shutil.rmtree(tmp_path / "cable/train")
    assert layouts.find_categories("mvtec_ad", tmp_path) == ["cable"]


@pytest.mark.parametrize(("name", "root"), [("mvtec_ad", "."), ("folder", "bottle")])
@pytest.mark.parametrize(
    "denied", ["test", "test/good", "train/good", "ground_truth/broken"]
)
def test_folder_that_may_not_be_read_is_named(
    tmp_path, monkeypatch, name, root, denied
):
    trees.write_mvtec_ad(tmp_path)
    folder = tmp_path / "bottle" / denied
    listdir, scandir = os.listdir, os.scandir  # which of them pathlib uses varies

    def refuse(function):
        def call(path="."):
            if Path(path) == folder:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path)

        return call

    monkeypatch.setattr(os, "listdir", refuse(listdir))
    monkeypatch.setattr(os, "scandir", refuse(scandir))
    with pytest.raises(UserError, match=f"{folder}: permission denied"):
        layouts.find_records(name, tmp_path / root, "bottle")


@pytest.mark.parametrize("lines", ["", "\n\n", ",,,,\n"])
def test_table_with_a_header_only(tmp_path, lines):
    path = tmp_path / "mine.csv"
    path.write_text(f"image,split,label,mask,type\n{lines}")
    with pytest.raises(UserError, match=rf"{path}, found the header alone.*no rows"):
        layouts.find_records("table", path, "mine")


def test_records_are_checked(tmp_path):
    trees.write_mvtec_ad(tmp_path)
    trees.write_images(tmp_path / "bottle" / "train" / "broken", 1)
    with pytest.raises(UserError, match="only normal images in the train split"):
        layouts.find_records("mvtec_ad", tmp_path, "bottle")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "bottle" / split)
        (tmp_path / "bottle" / split).mkdir()
    with pytest.raises(UserError, match=r"images under .*found none"):
        layouts.find_records("mvtec_ad", tmp_path, "bottle")


# MVTec AD and MPDD.


@pytest.mark.parametrize("name", ["mvtec_ad", "mpdd"])
def test_mvtec_ad(tmp_path, name):
    trees.write_mvtec_ad(tmp_path, mode="L")
    found = layouts.find_records(name, tmp_path, "bottle")
    assert counts(found) == {
        (TRAIN, GOOD): 4,
        (TEST, GOOD): 2,
        (TEST, "broken"): 2,
        (TEST, "scratch"): 2,
    }
    (mask,) = by_name(found)["scratch/001"].masks
    assert mask.path == tmp_path / "bottle/ground_truth/scratch/001_mask.png"
    read_all(found)


def test_mvtec_ad_without_a_mask(tmp_path):
    trees.write_mvtec_ad(tmp_path)
    (tmp_path / "bottle/ground_truth/broken/000_mask.png").unlink()
    shutil.rmtree(tmp_path / "bottle/ground_truth/scratch")
    found = by_name(layouts.find_records("mvtec_ad", tmp_path, "bottle"))
    assert found["broken/000"].masks == found["scratch/000"].masks == ()
    assert len(found["broken/001"].masks) == 1


def test_mvtec_ad_with_two_masks(tmp_path):
    trees.write_mvtec_ad(tmp_path)
    trees.write_mask(tmp_path / "bottle/ground_truth/broken/000_mask.bmp")
    with pytest.raises(UserError, match=r"found 2 in .*: 000_mask.bmp, 000_mask.png"):
        layouts.find_records("mvtec_ad", tmp_path, "bottle")


def test_hidden_and_other_files_are_no_images(tmp_path):
    trees.write_mvtec_ad(tmp_path)
    train = tmp_path / "bottle/train/good"
    (train / "._000.png").write_text("a file manager's")
    (train / "Thumbs.db").write_text("")
    (train.parent / ".cache").mkdir()
    assert len(layouts.find_records("mvtec_ad", tmp_path, "bottle")) == 10


# MVTec LOCO.


@pytest.mark.parametrize("name", ["mvtec_loco", "synthetic"])
def test_mvtec_loco(tmp_path, name):
    trees.write_mvtec_loco(tmp_path)
    found = layouts.find_records(name, tmp_path, "pushpins")
    assert counts(found) == {
        (TRAIN, GOOD): 4,
        (VALIDATION, GOOD): 2,
        (TEST, GOOD): 2,
        (TEST, "logical_anomalies"): 2,
        (TEST, "structural_anomalies"): 2,
    }
    read_all(found)


def test_mvtec_loco_channels(tmp_path):
    trees.write_mvtec_loco(tmp_path)
    found = by_name(layouts.find_records("mvtec_loco", tmp_path, "pushpins"))
    masks = found["structural_anomalies/000"].masks
    folder = tmp_path / "pushpins/ground_truth/structural_anomalies/000"
    assert [m.path for m in masks] == [folder / "000.png", folder / "001.png"]
    assert len(found["structural_anomalies/001"].masks) == 1
    rules = [read_mask(m, size=trees.SIZE)[1] for m in masks]
    assert [(s.defect_name, s.threshold, s.relative) for s in rules] == [
        ("missing_pin", 60.0, False),
        ("scratch", 1.0, True),
    ]


def test_mvtec_loco_without_a_mask(tmp_path):
    trees.write_mvtec_loco(tmp_path)
    shutil.rmtree(tmp_path / "pushpins/ground_truth/logical_anomalies/001")
    found = by_name(layouts.find_records("mvtec_loco", tmp_path, "pushpins"))
    assert found["logical_anomalies/001"].masks == ()
    assert len(found["structural_anomalies/001"].masks) == 1


def loco_config(key, value):
    config = copy.deepcopy(trees.LOCO_CONFIG)
    if value is None:
        del config[1][key]
    else:
        config[1][key] = value
    return config


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, "found {}"),
        ([], r"found \[\]"),
        ([254], "254 as entry 1"),
        *(
            (loco_config(key, None), f"no '{key}' in entry 2")
            for key in trees.LOCO_CONFIG[0]
        ),
        (loco_config("pixel_value", True), "pixel_value = True in entry 2"),
        (loco_config("pixel_value", 256), "pixel_value = 256"),
        (loco_config("pixel_value", 255), "two rules for pixel_value 255"),
        (loco_config("saturation_threshold", "1"), "saturation_threshold = '1'"),
        (loco_config("saturation_threshold", 2), "saturation_threshold = 2"),
        (loco_config("saturation_threshold", 0), "saturation_threshold = 0"),
        (loco_config("relative_saturation", 1), "relative_saturation = 1"),
    ],
)
def test_mvtec_loco_with_a_malformed_config(tmp_path, config, found):
    trees.write_mvtec_loco(tmp_path)
    trees.write_json(tmp_path / "pushpins/defects_config.json", config)
    with pytest.raises(UserError, match=f"defects_config.json to be .*{found}"):
        layouts.find_records("mvtec_loco", tmp_path, "pushpins")


def test_mvtec_loco_without_a_readable_config(tmp_path):
    trees.write_mvtec_loco(tmp_path)
    path = tmp_path / "pushpins/defects_config.json"
    path.write_text('[{"defect_name": ')
    with pytest.raises(UserError, match=r"defects_config.json.*not JSON.*Restore"):
        layouts.find_records("mvtec_loco", tmp_path, "pushpins")
    path.unlink()
    with pytest.raises(UserError, match=r"defects_config.json.*no readable file"):
        layouts.find_records("mvtec_loco", tmp_path, "pushpins")


# BTAD.


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("image_ending", "mask_ending"),
    [(".bmp", ".png"), (".png", ".png"), (".bmp", ".bmp")],
)
def test_btad(tmp_path, inside, image_ending, mask_ending):
    archive = tmp_path / "BTech_Dataset_transformed"
    trees.write_btad(archive, image_ending=image_ending, mask_ending=mask_ending)
    root = archive if inside else tmp_path
    assert layouts.find_categories("btad", root) == ["01"]
    found = layouts.find_records("btad", root, "01")
    assert counts(found) == {(TRAIN, GOOD): 4, (TEST, GOOD): 2, (TEST, "ko"): 2}
    (mask,) = by_name(found)["ko/001"].masks
    assert mask.path == archive / f"01/ground_truth/ko/001{mask_ending}"
    read_all(found)


# VisA.


def test_visa(tmp_path):
    trees.write_visa(tmp_path, "candle")
    trees.write_visa(tmp_path, "pcb1", train=3)
    # Not listed, so not part of the data set.
    trees.write_image(tmp_path / "candle/Data/Images/Normal/999.JPG")
    assert layouts.find_categories("visa", tmp_path) == ["candle", "pcb1"]
    found = layouts.find_records("visa", tmp_path, "candle")
    assert counts(found) == {(TRAIN, GOOD): 4, (TEST, GOOD): 2, (TEST, "anomaly"): 2}
    (mask,) = by_name(found)["anomaly/000"].masks
    assert mask.path == tmp_path / "candle/Data/Masks/Anomaly/000.png"
    assert read_mask(mask, size=trees.SIZE)[0].sum() == 80
    read_all(found)


def test_visa_without_its_csv(tmp_path):
    (tmp_path / "candle").mkdir()
    with pytest.raises(UserError, match=r"1cls.csv, found no readable file"):
        layouts.find_records("visa", tmp_path, "candle")


def test_visa_with_an_empty_object(tmp_path):
    trees.write_visa(tmp_path)
    path = tmp_path / "split_csv/1cls.csv"
    rows = trees.read_csv(path)
    rows[3][0] = ""
    trees.write_csv(path, rows)
    with pytest.raises(UserError, match=r"1cls.csv, row 4, column 'object', found ''"):
        layouts.find_categories("visa", tmp_path)


# Magnetic tiles.


def test_magnetic_tile(tmp_path):
    trees.write_magnetic_tile(tmp_path)
    assert layouts.find_categories("magnetic_tile", tmp_path) == ["magnetic_tile"]
    found = layouts.find_records("magnetic_tile", tmp_path, "magnetic_tile")
    split = counts(found)
    assert split[TRAIN, GOOD] + split[TEST, GOOD] == len(trees.TILES)
    assert 3 <= split[TEST, GOOD] <= 6  # a fifth, rounded up to a whole tile
    assert split[TEST, "blowhole"] == split[TEST, "crack"] == 2
    mask, _ = read_mask(by_name(found)["crack/exp1_num_500"].masks[0], size=trees.SIZE)
    assert mask.sum() == 24  # without the smoothed rim
    read_all(found)


def test_magnetic_tile_groups(tmp_path):
    trees.write_magnetic_tile(tmp_path)
    found = layouts.find_records("magnetic_tile", tmp_path, "magnetic_tile")
    normal = [r for r in found if r.type == GOOD]
    groups = {r.image.stem: r.group for r in normal}
    assert Counter(groups.values()) == {
        "tile_9": 3,
        "tile_110": 3,
        "tile_200": 1,
        "tile_210": 4,  # k rises: 1, 2, 4, 5
        "tile_1020": 2,
    }
    assert groups["exp1_num_9"] == groups["exp3_num_100"] == "tile_9"
    splits = {(r.group, r.split) for r in normal}
    assert len(splits) == len(set(groups.values()))


def test_magnetic_tile_split_is_fixed(tmp_path):
    """Also by NumPy's version: results on another test set do not compare."""
    shots = [(k, 100 * n + k) for n in range(40) for k in range(1, 4)]
    trees.write_magnetic_tile(tmp_path, normal=shots)
    found = layouts.find_records("magnetic_tile", tmp_path, "magnetic_tile")
    held = {r.group for r in found if (r.split, r.type) == (TEST, GOOD)}
    assert held == {f"tile_{n}" for n in (101, 301, 401, 1101, 1201, 1901, 3001, 3301)}


def test_magnetic_tile_photographed_in_turn(tmp_path):
    runs = [run for tile in magnetic_tile.SAME_TILE[:2] for run in tile]
    others = [(k, n) for n in (2000, 3000, 4000) for k in (1, 2)]
    shots = [(k, n + k) for k, n in others] + [(1, n) for n in runs]
    trees.write_magnetic_tile(tmp_path, normal=shots)
    found = layouts.find_records("magnetic_tile", tmp_path, "magnetic_tile")
    assert {r.image.stem: r.group for r in found if r.image.stem[-3:] == "907"} == {
        "exp1_num_5907": "tile_5874"
    }
    assert sum(r.group == "tile_743" for r in found) == 4


def test_magnetic_tile_with_another_name(tmp_path):
    trees.write_magnetic_tile(tmp_path)
    trees.write_image(tmp_path / "MT_Free/Imgs/copy.jpg")
    with pytest.raises(UserError, match=r"exp1_num_743.jpg.*copy.jpg"):
        layouts.find_records("magnetic_tile", tmp_path, "magnetic_tile")


def test_magnetic_tile_without_normal_images(tmp_path):
    trees.write_magnetic_tile(tmp_path, normal=())
    found = layouts.find_records("magnetic_tile", tmp_path, "magnetic_tile")
    assert {r.split for r in found} == {TEST}
    assert GOOD not in {r.type for r in found}


def test_magnetic_tile_without_a_mask(tmp_path):
    trees.write_magnetic_tile(tmp_path)
    (tmp_path / "MT_Crack/Imgs/exp1_num_500.png").unlink()
    found = layouts.find_records("magnetic_tile", tmp_path, "magnetic_tile")
    assert by_name(found)["crack/exp1_num_500"].masks == ()


# A user's folder.


def test_folder(tmp_path):
    root = trees.write_folder(
        tmp_path / "caps", validation=2, test={"good": 2, "dent": 3}
    )
    assert layouts.find_categories("folder", root) == ["caps"]
    found = layouts.find_records("folder", root, "caps")
    assert counts(found) == {
        (TRAIN, GOOD): 4,
        (VALIDATION, GOOD): 2,
        (TEST, GOOD): 2,
        (TEST, "dent"): 3,
    }
    assert all(len(r.masks) == 1 for r in found if r.type == "dent")
    read_all(found)


def test_folder_of_normal_images_only(tmp_path):
    root = trees.write_folder(tmp_path / "caps", normal="2026-05")
    found = layouts.find_records("folder", root, "caps")
    assert counts(found) == {(TRAIN, GOOD): 4}


def test_folder_with_images_directly_in_train(tmp_path):
    trees.write_images(tmp_path / "caps/train", 3, ending=".JPEG")
    trees.write_images(tmp_path / "caps/validation", 1)
    found = layouts.find_records("folder", tmp_path / "caps", "caps")
    assert counts(found) == {(TRAIN, GOOD): 3, (VALIDATION, GOOD): 1}


def test_folder_normal_names(tmp_path):
    root = trees.write_folder(
        tmp_path / "caps", normal="Charge_7", test={"charge_7": 1, "cut": 1}
    )
    trees.write_image(root / "test/OK/100.png")
    trees.write_image(root / "test/normal/200.png")
    found = layouts.find_records("folder", root, "caps")
    assert counts(found) == {(TRAIN, GOOD): 4, (TEST, GOOD): 3, (TEST, "cut"): 1}


def test_folder_masks(tmp_path):
    root = trees.write_folder(tmp_path / "caps", test={"cut": 3}, masks=False)
    trees.write_mask(root / "ground_truth/cut/000.png")
    trees.write_mask(root / "ground_truth/cut/001_mask.bmp")
    found = by_name(layouts.find_records("folder", root, "caps"))
    assert [m.path.name for m in found["cut/000"].masks] == ["000.png"]
    assert [m.path.name for m in found["cut/001"].masks] == ["001_mask.bmp"]
    assert found["cut/002"].masks == ()
    trees.write_mask(root / "ground_truth/cut/000_mask.png")
    with pytest.raises(UserError, match=r"found 2 in .*: 000.png, 000_mask.png"):
        layouts.find_records("folder", root, "caps")


def test_folder_with_stray_test_images(tmp_path):
    root = trees.write_folder(tmp_path / "caps")
    trees.write_images(root / "test", 2)
    with pytest.raises(UserError, match=r"found 000.png \(of 2\) outside"):
        layouts.find_records("folder", root, "caps")


def test_folder_with_anomalies_in_validation(tmp_path):
    root = trees.write_folder(tmp_path / "caps", validation=1)
    trees.write_images(root / "validation/dent", 1)
    with pytest.raises(UserError, match="only normal images in the validation split"):
        layouts.find_records("folder", root, "caps")


def test_folder_given_by_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(trees.write_folder(tmp_path / "caps"))
    assert layouts.find_categories("folder", Path(".")) == ["caps"]


# Which folders of a user's hold normal images.


@pytest.mark.parametrize("normal", ["good", "OK", "Normal"])
def test_folder_of_defects_beside_normal_images(tmp_path, normal):
    root = trees.write_folder(tmp_path / "caps", normal=normal, test={"good": 1})
    trees.write_images(root / "train/bad", 2)
    trees.write_images(root / "train/day 2", 2)
    message = (
        rf"train, found bad, day 2 beside {normal}\. Move .*test/.*train/{normal}/"
    )
    with pytest.raises(UserError, match=message):
        layouts.find_records("folder", root, "caps")


def test_folder_with_several_normal_names(tmp_path):
    root = trees.write_folder(tmp_path / "caps", test={"good": 2, "bad": 1})
    trees.write_images(root / "train/OK", 2)
    (root / "train/bad").mkdir()  # holds nothing to train on
    found = layouts.find_records("folder", root, "caps")
    assert counts(found) == {(TRAIN, GOOD): 6, (TEST, GOOD): 2, (TEST, "bad"): 1}


@pytest.mark.parametrize("first", ["train/ok_front", "train"])
def test_folder_whose_names_do_not_tell_what_is_normal(tmp_path, first):
    root = tmp_path / "caps"
    trees.write_images(root / first, 3)
    trees.write_images(root / "train/Def_Front", 2)
    trees.write_images(root / "test/ok_front", 2)
    trees.write_images(root / "test/def_front", 2)
    with pytest.raises(UserError, match=r"Def_Front.* in test/, too.*call.*good"):
        layouts.find_records("folder", root, "caps")
    (root / "train/Def_Front").rename(tmp_path / "elsewhere")
    (root / "test/ok_front").rename(root / "test/good")
    found = layouts.find_records("folder", root, "caps")
    assert counts(found) == {(TRAIN, GOOD): 3, (TEST, GOOD): 2, (TEST, "def_front"): 2}


def test_folder_of_several_days(tmp_path):
    root = trees.write_folder(
        tmp_path / "caps", normal="day1", validation=2, test={"good": 2, "cut": 1}
    )
    trees.write_images(root / "train/day2", 4)
    found = layouts.find_records("folder", root, "caps")
    assert counts(found) == {
        (TRAIN, GOOD): 8,
        (VALIDATION, GOOD): 2,
        (TEST, GOOD): 2,
        (TEST, "cut"): 1,
    }
    names = set(by_name(found, TRAIN))
    assert names == {f"good/day{k}/{i:03}" for k in (1, 2) for i in range(4)}


def test_folder_val_is_validation(tmp_path):
    root = trees.write_folder(tmp_path / "caps")
    trees.write_images(root / "val/ok", 2)
    trees.write_images(root / "val", 1)
    found = layouts.find_records("folder", root, "caps")
    assert counts(found)[VALIDATION, GOOD] == 3
    trees.write_images(root / "validation/good", 2)
    with pytest.raises(UserError, match=r"one folder of validation .*validation and"):
        layouts.find_records("folder", root, "caps")


def test_folder_of_junk_is_no_type(tmp_path):
    root = trees.write_folder(tmp_path / "caps", test={"good": 2, "cut": 1})
    for name in ("__MACOSX", "$RECYCLE.BIN", "@eaDir", ".ipynb_checkpoints"):
        trees.write_images(root / "test" / name, 1)
        trees.write_images(root / "train" / name, 1)
    (root / "train/good/export.png").mkdir()
    found = layouts.find_records("folder", root, "caps")
    assert counts(found) == {(TRAIN, GOOD): 4, (TEST, GOOD): 2, (TEST, "cut"): 1}


def test_folder_one_mask_of_two_images(tmp_path):
    root = trees.write_folder(tmp_path / "caps", test={"cut": 2})
    trees.write_image(root / "test/cut/000.jpg")
    with pytest.raises(UserError, match=r"000_mask.*found two: .*jpg and .*png"):
        layouts.find_records("folder", root, "caps")
    (root / "ground_truth/cut/000_mask.png").unlink()
    found = by_name(layouts.find_records("folder", root, "caps"))
    assert set(found) == {"cut/000.jpg", "cut/000.png", "cut/001"}


# A user's table.


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_table(tmp_path, encoding):
    path = trees.write_table(tmp_path / "flaschen_ö.csv", encoding=encoding)
    assert layouts.find_categories("table", path) == ["flaschen_ö"]
    found = layouts.find_records("table", path, "flaschen_ö")
    assert counts(found) == {(TRAIN, GOOD): 4, (TEST, GOOD): 2, (TEST, "dent"): 2}
    (mask,) = by_name(found)["dent/bad_001"].masks
    assert mask.path == tmp_path / "masks/bad_001.png"
    read_all(found)


def test_table_with_required_columns_only(tmp_path):
    labels = ["normal", "Good", " 0", "anomalous", "ANOMALY", "1"]
    rows = [["Label", "image ", "split", "remark"]]
    for i, label in enumerate(labels):
        trees.write_image(tmp_path / f"{i}.png")
        rows.append([label, f"{i}.png", "train" if i < 3 else "test"])
        rows.append([])  # blank, as some programs leave at the end
    trees.write_csv(tmp_path / "t.csv", rows)
    found = layouts.find_records("table", tmp_path / "t.csv", "t")
    assert counts(found) == {(TRAIN, GOOD): 3, (TEST, "anomaly"): 3}
    assert not any(r.masks for r in found)


def test_table_must_be_a_file(tmp_path):
    with pytest.raises(UserError, match="to be a file, found something else"):
        layouts.find_records("table", tmp_path, "x")
    with pytest.raises(UserError, match="to be a file, found nothing there"):
        layouts.find_records("table", tmp_path / "t.csv", "t")


@pytest.mark.parametrize(
    ("row", "column", "text", "expected"),
    [
        (2, "split", "val", "one of train, validation, test"),
        (3, "label", "defect", "one of normal, good, 0, anomalous, anomaly, 1"),
        (4, "image", "images/none.png", "the name of a file"),
        (4, "image", "", "some text"),
        (8, "mask", "masks/none.png", "the name of a file"),
        (9, "type", "good", "a kind of anomaly"),
        (9, "type", "a/b", "a kind of anomaly"),
    ],
)
def test_table_errors_name_the_cell(tmp_path, row, column, text, expected):
    path = trees.write_table(tmp_path / "t.csv")
    rows = trees.read_csv(path)
    rows[row - 1][rows[0].index(column)] = text
    trees.write_csv(path, rows)
    with pytest.raises(UserError) as error:
        layouts.find_records("table", path, "t")
    assert f"Expected {expected}" in str(error.value)
    assert f"{path}, row {row}, column {column!r}, found {text!r}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "found nothing. Add image, split, label;"),
        (b"image;split;label\n", "found image;split;label. Add image, split, label"),
        (b"image,label\n", "Add split"),
        (b"image,split,label\na,b.png,train,0\n", "row 2, .*found 4"),
        (b'image,split,label\n"a.png,train,0\n', "to be CSV text .* row 2"),
        (b"image,split,label\n\xe9.png,train,0\n", "to be CSV text in UTF-8"),
    ],
)
def test_table_that_is_malformed(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"t.csv.*{message}"):
        layouts.find_records("table", path, "t")


def test_table_with_one_stem_twice(tmp_path):
    path = trees.write_table(tmp_path / "t.csv")
    trees.write_image(tmp_path / "more/000.png")
    rows = [*trees.read_csv(path), ["more/000.png", "train", "0"]]
    trees.write_csv(path, rows)
    names = set(by_name(layouts.find_records("table", path, "t"), TRAIN))
    assert names == {
        "good/images/000",
        "good/more/000",
        *(f"good/{i:03}" for i in (1, 2, 3)),
    }
    trees.write_csv(path, [*rows, ["more/000.png", "train", "0"]])
    with pytest.raises(UserError, match=r"found two: .*more.000.png.*list it once"):
        layouts.find_records("table", path, "t")


def test_published_category_names():
    known = layouts.known_layouts()
    for name in ("mvtec_ad", "mvtec_loco", "btad", "visa", "magnetic_tile", "mpdd"):
        names = known[name].published
        assert len(set(names)) == len(names) > 0
    sizes = {n: len(known[n].published) for n in ("mvtec_ad", "visa", "mpdd")}
    assert sizes == {"mvtec_ad": 15, "visa": 12, "mpdd": 6}
