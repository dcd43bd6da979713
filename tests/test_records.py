"""Records: checks, the hold-out, reading images and masks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import formats, trees
from ulsad_jax.data.records import (
    ANOMALOUS,
    NORMAL,
    TEST,
    TRAIN,
    VALIDATION,
    Mask,
    Record,
    Saturation,
    check,
    fingerprint,
    hold_out,
    read_image,
    read_mask,
)
from ulsad_jax.runtime.errors import UserError

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
ROOT = Path("data")


def save(array, path, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


# read_image


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "tiff", "PNG"])
def test_read_grey(tmp_path, ending):
    found = read_image(save(GREY, tmp_path / f"a.{ending}"))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp"])
def test_read_lossy(tmp_path, ending):
    found = read_image(
        save(np.full((8, 6, 3), 200, np.uint8), tmp_path / f"a.{ending}")
    )
    assert found.shape == (8, 6, 3)
    assert np.abs(found.astype(int) - 200).max() <= 2


def test_read_rgba_drops_transparency(tmp_path):
    rgba = np.stack([GREY, GREY + 5, GREY + 9, 255 - GREY], axis=-1)
    np.testing.assert_array_equal(
        read_image(save(rgba, tmp_path / "a.png")), rgba[..., :3]
    )


def test_read_palette(tmp_path):
    image = Image.fromarray(GREY // 20 % 2).convert("P")
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    found = read_image(tmp_path / "a.png")
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[0, 1].tolist() == [200, 150, 100]


@pytest.mark.parametrize("mode", ["1", "LA"])
def test_read_other_modes(tmp_path, mode):
    pixels = np.where(GREY > 100, np.uint8(255), np.uint8(0))
    found = read_image(save(pixels, tmp_path / "a.png", mode))
    np.testing.assert_array_equal(found[..., 1], pixels)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_read_16_bit(tmp_path, ending, kind):
    values = np.array([[0, 257, 1000], [32768, 65000, 65535]])
    path = save(values.astype(kind), tmp_path / f"a.{ending}")
    expected = np.round(values / 257)
    np.testing.assert_array_equal(read_image(path)[..., 0], expected)
    np.testing.assert_array_equal(read_image(path)[..., 2], expected)


@pytest.mark.parametrize("orientation", formats.ORIENTATIONS)
@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
def test_read_as_viewers_show_it(tmp_path, ending, orientation):
    path = formats.save(tmp_path / f"a.{ending}", formats.draw(), orientation)
    within = 8 if ending == "jpg" else 0
    np.testing.assert_allclose(read_image(path), formats.draw(), atol=within)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_read_a_turned_deep_tiff(tmp_path, compression):
    values = formats.draw()[..., 0].astype(np.uint16)
    image, exif = formats.hold(Image.fromarray(values), 6)
    image.save(tmp_path / "a.tif", exif=exif, compression=compression)
    found = read_image(tmp_path / "a.tif", white_level=255)
    np.testing.assert_array_equal(found[..., 0], values)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("exif", [b"", b"no TIFF header", b"II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing(tmp_path, ending, exif):
    pixels = np.full((8, 6, 3), 100, np.uint8)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0" + exif)
    np.testing.assert_allclose(read_image(path), pixels, atol=2)


@pytest.mark.parametrize("name", formats.DEEP)
def test_read_deep_values_by_their_white_level(tmp_path, name):
    pixels = formats.draw()
    channels = [0, 1, 2] if name.startswith("rgb") else [0, 0, 0]
    path = formats.save_deep(tmp_path, name, pixels, factor=16)
    found = read_image(path, white_level=formats.WHITE)
    np.testing.assert_array_equal(found, pixels[..., channels])
    found = read_image(path, white_level=formats.WHITE / 4)
    expected = np.minimum(4 * pixels[..., channels].astype(int), 255)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["rgb16.png", "rgb16.tif", "rgb16_big_endian.tif"])
def test_every_bit_of_16_bit_colour_counts(tmp_path, name):
    values = np.random.default_rng(0).integers(0, 4096, (20, 30, 3))
    path = formats.save_deep(tmp_path, name, values, factor=1)
    expected = np.rint(255 * values / 4095)
    np.testing.assert_array_equal(read_image(path, white_level=4095), expected)


def test_read_floats(tmp_path):
    path = formats.save_deep(tmp_path, "float.tif", formats.draw(), factor=1 / 255)
    found = read_image(path, white_level=1)
    np.testing.assert_array_equal(found[..., 0], formats.draw()[..., 0])


@pytest.mark.parametrize("white_level", [0.0, 65535.0])
def test_16_bits_that_all_count(tmp_path, white_level):
    for name in ("grey16.png", "rgb16.tif"):
        path = formats.save_deep(tmp_path, name, formats.draw(), factor=257)
        found = read_image(path, white_level=white_level)
        np.testing.assert_array_equal(found[..., 0], formats.draw()[..., 0])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_8_bits_have_no_white_level(tmp_path, name):
    path = formats.save(tmp_path / name, formats.draw())
    expected = read_image(path)
    np.testing.assert_array_equal(read_image(path, white_level=100), expected)


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        ("float.tif", 1 / 255, r"float\.tif with floating.*white_level=1,"),
        ("float.tif", 1, r"floating-point numbers from 0 to .*white_level=255,"),
        ("int32.tif", 16, r"int32\.tif with integers from 0 .*white_level=4095,"),
    ],
)
def test_values_that_need_a_white_level(tmp_path, name, factor, message):
    path = formats.save_deep(tmp_path, name, formats.draw(), factor=factor)
    with pytest.raises(UserError, match=message):
        read_image(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    pixels = np.full((3, 4), 0.5, np.float32)
    pixels[1, 1] = value
    with pytest.raises(UserError, match=r"finite values in .*a\.tif"):
        read_image(save(pixels, tmp_path / "a.tif"), white_level=1)


def test_colours_whose_bits_cannot_all_be_read(tmp_path):
    values = np.full((3, 4, 4), 3000, np.uint16)
    path = tmp_path / "cmyk.tif"
    formats.write_tiff_16_bit(path, values, photometric=5)
    assert read_image(path).shape == (3, 4, 3)
    with pytest.raises(UserError, match=r"cmyk\.tif as CMYK.*Save it"):
        read_image(path, white_level=4095)
    path = tmp_path / "planes.tif"
    formats.write_tiff_16_bit(path, values[..., :3], planar=True)
    for white_level in (0, 4095):
        with pytest.raises(UserError, match=r"planes\.tif as one plane a channel"):
            read_image(path, white_level=white_level)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp"])
def test_read_truncated(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    trees.write_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"readable image file, found .*a.{ending}"):
        read_image(path)


def test_read_what_is_no_image(tmp_path):
    (tmp_path / "a.png").write_text("version https://example.org")
    (tmp_path / "b.png").write_bytes(b"")
    for name in ("a.png", "b.png", "none.png"):
        with pytest.raises(UserError, match=rf"found .*{name}.*Replace or remove"):
            read_image(tmp_path / name)


# read_mask


def test_read_mask_above(tmp_path):
    path = save(GREY, tmp_path / "m.png")
    found, saturation = read_mask(Mask(path), size=(3, 4))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, GREY > 0)
    assert saturation == Saturation()
    found, _ = read_mask(Mask(path, above=127), size=(3, 4))
    np.testing.assert_array_equal(found, GREY > 127)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_read_mask_of_any_mode(tmp_path, mode):
    pixels = np.where(GREY > 100, np.uint8(255), np.uint8(0))
    path = save(pixels, tmp_path / "m.png", mode)
    for above in (0, 127):
        found, _ = read_mask(Mask(path, above=above), size=(3, 4))
        np.testing.assert_array_equal(found, pixels > 0)


DRAWN = np.zeros((96, 80), bool)
DRAWN[60:74, 30:44] = True  # not on the blocks of JPEG and WebP


def read_saved(image, path, **options):
    image.save(path, **options)
    return read_mask(Mask(path), size=image.size[::-1])[0]


def draw(value, mode="L"):
    return Image.fromarray(DRAWN * np.uint8(value)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("jpg", {}),
        ("tif", {"compression": "jpeg"}),
        ("webp", {}),
        ("webp", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
    ],
)
def test_read_mask_with_loss(tmp_path, mode, quality, ending, options):
    path = tmp_path / f"m.{ending}"
    for value in (100, 255):
        found = read_saved(draw(value, mode), path, quality=quality, **options)
        assert (np.asarray(Image.open(path).convert("L")) > 0).sum() > found.sum()
        np.testing.assert_array_equal(found, DRAWN)


def test_read_dark_mask_with_loss(tmp_path):
    found = read_saved(draw(1), tmp_path / "m.jpg", quality=95)
    assert (found != DRAWN).sum() <= 10  # of 196 drawn ones


def test_read_animated_mask_with_loss(tmp_path):
    options = {"save_all": True, "append_images": [Image.new("RGB", (80, 96))]}
    found = read_saved(draw(255, "RGB"), tmp_path / "m.webp", quality=80, **options)
    np.testing.assert_array_equal(found, DRAWN)


@pytest.mark.parametrize("quality", [10, 50, 62, 75, 90, 95, 100])
@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_read_black_and_white_masks_with_loss(tmp_path, ending, quality):
    path = tmp_path / f"m.{ending}"
    for mode in ("L", "RGB"):
        for size in ((80, 96), (97, 53), (8, 8)):
            black, white = (
                Image.new(mode, size, color) for color in ("black", "white")
            )
            assert not read_saved(black, path, quality=quality).any()
            assert read_saved(white, path, quality=quality).all()


@pytest.mark.parametrize("value", [1, 2, 255])
def test_read_webp_mask_without_loss(tmp_path, value):
    found = read_saved(draw(value), tmp_path / "m.webp", lossless=True)
    np.testing.assert_array_equal(found, DRAWN)
    both = np.where(DRAWN, np.uint8(255), np.uint8(0))
    both[0] = 1  # far below half of the largest
    found = read_saved(Image.fromarray(both), tmp_path / "n.webp", lossless=True)
    np.testing.assert_array_equal(found, both > 0)


def draw_palette(background, drawn):
    image = Image.frombytes("P", DRAWN.shape[::-1], np.uint8(DRAWN).tobytes())
    image.putpalette([*background, *drawn])
    return image


def test_read_mask_through_its_palette(tmp_path):
    path = tmp_path / "m.png"
    black, white, red, blue = (0, 0, 0), (255, 255, 255), (128, 0, 0), (0, 0, 1)
    for color in (white, red, blue):
        found = read_saved(draw_palette(black, color), path)
        np.testing.assert_array_equal(found, DRAWN)
        found = read_saved(draw_palette(color, black), path)
        np.testing.assert_array_equal(found, ~DRAWN)
    assert read_saved(draw_palette(white, red), path).all()
    assert not read_saved(draw_palette(black, black), path).any()
    found = read_saved(draw_palette(white, red), path, transparency=0)
    np.testing.assert_array_equal(found, DRAWN)


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_read_mask_on_black(tmp_path, ending, mode):
    """White paint on nothing is drawn, black paint is not, hidden colours are not."""
    alpha = draw(255)
    for ground, drawn in ((255, DRAWN), (0, DRAWN & False)):
        image = Image.new("L", alpha.size, ground).convert(mode)
        image.putalpha(alpha)
        found = read_saved(image, tmp_path / f"m.{ending}", lossless=True)
        np.testing.assert_array_equal(found, drawn)
    opaque = draw(255, mode)
    found = read_saved(opaque, tmp_path / f"m.{ending}", lossless=True)
    np.testing.assert_array_equal(found, DRAWN)


@pytest.mark.parametrize("value", [-1, 1, 256, 65536, 0.25])
def test_read_mask_of_many_bits(tmp_path, value):
    kind = np.float32 if isinstance(value, float) else np.int32
    found = read_saved(Image.fromarray(DRAWN * kind(value)), tmp_path / "m.tif")
    np.testing.assert_array_equal(found, DRAWN)
    if kind == np.int32 and 0 < value < 65536:
        image = Image.fromarray(DRAWN * np.uint16(value))
        np.testing.assert_array_equal(read_saved(image, tmp_path / "m.png"), DRAWN)


@pytest.mark.parametrize("ending", ["tif", "jpg"])
def test_read_mask_in_printing_colours(tmp_path, ending):
    path = tmp_path / f"m.{ending}"
    with pytest.raises(UserError, match=rf"mask .*m\.{ending} .*CMYK.*as a PNG"):
        read_saved(draw(255, "CMYK"), path)


@pytest.mark.parametrize("orientation", formats.ORIENTATIONS)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_read_mask_as_viewers_show_it(tmp_path, ending, orientation):
    pixels = np.where(GREY > 100, np.uint8(255), np.uint8(0))
    path = formats.save(tmp_path / f"m.{ending}", pixels, orientation)
    found, _ = read_mask(Mask(path), size=(3, 4))
    np.testing.assert_array_equal(found, pixels > 0)


def test_read_mask_of_another_size(tmp_path):
    path = save(GREY, tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m.png .*40 x 32 .*found 4 x 3"):
        read_mask(Mask(path), size=trees.SIZE)


def test_read_loco_mask(tmp_path):
    rules = {255: Saturation("a", 60, False), 254: Saturation("b")}
    path = tmp_path / "000.png"
    trees.write_mask(path, value=254)
    found, saturation = read_mask(Mask(path, saturations=rules), size=trees.SIZE)
    assert found.sum() == 80
    assert saturation == rules[254]


@pytest.mark.parametrize(
    ("values", "found"), [([7], r"\[7\]"), ([254, 255], r"\[254, 255\]"), ([], r"\[\]")]
)
def test_read_loco_mask_of_unknown_value(tmp_path, values, found):
    rules = {255: Saturation(), 254: Saturation()}
    pixels = np.zeros((3, 4), np.uint8)
    pixels[0, : len(values)] = values
    path = save(pixels, tmp_path / "000.png")
    with pytest.raises(UserError, match=rf"000.png .*\[254, 255\].*values {found}"):
        read_mask(Mask(path, saturations=rules), size=(3, 4))


# hold_out


def grouped(sizes):
    return [
        Record(ROOT / f"{i}_{j}.png", TRAIN, group=f"g{i}")
        for i, size in enumerate(sizes)
        for j in range(size)
    ]


@pytest.mark.parametrize("sizes", [[1, 1], [6, 1], [3, 3, 3], [1] * 30, [6] * 20])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_hold_out(sizes, fraction):
    for seed in range(10):
        records = grouped(sizes)
        kept, held = hold_out(records, fraction=fraction, seed=seed)
        assert kept and held
        assert {r.group for r in kept}.isdisjoint(r.group for r in held)
        assert sorted(kept + held, key=records.index) == records
        if fraction <= 0.5 and len(sizes) > 2:
            overshoot = len(held) - max(1, fraction * len(records))
            assert 0 <= overshoot < max(sizes)


def test_hold_out_without_groups():
    records = [Record(ROOT / f"{i}.png", TRAIN) for i in range(10)]
    kept, held = hold_out(records, fraction=0.2, seed=1)
    assert (len(kept), len(held)) == (8, 2)
    assert hold_out(records[::-1], fraction=0.2, seed=1)[1] == held[::-1]
    others = [hold_out(records, fraction=0.2, seed=s)[1] for s in range(2, 8)]
    assert any(other != held for other in others)


@pytest.mark.parametrize("sizes", [[], [6]])
def test_hold_out_of_one_object(sizes):
    with pytest.raises(UserError, match="at least two objects"):
        hold_out(grouped(sizes), fraction=0.2, seed=0)


# check


def test_record():
    normal, bad = Record(ROOT / "a.b.png", TRAIN), Record(ROOT / "c.png", TEST, "cut")
    assert (normal.label, normal.name) == (NORMAL, "good/a.b")
    assert (bad.label, bad.name) == (ANOMALOUS, "cut/c")


def test_check_sorts():
    records = [
        Record(ROOT / "1.png", TEST, "cut"),
        Record(ROOT / "2.png", TEST),
        Record(ROOT / "9.png", VALIDATION),
        Record(ROOT / "5.png", TRAIN),
        Record(ROOT / "4.png", TRAIN),
    ]
    assert [r.image.stem for r in check(records, ROOT)] == ["4", "5", "9", "2", "1"]


def test_check_without_images():
    with pytest.raises(UserError, match=r"images under data, found none"):
        check([], ROOT)


@pytest.mark.parametrize("split", [TRAIN, VALIDATION])
def test_check_anomalous_outside_the_test_split(split):
    records = [Record(ROOT / "1.png", TRAIN), Record(ROOT / "2.png", split, "cut")]
    with pytest.raises(UserError, match=rf"in the {split} split, found .*'cut'"):
        check(records, ROOT)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/1.png", "a/2.png"], ["1", "2"]),
        (["a/1.png", "b/1.png", "b/2.png"], ["a/1", "b/1", "2"]),
        (["1.png", "a/1.png"], ["1", "a/1"]),
        (["a/1.png", "a/1.jpg", "a/2.png"], ["1.png", "1.jpg", "2"]),
        (["x/a/1.png", "x/a/1.jpg", "x/b/1.bmp"], ["a/1.png", "a/1.jpg", "b/1"]),
        (["x/a/y/1.png", "x/b/y/1.png"], ["a/y/1", "b/y/1"]),
    ],
)
def test_check_tells_images_of_one_stem_apart(paths, names):
    """Other images keep their names, in other splits and types, too."""
    twins = [Record(ROOT / path, TRAIN) for path in paths]
    others = [Record(ROOT / "1.png", TEST), Record(ROOT / "a/1.png", TEST, "cut")]
    found = check([*twins, *others], ROOT)
    assert {r.image: r.name for r in found if r.split == TRAIN} == {
        ROOT / path: f"good/{name}" for path, name in zip(paths, names, strict=True)
    }
    assert [r.name for r in found if r.split == TEST] == ["good/1", "cut/1"]


def test_check_one_image_twice():
    records = [Record(ROOT / "1.png", TRAIN), Record(ROOT / "1.png", TRAIN)]
    with pytest.raises(UserError, match=r"'good/1.png' .*1.png and .*1.png"):
        check(records, ROOT)


def test_check_names_that_stay_the_same():
    records = [Record(ROOT / x, TRAIN) for x in ("1.png", "1.jpg", "1.png.bmp")]
    with pytest.raises(UserError, match=r"'good/1\.png' .*Rename one"):
        check(records, ROOT)


# fingerprint


def test_fingerprint(tmp_path):
    image, mask = tmp_path / "a.png", tmp_path / "m.png"
    trees.write_image(image)
    trees.write_mask(mask)
    records = [Record(image, TEST, "cut", (Mask(mask),))]
    first = fingerprint(records)
    assert fingerprint(records) == first
    assert fingerprint([Record(image, TEST, "cut")]) != first
    assert fingerprint([Record(image, TEST, "dent", (Mask(mask),))]) != first
    for path in (image, mask):
        before = fingerprint(records)
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
        assert fingerprint(records) != before
    before, status = fingerprint(records), image.stat()
    image.write_bytes(image.read_bytes() + b"x")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(records) != before  # by its size alone


def test_fingerprint_of_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"a.png, found nothing there"):
        fingerprint([Record(tmp_path / "a.png", TRAIN)])
