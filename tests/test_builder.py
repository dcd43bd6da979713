from __future__ import annotations

import io
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import ulsad_jax.data
from tests import formats, trees
from ulsad_jax.data import prepare as builder_module
from ulsad_jax.data.layouts import find_records, known_layouts
from ulsad_jax.data.prepare import RecordsBuilder, find_builder, to_example
from ulsad_jax.data.records import Record, read_image, read_mask
from ulsad_jax.data.survey import Survey
from ulsad_jax.runtime.errors import UserError

PROJECT = Path(ulsad_jax.data.__file__).parents[2]


@pytest.fixture
def loco(tmp_path: Path) -> Path:
    return trees.write_mvtec_loco(tmp_path / "loco")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def build(name: str, root: Path, category: str | None, cache: Path) -> RecordsBuilder:
    builder = find_builder(name)(root=root, config=category, data_dir=cache)
    builder.download_and_prepare()
    return builder


def read_loco(loco: Path, cache: Path, split: str = "test") -> list[dict]:
    """As the documentation says."""
    source = tfds.data_source(
        "mvtec_loco/pushpins",
        split=split,
        data_dir=cache,
        builder_kwargs={"root": loco},
    )
    return list(source)


def find_built(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*/*/[0-9]*"))


def test_every_layout_has_a_builder():
    for name in known_layouts():
        assert tfds.builder_cls(name) is find_builder(name)


def test_published_categories_are_configurations():
    assert len(find_builder("mvtec_ad").builder_configs) == 15
    assert set(find_builder("mpdd").builder_configs) >= {"tubes", "connector"}
    assert "screw_bag" in find_builder("mvtec_loco").builder_configs


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_tfds_reads_what_the_records_say_in_their_order(loco, cache, split):
    records = [
        r for r in find_records("mvtec_loco", loco, "pushpins") if r.split == split
    ]
    examples = read_loco(loco, cache, split)
    assert len(examples) == len(records)
    for record, example in zip(records, examples, strict=True):
        assert example["name"].decode() == record.name
        assert example["type"].decode() == record.type
        assert example["group"].decode() == record.group
        assert example["label"] == record.label
        assert example["has_mask"]
        np.testing.assert_array_equal(example["image"], read_image(record.image))
        assert len(example["masks"]["mask"]) == len(record.masks)
        for i, mask in enumerate(record.masks):
            channel = {key: values[i] for key, values in example["masks"].items()}
            pixels, saturation = read_mask(mask, size=trees.SIZE)
            np.testing.assert_array_equal(channel["mask"][..., 0], 255 * pixels)
            assert channel["defect_name"].decode() == saturation.defect_name
            assert channel["saturation_threshold"] == saturation.threshold
            assert channel["relative_saturation"] == saturation.relative


def test_a_threshold_keeps_its_precision(loco, cache):
    config = [dict(entry) for entry in trees.LOCO_CONFIG]
    config[1]["saturation_threshold"] = 0.7
    trees.write_json(loco / "pushpins" / "defects_config.json", config)
    masks = read_loco(loco, cache)[2]["masks"]
    assert [float(t) for t in masks["saturation_threshold"]] == [60.0, 0.7]


def test_order_holds_across_shards(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(builder_module, "SHARD", 2)
    root = trees.write_mvtec_ad(tmp_path / "ad", train=5)
    builder = build("mvtec_ad", root, "bottle", cache)
    assert builder.info.splits["train"].num_shards == 3
    for split, source in builder.as_data_source().items():
        expected = [r.name for r in builder.records if r.split == split]
        assert [e["name"].decode() for e in source] == expected


@pytest.mark.parametrize("name", ["mvtec_ad", "synthetic"])
def test_a_category_may_have_any_name(tmp_path, cache, name):
    write = trees.write_mvtec_ad if name == "mvtec_ad" else trees.write_mvtec_loco
    root = write(tmp_path / "root", "my box, 2")
    source = tfds.data_source(
        name,
        split="train",
        data_dir=cache,
        builder_kwargs={"root": root, "config": "my box, 2"},
    )
    assert len(source) == 4


def test_the_only_category_need_not_be_named(tmp_path, cache):
    root = trees.write_folder(tmp_path / "mine", test={"good": 1, "dent": 2})
    source = tfds.data_source(
        "folder", split="test", data_dir=cache, builder_kwargs={"root": root}
    )
    assert len(source) == 3
    table = trees.write_table(tmp_path / "table" / "list.csv")
    assert build("table", table, None, cache).category == "list"


def test_one_of_several_categories_has_to_be_named(tmp_path, cache):
    root = trees.write_mvtec_ad(tmp_path / "ad", "bottle")
    trees.write_mvtec_ad(root, "cable")
    with pytest.raises(UserError, match="mvtec_ad/bottle, mvtec_ad/cable"):
        build("mvtec_ad", root, None, cache)


def test_what_cannot_be_found_is_named(loco, cache):
    with pytest.raises(UserError, match="root"):
        tfds.data_source("mvtec_loco/pushpins", data_dir=cache)
    with pytest.raises(UserError, match="'screw_bag'"):
        build("mvtec_loco", loco, "screw_bag", cache)
    with pytest.raises(UserError, match="'mvtec_lco'"):
        find_builder("mvtec_lco")


def rewrite_image(base: Path) -> None:
    path = base / "test" / "good" / "000.png"
    Image.fromarray(np.full((*trees.SIZE, 3), 7, np.uint8)).save(path)


def add_image(base: Path) -> None:
    trees.write_image(base / "test" / "good" / "100.png")


def remove_image(base: Path) -> None:
    (base / "test" / "good" / "000.png").unlink()


def edit_config(base: Path) -> None:
    path = base / "defects_config.json"
    path.write_text(path.read_text().replace("missing_pin", "lost_pin"))


def rewrite_mask(base: Path) -> None:
    path = base / "ground_truth" / "logical_anomalies" / "000" / "000.png"
    trees.write_mask(path, box=(0, 0, 2, 2))


@pytest.mark.parametrize(
    "change", [rewrite_image, add_image, remove_image, edit_config, rewrite_mask]
)
def test_changed_source_files_are_built_again(loco, cache, capfd, change):
    read_loco(loco, cache)
    capfd.readouterr()
    change(loco / "pushpins")
    examples = read_loco(loco, cache)
    assert capfd.readouterr().err.count("source files changed") == 1
    fresh = read_loco(loco, cache.with_name("fresh"))
    assert len(examples) == len(fresh)
    for example, expected in zip(examples, fresh, strict=True):
        assert example["name"] == expected["name"]
        np.testing.assert_array_equal(example["image"], expected["image"])
        masks, other = example["masks"], expected["masks"]
        assert masks["defect_name"] == other["defect_name"]
        np.testing.assert_array_equal(masks["mask"], other["mask"])
    assert len(find_built(cache)) == 1


def test_unchanged_source_files_are_not_read_again(loco, cache, monkeypatch):
    read_loco(loco, cache)
    monkeypatch.setattr(builder_module, "to_example", None)
    assert len(read_loco(loco, cache)) == 6
    assert len(read_loco(loco / "pushpins" / "..", cache)) == 6
    monkeypatch.chdir(loco)
    assert len(read_loco(Path(), cache)) == 6


def test_two_roots_keep_their_own_data(tmp_path, cache, monkeypatch):
    one = trees.write_mvtec_ad(tmp_path / "one" / "ad", good=1)
    two = trees.write_mvtec_ad(tmp_path / "two" / "ad", good=2)
    build("mvtec_ad", one, "bottle", cache)
    build("mvtec_ad", two, "bottle", cache)
    monkeypatch.setattr(builder_module, "to_example", None)
    for root, count in ((one, 5), (two, 6)):
        builder = build("mvtec_ad", root, "bottle", cache)
        assert len(builder.as_data_source("test")) == count


def test_nothing_old_is_served_without_building(loco, cache):
    arguments = {
        "split": "test",
        "data_dir": cache,
        "builder_kwargs": {"root": loco},
        "download": False,
    }
    with pytest.raises(UserError, match="download_and_prepare"):
        tfds.data_source("mvtec_loco/pushpins", **arguments)
    read_loco(loco, cache)
    assert len(tfds.data_source("mvtec_loco/pushpins", **arguments)) == 6
    add_image(loco / "pushpins")
    with pytest.raises(UserError, match="older data"):
        tfds.data_source("mvtec_loco/pushpins", **arguments)


def test_a_broken_image_is_named_and_nothing_is_kept(loco, cache):
    path = loco / "pushpins" / "test" / "good" / "001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"test/good/001\.png"):
        read_loco(loco, cache)
    assert not find_built(cache)
    assert not list(cache.rglob("incomplete*"))
    path.write_bytes(whole)
    assert len(read_loco(loco, cache)) == 6


def test_a_mask_of_another_size_is_named(loco, cache):
    path = loco / "pushpins" / "ground_truth" / "logical_anomalies" / "001" / "000.png"
    trees.write_mask(path, size=(32, 39))
    with pytest.raises(UserError, match=r"logical_anomalies/001/000\.png"):
        read_loco(loco, cache)


PROGRAM = """
import os, signal, sys, time
from ulsad_jax.data import prepare as builder

root, cache, dies_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
to_example, read = builder.to_example, []

def slow(record, *others):
    read.append(record)
    if len(read) == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return to_example(record, *others)

builder.to_example = slow
data = builder.find_builder("mvtec_loco")(root=root, config="pushpins", data_dir=cache)
data.download_and_prepare()
assert len(data.as_data_source("test")) == 6
assert "tensorflow" not in sys.modules
print(len(read))
"""


def start(loco: Path, cache: Path, *, dies_at: int = 0) -> subprocess.Popen:
    arguments = [sys.executable, "-c", PROGRAM, str(loco), str(cache), str(dies_at)]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PROJECT
    )


def test_a_killed_build_is_not_served(loco, cache):
    process = start(loco, cache, dies_at=8)
    process.communicate(timeout=60)
    assert process.returncode < 0
    assert list(cache.rglob("incomplete*"))
    assert not find_built(cache)
    assert len(read_loco(loco, cache)) == 6
    assert not list(cache.rglob("incomplete*"))


def test_two_processes_build_once(loco, cache):
    processes = [start(loco, cache) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert sorted(int(out) for out, _ in outputs) == [0, 12]
    assert len(read_loco(loco, cache)) == 6


def test_one_line_is_printed_and_no_host_is_asked(loco, cache, capfd, monkeypatch):
    def refuse(*args):
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    build("mvtec_loco", loco, "pushpins", cache)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "Building mvtec_loco/pushpins: 12 images\n"


def test_a_data_source_can_be_sent_to_another_process(loco, cache):
    source = build("mvtec_loco", loco, "pushpins", cache).as_data_source("test")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[1]["image"], source[1]["image"])


def write_format(path: Path, kind: str) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    rgb = Image.fromarray(pixels[..., :3])
    if kind == "png, 16 bit":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path, "PNG")
    elif kind == "png, 16 bit RGB":
        formats.write_png_16_bit(path, pixels[..., :3].astype(np.uint16) * 257)
    elif kind == "png, RGBA":
        Image.fromarray(pixels).save(path, "PNG")
    elif kind == "jpeg, CMYK":
        rgb.convert("CMYK").save(path, "JPEG")
    elif "EXIF" in kind:
        ending, orientation = kind.split(", EXIF ")
        path = path.with_suffix(f".{ending}")
        formats.save(path, pixels[..., :3], int(orientation))
    else:
        format_, mode = kind.split(", ")
        rgb.convert(mode).save(path, format_.upper())
    return path


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("png, RGB", True),
        ("jpeg, RGB", True),
        ("jpeg, L", False),
        ("jpeg, CMYK", False),
        ("png, L", False),
        ("png, 1", False),
        ("png, P", False),
        ("png, LA", False),
        ("png, RGBA", False),
        ("png, 16 bit", False),
        ("png, 16 bit RGB", False),
        ("bmp, RGB", False),
        ("tiff, RGB", False),
        ("webp, RGB", False),
        *((f"{kind}, EXIF {i}", i == 1) for kind in ("png", "jpg") for i in (1, 3, 6)),
    ],
)
def test_any_image_file_becomes_upright_8_bit_rgb(tmp_path, kind, kept):
    path = write_format(tmp_path / "image", kind)
    data = to_example(Record(path, "train"), Survey())["image"]
    assert (data == path.read_bytes()) == kept
    with Image.open(io.BytesIO(data)) as image:
        assert image.format in ("PNG", "JPEG")
        assert image.mode == "RGB"
        assert image.getexif().get(0x0112, 1) == 1
        np.testing.assert_array_equal(np.asarray(image), read_image(path))


def write_deep(root: Path, name: str, factor: float) -> Path:
    for i in range(3):
        folder = root / "train" / "good"
        path = formats.save_deep(folder, name, formats.draw(i), factor=factor)
        path.rename(folder / f"{i}{path.suffix}")
    return root


@pytest.mark.parametrize(
    ("name", "factor", "level"),
    [
        ("grey16.png", 1, "255"),
        ("grey16.tif", 4, "1023"),
        ("rgb16.png", 16, "4095"),
        ("rgba16.tif", 16, "4095"),
        ("grey16.png", 64, ""),
        ("rgb16.tif", 257, ""),
    ],
)
def test_16_bits_that_are_not_used_are_noticed(tmp_path, cache, name, factor, level):
    root = write_deep(tmp_path / "mine", name, factor)
    remarks = build("folder", root, None, cache).read_survey().remarks
    if not level:
        assert not remarks
        return
    (remark,) = remarks
    assert remark.startswith("3 files have 16 bits a channel, but no value above")
    assert f"--config.dataset.white_level={level}: {root}" in remark
    again = find_builder("folder")(root=root, data_dir=cache, white_level=float(level))
    again.download_and_prepare()
    assert not again.read_survey().remarks


def test_one_bright_image_of_16_bits_is_enough(tmp_path, cache):
    root = write_deep(tmp_path / "mine", "grey16.png", 16)
    formats.save_deep(root / "test" / "dent", "grey16.png", formats.draw(), factor=257)
    assert not build("folder", root, None, cache).read_survey().remarks


def test_values_above_the_white_level_are_noticed(tmp_path, cache):
    root = write_deep(tmp_path / "mine", "grey16.png", 16)
    builder = find_builder("folder")(root=root, data_dir=cache, white_level=1023)
    builder.download_and_prepare()
    (remark,) = builder.read_survey().remarks
    assert remark.startswith("3 files have values above config.dataset.white_level")


def test_white_levels_are_prepared_side_by_side(tmp_path, cache, capfd):
    root = write_deep(tmp_path / "mine", "grey16.png", 16)
    builders = {}
    for level in (0.0, 1020.0, 4080.0) * 2:
        builders[level] = find_builder("folder")(
            root=root, data_dir=cache, white_level=level
        )
        builders[level].download_and_prepare()
        source = builders[level].as_data_source("train")
        source = pickle.loads(pickle.dumps(source))
        expected = np.minimum(formats.draw()[..., 0] * (4080 / (level or 65535)), 255)
        np.testing.assert_array_equal(source[0]["image"][..., 0], np.rint(expected))
    assert capfd.readouterr().err.count("Building") == 3
    assert len({builder.fingerprint for builder in builders.values()}) == 3


def test_an_anomalous_image_may_have_no_mask(tmp_path, cache):
    root = trees.write_folder(tmp_path / "mine", test={"dent": 1}, masks=False)
    example = build("folder", root, None, cache).as_data_source("test")[0]
    assert example["label"] == 1
    assert not example["has_mask"]
    assert len(example["masks"]["mask"]) == 0


def test_masks_that_cannot_be_right(tmp_path, cache):
    """An empty one tells nothing; a full one counts; both are remembered."""
    root = trees.write_folder(tmp_path / "mine", test={"good": 1, "dent": 4})
    masks = root / "ground_truth" / "dent"
    Image.new("L", trees.SIZE[::-1], "black").save(masks / "000_mask.png")
    Image.new("L", trees.SIZE[::-1], "white").save(masks / "001_mask.png")
    (masks / "002_mask.png").unlink()
    Image.new("RGB", trees.SIZE[::-1], "black").save(masks / "002_mask.jpg")
    for _ in range(2):  # prepares it, finds it prepared
        builder = build("folder", root, None, cache)
        examples = list(builder.as_data_source("test"))
        assert [e["has_mask"] for e in examples] == [True, False, True, False, True]
        assert [len(e["masks"]["mask"]) for e in examples] == [0, 0, 1, 0, 1]
        assert examples[2]["masks"]["mask"][0].all()
        empty, full = sorted(builder.read_survey().remarks, reverse=True)
        assert empty.startswith("2 files have a mask without any defective pixel")
        assert "dent/000.png" in empty
        assert "dent/002.png" in empty
        assert full.startswith("1 file have a mask that covers the whole image")
        assert full.endswith("dent/001.png")


def test_an_empty_channel_of_mvtec_loco_is_refused(loco, cache):
    path = loco / "pushpins" / "ground_truth" / "logical_anomalies" / "000" / "001.png"
    trees.write_mask(path, value=0)
    with pytest.raises(UserError, match=r"logical_anomalies/000/001\.png.*values \[\]"):
        read_loco(loco, cache)


def test_groups_are_stored(tmp_path, cache):
    root = trees.write_magnetic_tile(tmp_path / "tiles")
    builder = build("magnetic_tile", root, "magnetic_tile", cache)
    groups = [r.group for r in builder.records if r.split == "train"]
    stored = [e["group"].decode() for e in builder.as_data_source("train")]
    assert stored == groups
    assert len(set(groups)) > 1


def test_what_is_built_can_be_read_where_nothing_can_be_written(loco, cache):
    read_loco(loco, cache)
    folder = find_built(cache)[0].parent
    (folder / ".lock").unlink()
    folder.chmod(0o555)
    try:
        assert len(read_loco(loco, cache)) == 6
        assert not (folder / ".lock").exists()
    finally:
        folder.chmod(0o755)
