from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import runs
from ulsad_jax.metrics import pixel
from ulsad_jax.metrics.curves import Curve, area_up_to, thin
from ulsad_jax.report import page, pictures, plots, sections
from ulsad_jax.runs import evaluation, results, run_files
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs import run as experiment
from ulsad_jax.runtime import files, stages
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring.result import columns

HOSTILE = "<script>document.title='gone'</script>\"' onload=\"x()\" & $title"
HEAD = ["image", "name", "type", "label", *columns(("global", "local"))]
IMAGES = [  # type, stem, score, decision at 0.5
    ("good", "calm", 0.1, False),
    ("good", "alarm", 0.9, True),
    ("cut", "found", 0.8, True),
    ("cut", "missed", 0.2, False),
]


def write_run(workdir: Path, *, category="bottle", images=IMAGES, **about) -> Path:
    """The files of a run that the report reads, without a training."""
    folder = workdir / files.safe_name(category)
    folder.mkdir(parents=True)
    rows = [HEAD]
    for kind, stem, score, decided in images:
        image = f"/data/{kind}/{stem}.png"
        label = int(kind != "good")
        named = [image, f"{kind}/{stem}", kind, label]
        rows.append([*named, score, score, decided, 0.0, score, 9, 0.25])
        target = folder / "pictures" / files.safe_name(kind)
        target.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 64), "teal").save(
            target / files.safe_name(Path(image).stem, ".png")
        )
    files.replace_csv(folder / "scores.csv", rows)
    epochs = [{"epoch": k, "loss/total": 2.0 / k, "loss/mine": 1.0} for k in (1, 2, 3)]
    epochs[-1]["validation/total"] = 0.9
    lines = [json.dumps(epoch) for epoch in epochs]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"epo']))
    metrics = {"test_images": len(images), "image_auroc": 0.75, "aupro": math.nan}
    if images:
        curve = {"fpr": [0.0, 0.2, 1.0], "overlap": [0.0, 0.6, 1.0]}
        (folder / "curves.json").write_text(json.dumps({"pro": curve, "roc": curve}))
        kinds = {kind for kind, *_ in images} - {"good"}
        metrics |= {f"image_auroc/{kind}": 0.5 for kind in kinds}
    else:
        metrics = {"test_images": 0}
    thresholds = {"image": 0.5, "pixel": 0.4, "zero": 0.0, "half": 0.5}
    basis = {"validation_scores": [0.1, 0.2, 0.5], "image_fpr_expected": 0.25}
    basis |= {"pixel_fpr": None}
    trunk = {"architecture": "resnet18", "source": "random:0", "sha256": "ab"}
    about = {
        "selection": "last",
        "selected_on_test": False,
        "calibration": "quantile",
        "method": "ulsad",
        "decisions": {category: {"thresholds": thresholds, "basis": basis}},
        "trunk": trunk,
        "image_size": [64, 64],
        "versions": {"jax": "0.10"},
    } | about
    dataset = {"name": "folder", "root": HOSTILE}
    config = {"seed": 0, "dataset": dataset, "trunk": {}}
    (workdir / "config.json").write_text(json.dumps(config))
    results.write(workdir, {category: metrics}, about)
    return workdir


def compose(workdir: Path) -> str:
    return page.compose(run_files.read(workdir))


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data.strip())

    @property
    def links(self) -> list[str]:
        return [v for k, v in self.attributes if k in ("src", "href", "srcset")]


def test_page_asks_for_nothing_and_fits_a_phone(tmp_path):
    seen = Page(compose(write_run(tmp_path)))
    assert seen.links and all(link.startswith("data:") for link in seen.links)
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert ("name", "viewport") in seen.attributes
    text = compose(run_folder := tmp_path)
    assert "url(" not in text and "@import" not in text
    assert text == compose(run_folder)  # can be made again


def test_names_are_escaped(tmp_path):
    images = [(HOSTILE, HOSTILE.replace("/", ":"), 0.1, False), *IMAGES]
    seen = Page(compose(write_run(tmp_path, category=HOSTILE, images=images)))
    assert "script" not in seen.tags
    assert not [k for k, _ in seen.attributes if k.startswith("on")]
    assert HOSTILE in seen.texts  # as a heading, whole
    assert any(HOSTILE in v for k, v in seen.attributes if k == "alt")
    assert seen.tags.count("img") == len(images)
    for tag in ("section", "svg", "table"):
        assert seen.tags.count(tag) == compose(tmp_path).count(f"</{tag}>")


