"""Files of a category that are not used are named."""

from __future__ import annotations

import os
import shutil

import pytest

from tests import trees
from ulsad_jax.data import layouts, unused


def describe(name, root, category):
    records = layouts.find_records(name, root, category)
    return layouts.describe_unused(name, root, category, records)


@pytest.fixture
def caps(tmp_path):
    return trees.write_folder(tmp_path / "caps", test={"good": 2, "dent": 3})


WRITERS = {
    "mvtec_ad": (trees.write_mvtec_ad, "bottle", "good"),
    "mpdd": (trees.write_mvtec_ad, "bottle", "good"),
    "mvtec_loco": (trees.write_mvtec_loco, "pushpins", "good"),
    "synthetic": (trees.write_mvtec_loco, "pushpins", "good"),
    "btad": (trees.write_btad, "01", "ok"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_layouts_in_folders(tmp_path, name):
    write, category, normal = WRITERS[name]
    write(tmp_path, category)
    write(tmp_path, "another")
    trees.write_images(tmp_path / "another" / "train" / normal / "day", 1)
    for file in ("license.txt", "readme.txt", "defects_config.json", ".DS_Store"):
        if not (tmp_path / category / file).exists():
            (tmp_path / category / file).write_text("as archives have them")
    assert describe(name, tmp_path, category) == []
    trees.write_images(tmp_path / category / "train" / normal / "day", 5)
    trees.write_images(tmp_path / category / "val" / normal, 1)
    truth = tmp_path / category / "ground_truth"
    first = min(path for path in truth.rglob("*.png"))
    os.renames(first, truth / "else" / "zzz.png")
    mask, nested = sorted(describe(name, tmp_path, category), key=len)
    assert mask.startswith("1 file not used: no anomalous test image has such a mask")
    assert mask.endswith(": ground_truth/else/zzz.png")
    assert nested.startswith(f"6 files not used: images are read from train/{normal}/")
    expected = ", ".join(f"train/{normal}/day/00{i}.png" for i in range(3))
    assert nested.endswith(f": {expected} and 3 more")
    if "loco" not in name and name != "synthetic":
        image = next(
            r
            for r in layouts.find_records(name, tmp_path, category)
            if r.label and not r.masks
        ).image.relative_to(tmp_path / category)
        wanted = first.relative_to(tmp_path / category).with_suffix("")
        assert f"the mask of {image} is called {wanted}.<ending>" in mask


def test_visa(tmp_path):
    trees.write_visa(tmp_path)
    trees.write_visa(tmp_path, "pcb1")
    (tmp_path / "candle" / "image_anno.csv").write_text("of the archive")
    trees.write_image(tmp_path / "pcb1/Data/Images/Normal/999.JPG")
    assert describe("visa", tmp_path, "candle") == []
    trees.write_image(tmp_path / "candle/Data/Images/Normal/999.JPG")
    assert describe("visa", tmp_path, "candle") == [
        "1 file not used: split_csv/1cls.csv does not list such files: "
        "candle/Data/Images/Normal/999.JPG"
    ]


def test_magnetic_tile(tmp_path):
    trees.write_magnetic_tile(tmp_path)
    trees.write_image(tmp_path / "photographs/a.png")
    assert describe("magnetic_tile", tmp_path, "magnetic_tile") == []
    trees.write_image(tmp_path / "MT_Free/Imgs/exp1_num_7.bmp")
    trees.write_mask(tmp_path / "MT_Crack/Imgs/exp1_num_8.png")
    (found,) = describe("magnetic_tile", tmp_path, "magnetic_tile")
    assert found.startswith("2 files not used: MT_<type>/Imgs/<name>.jpg is read")
    assert "MT_Crack/Imgs/exp1_num_8.png" in found
    assert "MT_Free/Imgs/exp1_num_7.bmp" in found


def test_table_has_no_folder_of_its_own(tmp_path):
    path = trees.write_table(tmp_path / "t.csv")
    trees.write_image(tmp_path / "images/else.png")
    assert describe("table", path, "t") == []


def test_folder_all_of_which_is_used(caps):
    trees.write_images(caps / "train", 2)
    shutil.rmtree(caps / "train/good")
    trees.write_images(caps / "val/good", 2)
    assert describe("folder", caps, "caps") == []


@pytest.mark.parametrize(
    "file",
    [
        "000.png",
        "train/good/2024-05-01/006.png",
        "train/good/2024/05/006.png",
        "train/good/export.png/006.png",
        "test/dent/day2/003.png",
        "valid/good/000.png",
        "Train/good/000.png",
        "masks/dent/000.png",
    ],
)
def test_folder_file_elsewhere(caps, file):
    trees.write_image(caps / file)
    (found,) = describe("folder", caps, "caps")
    assert found.startswith("1 file not used: images are read from train/, ")
    assert found.endswith(f": {file}")


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.JPE", "a.gif", "a.ppm", "a.avif", "a", "a.png.bak", "a.npy"]
)
@pytest.mark.parametrize("folder", ["train/good", "test/dent", "ground_truth/dent"])
def test_folder_file_of_an_unknown_ending(caps, folder, name):
    (caps / folder / name).write_text("an image of another kind")
    assert describe("folder", caps, "caps") == [
        "1 file not used: names of images and masks end in .png, .jpg, .jpeg, .bmp, "
        f".tif, .tiff, .webp: {folder}/{name}"
    ]


@pytest.mark.parametrize(
    "file", ["dent/000_seg.png", "Dent/000.png", "000_mask.png", "dent/a/000_mask.png"]
)
def test_folder_mask_that_matches_no_image(caps, file):
    (caps / "ground_truth/dent/000_mask.png").unlink()
    trees.write_mask(caps / "ground_truth" / file)
    assert describe("folder", caps, "caps") == [
        "1 file not used: no anomalous test image has such a mask (the mask of "
        "test/dent/000.png is called ground_truth/dent/000[_mask].<ending>): "
        f"ground_truth/{file}"
    ]


def test_folder_mask_of_a_normal_image(caps):
    trees.write_mask(caps / "ground_truth/good/000_mask.png")
    (found,) = describe("folder", caps, "caps")
    assert "such a mask (the mask of test/<type>/<stem>.<ending> is called" in found


@pytest.mark.parametrize(
    "junk",
    [
        ".DS_Store",
        "._000.png",
        "Thumbs.db",
        "desktop.ini",
        "LICENSE",
        "licence.txt",
        "README.md",
        "readme.txt",
        "defects_config.json",
        "__MACOSX/000.png",
        ".ipynb_checkpoints/000-checkpoint.png",
        "@eaDir/000.png",
        "$RECYCLE.BIN/000.png",
    ],
)
def test_folder_junk_is_not_worth_a_line(caps, junk):
    for folder in ("", "train", "train/good", "test", "test/dent", "ground_truth"):
        path = caps / folder / junk
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert describe("folder", caps, "caps") == []


def test_folder_whose_training_folders_are_all_taken_for_normal(caps):
    (caps / "train/good").rename(caps / "train/day1")
    trees.write_images(caps / "train/def_front", 2)
    assert describe("folder", caps, "caps") == [
        "training images of several folders are all taken for normal: "
        "train/day1, train/def_front"
    ]


def test_links_are_followed(caps):
    """What is used through a link is used, and links in a circle end."""
    store = caps.parent / "store"
    (caps / "train/good").rename(store)
    (caps / "train/good").symlink_to(store)
    (caps / "test/dent").rename(caps / "all")
    (caps / "test/dent").symlink_to(caps / "all")
    (caps / "test/good/000.png").rename(store / "sound.png")
    (caps / "test/good/000.png").symlink_to(store / "sound.png")
    (caps / "all/again").symlink_to(caps)
    assert describe("folder", caps, "caps") == []
    (store / "x.gif").write_text("")
    (found,) = describe("folder", caps, "caps")
    assert found.endswith(": train/good/x.gif")


def test_a_folder_of_many_files_is_counted_up_to_a_limit(caps, monkeypatch):
    monkeypatch.setattr(unused, "LIMIT", 3)
    trees.write_images(caps / "train/good/day", 5)
    found, limit = describe("folder", caps, "caps")
    assert found.startswith("3 files not used")
    assert limit == "files not used are counted up to 3"
