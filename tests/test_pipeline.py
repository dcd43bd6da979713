from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import trees
from ulsad_jax.data.batches import Category, Examples, open_category
from ulsad_jax.data.records import Mask, Saturation, read_image, read_mask
from ulsad_jax.data.resize import resize_bilinear, resize_nearest
from ulsad_jax.runtime.errors import UserError

SIZE = (16, 24)


def open_tree(
    name: str, root: Path, category: str, *, fraction: float = 0.25, seed: int = 0
) -> Category:
    return open_category(
        name,
        root=root,
        category=category,
        image_size=SIZE,
        cache_dir=root.with_name("cache"),
        validation_fraction=fraction,
        seed=seed,
    )


def read_all(examples: Examples, batch_size: int) -> dict[str, np.ndarray]:
    batches = list(examples.batches(batch_size))
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


@pytest.fixture
def loco(tmp_path: Path) -> Category:
    root = trees.write_mvtec_loco(tmp_path / "loco", good=3)
    return open_tree("mvtec_loco", root, "pushpins")


def test_shapes_and_types_of_a_batch(loco):
    batch = next(loco.test.batches(4))
    described = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert described == {
        "image": ((4, *SIZE, 3), "uint8"),
        "label": ((4,), "int32"),
        "gt_mask": ((4, *SIZE), "bool"),
        "has_mask": ((4,), "bool"),
        "mask_lost": ((4,), "bool"),
        "index": ((4,), "int32"),
        "valid": ((4,), "bool"),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_every_image_comes_once_in_order_and_padding_is_flagged(loco, batch_size):
    batches = list(loco.test.batches(batch_size))
    assert len(loco.test) == 7
    assert len(batches) == -(-7 // batch_size)
    assert all(len(batch["image"]) == batch_size for batch in batches)
    rows = read_all(loco.test, batch_size)
    np.testing.assert_array_equal(rows["valid"], np.arange(len(rows["valid"])) < 7)
    np.testing.assert_array_equal(rows["index"][:7], np.arange(7))
    np.testing.assert_array_equal(rows["label"][:7], loco.test.labels)
    for i, record in enumerate(loco.test.records):
        expected = resize_bilinear(read_image(record.image), SIZE)
        np.testing.assert_array_equal(rows["image"][i], expected)
    assert not any(value[7:].any() for value in rows.values())


def test_gt_mask_is_the_union_of_the_channels(loco):
    rows = read_all(loco.test, 8)
    for i, record in enumerate(loco.test.records):
        union = np.zeros(SIZE, bool)
        for mask in record.masks:
            union |= resize_nearest(read_mask(mask, size=trees.SIZE)[0], SIZE)
        np.testing.assert_array_equal(rows["gt_mask"][i], union)
        assert union.any() == (record.label == 1)


def test_masks_without_a_pixel_at_model_resolution_are_told(tmp_path):
    """Every second row and column is left out, a mask of one pixel there with it."""
    root = trees.write_mvtec_ad(tmp_path / "ad", per_defect=4, defects=["cut"])
    masks = root / "bottle" / "ground_truth" / "cut"
    for i, box in enumerate([(4, 6, 5, 7), (4, 6, 12, 16), (0, 0, 1, 1)]):
        trees.write_mask(masks / f"{i:03d}_mask.png", box=box)
    (masks / "003_mask.png").unlink()
    rows = read_all(open_tree("mvtec_ad", root, "bottle").test, 8)
    small = [0]
    for i in (0, 2):
        mask = read_mask(Mask(masks / f"{i:03d}_mask.png"), size=trees.SIZE)[0]
        small.append(int(resize_nearest(mask, SIZE).any()))
    assert rows["gt_mask"].any((1, 2)).tolist() == [
        0,
        0,
        small[1],
        1,
        small[2],
        0,
        0,
        0,
    ]
    assert not any(small)
    assert rows["mask_lost"].tolist() == [0, 0, 1, 0, 1, 0, 0, 0]


def test_what_is_known_of_the_images(loco):
    assert loco.test.labels.dtype == np.int32
    assert list(loco.test.labels) == [0, 0, 0, 1, 1, 1, 1]
    assert loco.test.types[:4] == ["good"] * 3 + ["logical_anomalies"]
    assert loco.test.names[3:5] == ["logical_anomalies/000", "logical_anomalies/001"]
    assert [r.name for r in loco.test.records] == loco.test.names


def test_masks_of_normal_images_are_known_to_be_empty(tmp_path):
    root = trees.write_folder(tmp_path / "a", test={"good": 1, "dent": 1}, masks=False)
    rows = read_all(open_tree("folder", root, "a").test, 2)
    np.testing.assert_array_equal(rows["has_mask"], [True, False])
    assert not rows["gt_mask"].any()


def test_the_original_keeps_channels_apart(loco):
    record = loco.test.records[3]
    original = loco.test.original(3)
    np.testing.assert_array_equal(original.image, read_image(record.image))
    expected = [read_mask(mask, size=trees.SIZE)[0] for mask in record.masks]
    assert original.masks.dtype == bool
    np.testing.assert_array_equal(original.masks, np.stack(expected))
    assert original.saturations == (
        Saturation("missing_pin", 60.0, False),
        Saturation("scratch", 1.0, True),
    )
    normal = loco.test.original(0)
    assert normal.masks.shape == (0, *trees.SIZE)
    assert normal.saturations == ()


def test_a_validation_split_on_disk_is_used(loco):
    assert {r.split for r in loco.validation.records} == {"validation"}
    assert (len(loco.train), len(loco.validation)) == (4, 2)


def test_a_part_of_the_training_images_is_held_out_elsewhere(tmp_path):
    root = trees.write_mvtec_ad(tmp_path / "ad", train=12)
    opened = open_tree("mvtec_ad", root, "bottle", fraction=0.25)
    assert (len(opened.train), len(opened.validation)) == (9, 3)
    names = opened.train.names + opened.validation.names
    assert sorted(names) == [f"good/{i:03d}" for i in range(12)]
    # They are images of the training split, found by their position in it.
    for part in (opened.train, opened.validation):
        rows = read_all(part, 5)
        for i, record in enumerate(part.records):
            expected = resize_bilinear(read_image(record.image), SIZE)
            np.testing.assert_array_equal(rows["image"][i], expected)


def test_images_held_out_depend_on_seed_and_category(tmp_path):
    root = tmp_path / "ad"
    for category in ("bottle", "cable"):
        trees.write_mvtec_ad(root, category, train=12)

    def held(category: str, seed: int) -> list[str]:
        return open_tree("mvtec_ad", root, category, seed=seed).validation.names

    assert held("bottle", 0) == held("bottle", 0)
    assert held("bottle", 0) != held("bottle", 1)
    assert held("bottle", 0) != held("cable", 0)


def test_no_object_is_on_both_sides(tmp_path):
    root = trees.write_magnetic_tile(tmp_path / "tiles")
    opened = open_tree("magnetic_tile", root, "magnetic_tile")
    train, validation = (
        {r.group for r in part.records} for part in (opened.train, opened.validation)
    )
    assert train and validation
    assert not train & validation


def test_there_may_be_no_test_images(tmp_path):
    opened = open_tree("folder", trees.write_folder(tmp_path / "mine"), "mine")
    assert len(opened.test) == 0
    assert list(opened.test.batches(4)) == []
    assert opened.test.labels.shape == (0,)


def test_images_of_one_category_may_differ_in_size(tmp_path):
    root = trees.write_folder(tmp_path / "mine", test={"good": 2})
    trees.write_image(root / "test" / "good" / "000.png", size=(9, 50))
    opened = open_tree("folder", root, "mine")
    assert next(opened.test.batches(2))["image"].shape == (2, *SIZE, 3)
    assert opened.test.original(0).image.shape == (9, 50, 3)


def test_reading_can_stop_early_and_start_again(loco):
    first = list(itertools.islice(loco.test.batches(2), 1))
    again = list(loco.test.batches(2))
    np.testing.assert_array_equal(first[0]["image"], again[0]["image"])
    assert len(again) == 4


def test_the_fingerprint_follows_the_source_files(tmp_path):
    root = trees.write_mvtec_ad(tmp_path / "ad")
    before = open_tree("mvtec_ad", root, "bottle")
    assert open_tree("mvtec_ad", root, "bottle").fingerprint == before.fingerprint
    path = root / "bottle" / "test" / "good" / "000.png"
    Image.fromarray(np.full((*trees.SIZE, 3), 9, np.uint8)).save(path)
    after = open_tree("mvtec_ad", root, "bottle")
    assert after.fingerprint != before.fingerprint
    assert np.all(next(after.test.batches(1))["image"] == 9)


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="'mvtec'"):
        open_tree("mvtec", tmp_path, "bottle")


def test_warnings_of_a_decoder_name_the_file_and_come_once(tmp_path, monkeypatch):
    root = trees.write_mvtec_ad(tmp_path / "ad", defects=["cut"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # two thirds of an image
    with pytest.warns(Image.DecompressionBombWarning) as caught:
        category = open_tree("mvtec_ad", root, "bottle")
        read_all(category.test, 4)
        category.test.original(0)
    texts = [str(w.message) for w in caught if "pixels" in str(w.message)]
    files = [str(path) for path in root.rglob("*.png")]
    assert len(files) == 10
    assert sorted(text.split(": ")[0] for text in texts) == sorted(files)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
@pytest.mark.parametrize(
    "name", ["*-train.array_record*", "dataset_info.json", "survey.json"]
)
def test_damaged_prepared_data_names_the_folder_to_delete(tmp_path, name, damage):
    root = trees.write_mvtec_ad(tmp_path / "ad", train=6)
    open_tree("mvtec_ad", root, "bottle")
    (path,) = (tmp_path / "cache").rglob(name)
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()
    if damage != "gone":
        flipped = content[:middle] + b"\0\xff" + content[middle + 2 :]
        changed = {"cut": content[:middle], "flipped": flipped, "empty": b""}
        path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"prepared images in .*Delete that folder"):
        read_all(open_tree("mvtec_ad", root, "bottle").train, 2)
    folder = next((tmp_path / "cache").iterdir())
    shutil.rmtree(folder)
    assert len(read_all(open_tree("mvtec_ad", root, "bottle").train, 2)) > 0