def test_worst_images_come_first(tmp_path):
    run = run_files.read(write_run(tmp_path))
    (category,) = run.categories
    names = [row.name for row in category.by_badness()]
    assert names == ["good/alarm", "cut/missed", "cut/found", "good/calm"]
    seen = Page(sections.show_gallery(category, limit=3))
    verdicts = [t for t in seen.texts if t in ("missed", "false alarm", "found")]
    assert verdicts == ["false alarm", "missed", "found"]
    assert seen.tags.count("img") == 3


def test_pictures_are_limited_over_all_categories(tmp_path, monkeypatch):
    """Half of them, the worst, where there are two categories and room for four."""
    monkeypatch.setattr(page, "MAX_PICTURES", 4)
    run = run_files.read(write_run(tmp_path))
    (category,) = run.categories
    seen = Page(page.compose(dataclasses.replace(run, categories=[category] * 2)))
    assert seen.tags.count("img") == 4
    verdicts = [t for t in seen.texts if t in ("missed", "false alarm", "found")]
    assert verdicts == ["false alarm", "missed"] * 2


def test_undefined_metric_is_a_dash(tmp_path):
    seen = Page(sections.tabulate_results(run_files.read(write_run(tmp_path))))
    header, row = seen.texts.index("AUPRO"), seen.texts.index("75.00")
    assert header and seen.texts[row + 1] == sections.DASH
    assert "nan" not in compose(tmp_path)


def test_selection_on_test_is_marked(tmp_path):
    marked = write_run(tmp_path / "a", selected_on_test=True)
    assert "Selected on the test set." in Page(compose(marked)).texts
    honest = write_run(tmp_path / "b")
    assert "Selected on the test set." not in Page(compose(honest)).texts


def test_report_without_test_images(tmp_path):
    text = compose(write_run(tmp_path, images=[]))
    assert "no test images" in text and "<img" not in text
    assert "validation normals (3)" in text and "Losses" in text
    assert "ROC" not in text


@pytest.mark.parametrize("kind", ["good", "cut"])
def test_report_with_one_class(tmp_path, kind):
    images = [image for image in IMAGES if image[0] == kind]
    text = compose(write_run(tmp_path, images=images))
    assert "ROC of images" not in text
    assert f"{kind} (2)" in text and text.count("<img") == 2


def test_report_before_anything_but_results(tmp_path):
    folder = write_run(tmp_path) / "bottle"
    for name in ("curves.json", "metrics.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "pictures")
    text = compose(tmp_path)
    assert "ROC of images" in text and "Losses" not in text and "<img" not in text


@pytest.mark.parametrize("content", [None, "", "{"])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("results.json", "eval.py --workdir="),
        ("config.json", "train.py"),
        ("bottle/scores.csv", "eval.py --workdir="),
        ("bottle/curves.json", "eval.py --workdir="),
    ],
)
def test_report_without_a_file_it_is_made_of(tmp_path, name, command, content):
    path = write_run(tmp_path) / name
    path.unlink() if content is None else path.write_text(content)
    if content is None and name == "bottle/curves.json":
        pytest.skip("may be missing")
    if content == "" and path.suffix == ".csv":
        content = None
        path.write_text("image,name\na,b\n")
    with pytest.raises(UserError) as refused:
        run_files.write_report(tmp_path)
    assert str(path) in str(refused.value) and command in str(refused.value)


def test_eval_makes_what_the_report_lacks(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "bottle" / "scores.csv"
    before = path.read_text()
    path.unlink()
    with pytest.raises(UserError, match=r"scores\.csv.*eval\.py --workdir="):
        runs.train(run.config, run.workdir)
    experiment.evaluate(run.workdir)
    assert path.read_text() == before


def test_report_finds_pictures_of_long_names(tmp_path):
    images = [("x y" * 83, "é" * 120 + str(i), 0.1, False) for i in range(3)]
    run = write_run(tmp_path, images=images)
    assert compose(run).count("<img") == 3


def test_report_says_what_pixel_metrics_do_not_see(tmp_path):
    run = run_files.read(write_run(tmp_path))
    run.categories[0].metrics.update(
        masks_lost=3, test_anomalous=4, pixel_auroc_original=0.5, aupro_original=0.25
    )
    text = sections.tabulate_results(run)
    assert "bottle, 3 of 4 masks have no pixel left at model resolution" in text
    assert "AUPRO (original size)" in text and "25.00" in text


def test_report_of_a_run(finished):
    seen = Page((finished.workdir / files_of.REPORT).read_text())
    metrics = runs.read_results(finished.workdir, "bottle")["metrics"]
    assert f"{100 * metrics['image_auroc']:.2f}" in seen.texts
    assert str(finished.workdir / files_of.REPORT) in finished.printed
    for title in ("Scores", "ROC of images", "ROC of pixels", "PRO", "Losses"):
        assert title in seen.texts
    for stage in ("features", "training", "prediction", "metrics", "pictures"):
        assert stage in seen.texts
    assert seen.tags.count("img") == len(
        {s["type"] for s in runs.read_scores(finished.workdir)}
    )


def test_stages_are_kept_and_replaced(tmp_path):
    path = tmp_path / "stages.json"
    for stage in ("first", "second", "first"):
        with stages.measure(path, stage):
            pass
    document = json.loads(path.read_text())
    assert list(document) == ["second", "first"]
    for record in document.values():
        assert record["seconds"] >= 0 and record["peak_bytes"] > 2**20
    with pytest.raises(ZeroDivisionError), stages.measure(path, "third"):
        _ = 1 / 0
    assert "third" not in path.read_text()


def test_thinned_curve_has_the_area_and_the_ends():
    rng = np.random.default_rng(0)
    fpr, overlap = (np.sort(np.append(rng.random(9998) ** p, (0, 1))) for p in (1, 4))
    curve = Curve(fpr, overlap)
    thinned = thin(curve)
    assert len(thinned.fpr) <= 201
    assert (thinned.fpr[[0, -1]] == (0, 1)).all()
    assert (thinned.overlap[[0, -1]] == (0, 1)).all()
    assert area_up_to(thinned, 1) == pytest.approx(area_up_to(curve, 1), abs=1e-4)
    few = thin(Curve(np.array([0, 0, 1]), np.array([0, 0.5, 1])))
    assert few.overlap.tolist() == [0, 0.5, 1]


def test_pixel_curves_have_the_areas_of_the_metrics():
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 32, 32), bool)
    masks[1, 4:12, 4:12] = masks[2, 20:30, 3:9] = True
    maps = (rng.random(masks.shape) + 0.5 * masks).astype(np.float32)
    known = np.array([True, True, False])
    stream = pixel.Pixels(masks[known], maps[known]).stream
    curves = evaluation.pixel_curves(stream)
    assert list(curves) == ["roc", "pro"]  # sPRO needs channels
    expected = pixel.aupro(masks[known], maps[known])
    pro = Curve(*(np.array(v) for v in curves["pro"].values()))
    assert area_up_to(pro, 0.3) == pytest.approx(expected, abs=5e-3)  # 200 points
    nothing = pixel.Pixels(masks[:0], maps[:0]).stream
    assert evaluation.pixel_curves(nothing) == {}


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 8, 10, 12, -1])
def test_pictures_are_the_worst_and_a_spread(limit):
    rows = list(range(10))  # the most wrongly scored first
    chosen = pictures.choose(rows, limit)
    assert len(set(chosen)) == len(chosen) == (min(limit, 10) if limit >= 0 else 10)
    half = -(-len(chosen) // 2)
    assert chosen[:half] == rows[:half]


def test_axes():
    assert plots.Axis("x", 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    axis = plots.Axis("y", 0.1, 1000, is_log=True)
    assert axis.ticks() == pytest.approx([0.1, 1, 10, 100, 1000])
    assert axis.place(10) == pytest.approx(0.5)
    for values in ([3.0], [0.0], [-1.0, 5.0], [1e-9, 1e9]):
        fitted = plots.fit_axis("loss", values)
        assert all(0 < fitted.place(v) < 1 for v in values)
        assert len(fitted.ticks()) >= (2 if len(values) > 1 else 1)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_browser(tmp_path, width):
    """A browser draws the page, and runs nothing that a name smuggles in."""
    write_run(tmp_path / "run", category=HOSTILE)
    run_files.write_report(tmp_path / "run")
    picture = tmp_path / "page.png"
    command = [
        *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},6000"),
        (tmp_path / "run" / files_of.REPORT).as_uri(),
    ]
    seen = {}
    for flag in (f"--screenshot={picture}", "--dump-dom"):
        ran = subprocess.run(
            [*command[:-1], flag, command[-1]],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        seen[flag] = ran.stdout
    dom = Page(seen["--dump-dom"])
    assert dom.texts.count("ULSAD: run") == 2  # title and heading
    assert "script" not in dom.tags
    drawn = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    teal = (abs(drawn - (0, 128, 128)) < 12).all(-1)
    assert teal.mean() > 0.002  # the gallery's pictures
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
