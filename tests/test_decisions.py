from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from tests import runs
from ulsad_jax.runs import run as experiment
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.scoring import thresholds as decisions


def make_maps(scores):
    """Maps whose maxima are the scores, in some order."""
    scores = np.float32(scores)
    maps = np.random.default_rng(0).uniform(-1, 0, (len(scores), 8, 8))
    maps[:, 3, 5] = np.random.default_rng(1).permutation(scores)
    return maps.astype(np.float32)


def choose(scores, image_fpr=0.05, pixel_fpr=0.01):
    maps = make_maps(scores)
    return decisions.choose(
        maps, maps.max((1, 2)), image_fpr=image_fpr, pixel_fpr=pixel_fpr
    )


@pytest.mark.parametrize(
    ("n", "fpr", "rank", "expected"),
    [
        (19, 0.05, 19, 1 / 20),  # just enough images
        (18, 0.05, 18, 1 / 19),  # one too few: the largest score, and its rate
        (20, 0.05, 20, 1 / 21),
        (39, 0.05, 38, 2 / 40),
        (60, 0.05, 58, 3 / 61),
        (9, 0.3, 7, 3 / 10),  # (n + 1) (1 - fpr) is 7.000000000000001
        (10, 0.05, 10, 1 / 11),
        (1, 0.05, 1, 1 / 2),
        (4, 0.9, 1, 4 / 5),  # more than n images can give: the smallest score
        (4, 0.99, 1, 4 / 5),
    ],
)
def test_image_threshold_is_an_order_statistic(n, fpr, rank, expected):
    found = choose(np.arange(1, n + 1), image_fpr=fpr)
    assert found.thresholds.image == found.thresholds.half == rank
    assert found.basis.validation_scores == tuple(range(1, n + 1))
    assert found.basis.image_fpr == fpr
    assert found.basis.image_fpr_expected == pytest.approx(expected)
    beta = stats.beta(n + 1 - rank, rank)
    assert found.basis.image_fpr_upper == pytest.approx(beta.ppf(0.95))


@pytest.mark.parametrize("n", [10, 30, 60])
def test_promise_holds_on_new_images(n):
    """Exchangeable scores of any distribution: mean and 0.95 quantile of the rate."""
    rng = np.random.default_rng(n)
    rates = []
    for _ in range(2000):
        found = choose(np.sort(rng.lognormal(size=n)), image_fpr=0.05)
        rates.append(stats.lognorm.sf(found.thresholds.image, 1))
    error = np.std(rates) / math.sqrt(len(rates))
    assert np.mean(rates) == pytest.approx(
        found.basis.image_fpr_expected, abs=4 * error
    )
    below = np.mean(np.array(rates) <= found.basis.image_fpr_upper)
    assert below == pytest.approx(0.95, abs=0.02)


def test_equal_scores_keep_the_promise():
    found = choose([1.0, 2.0, 2.0, 2.0], image_fpr=0.4)
    assert found.thresholds.image == 2
    assert found.thresholds.zero < found.thresholds.half


@pytest.mark.parametrize("fpr", [0.5, 0.1, 0.005, 1e-6])
def test_pixel_threshold_is_the_smallest_that_keeps_the_rate(fpr):
    maps = np.random.default_rng(0).gamma(2, size=(5, 16, 24)).astype(np.float32)
    found = decisions.choose(maps, maps.max((1, 2)), image_fpr=0.1, pixel_fpr=fpr)
    threshold = np.float32(found.thresholds.pixel)
    assert (maps > threshold).mean() <= fpr
    below = maps[maps < threshold].max()
    assert (maps > below).mean() > fpr
    shares = [(image > threshold).mean() for image in maps]
    assert found.basis.pixel_fpr_error == pytest.approx(stats.sem(shares))


def test_single_image():
    found = choose([3.0])
    assert found.thresholds.image == 3
    assert decisions.normalize(np.float32(3), found.thresholds) == 0.5
    assert found.basis.pixel_fpr_error is None
    assert found.basis.image_fpr_upper == pytest.approx(0.95)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_stay_finite(value):
    maps = np.full((3, 8, 8), value, np.float32)
    found = decisions.choose(maps, maps.max((1, 2)), image_fpr=0.05, pixel_fpr=0.01)
    assert found.thresholds.image == found.thresholds.pixel == value
    normalized = decisions.normalize(maps.max((1, 2)), found.thresholds)
    np.testing.assert_array_equal(normalized, 0.5)


def test_normalized_score():
    scores = np.sort(np.random.default_rng(0).normal(size=60)).astype(np.float32)
    thresholds = choose(scores).thresholds
    normalized = decisions.normalize(scores, thresholds)
    assert np.median(normalized) == pytest.approx(0, abs=1e-6)
    assert normalized[57] == 0.5  # at the threshold itself, exactly
    assert (np.diff(normalized) > 0).all()
    np.testing.assert_array_equal(scores > thresholds.image, normalized > 0.5)
    far = np.float32([-100, 100])
    assert decisions.normalize(far, thresholds)[1] > 10  # not clipped


def test_json_round_trip():
    for found in (choose([1.0, 2.0]), choose([1.0])):
        text = json.dumps(found.to_json(), allow_nan=False)
        assert decisions.Decisions.from_json(json.loads(text)) == found


def test_thresholds_by_hand():
    found = choose([1.0, 2.0, 3.0])
    other = found.override(image=7)
    assert other.thresholds == found.thresholds.replace(image=7.0)
    assert other.basis.image_fpr is other.basis.image_fpr_expected is None
    assert other.basis.image_fpr_upper is None
    assert other.basis.pixel_fpr == found.basis.pixel_fpr
    assert other.basis.validation_scores == found.basis.validation_scores
    other = found.override(pixel=-0.5)
    assert other.thresholds == found.thresholds.replace(pixel=-0.5)
    assert other.basis.pixel_fpr is None
    assert other.basis.image_fpr == found.basis.image_fpr
    assert found.override() == found
    for wrong in (math.nan, math.inf):
        with pytest.raises(UserError, match="finite"):
            found.override(image=wrong)


def test_rates():
    positive = np.array([1, 1, 1, 0, 0])
    decided = np.array([True, True, False, True, False])
    assert decisions.rates(positive, decided) == (2 / 3, 1 / 2)
    tpr, fpr = decisions.rates(positive[:3], decided[:3])
    assert tpr == 2 / 3
    assert math.isnan(fpr)


@pytest.mark.parametrize("n", [2, 3, 9])
@pytest.mark.parametrize("quantiles", [(0.9, 0.995), (0.5, 0.995), (0.0, 1.0)])
def test_quantiles_without_each_image(n, quantiles):
    rng = np.random.default_rng(n)
    values = rng.gamma(2, size=(n, 12, 10)).astype(np.float32)
    values[0] *= 10  # has all the large ones
    found = scoring.quantiles_without(values, quantiles)
    for i in range(n):
        expected = np.quantile(np.delete(values, i, axis=0), quantiles)
        np.testing.assert_allclose(found[i], expected, rtol=1e-6)


def test_maps_as_new_have_the_calibration_of_the_others():
    rng = np.random.default_rng(0)
    local, global_ = rng.gamma(2, size=(2, 4, 16, 16)).astype(np.float32)
    global_[2] = 1.0
    maps = {"local": local, "global": global_}
    found = scoring.fuse_as_new(maps, method="quantile")
    for i in range(4):
        others = {name: np.delete(m, i, axis=0) for name, m in maps.items()}
        calibration = scoring.calibrate(others, method="quantile")
        expected = scoring.fuse({n: m[i] for n, m in maps.items()}, calibration)
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)
    plain = scoring.fuse_as_new(maps, method="none")
    np.testing.assert_allclose(plain, (local + global_) / 2, rtol=1e-6)
    single = scoring.fuse_as_new({n: m[:1] for n, m in maps.items()}, method="quantile")
    assert np.isfinite(single).all()


# In a run


def test_decisions_of_a_run(finished):
    document = runs.read_results(finished.workdir, "bottle")
    stored = runs.read_checkpoint(finished.workdir)["decisions"]
    assert document["decisions"] == stored
    assert runs.read_results(finished.workdir)["decisions"] == {"bottle": stored}
    threshold, basis = stored["thresholds"]["image"], stored["basis"]
    assert len(basis["validation_scores"]) == 2  # 10 % of 14, rounded up
    assert threshold == basis["validation_scores"][-1]
    assert basis["image_fpr_expected"] == pytest.approx(1 / 3)
    line = next(x for x in finished.printed.splitlines() if "image threshold" in x)
    assert "33.3 % on average" in line
    assert "from 2 normals, too few for 5 %" in line
    metrics = document["metrics"]
    assert f"true positives {100 * metrics['image_tpr']:.2f}" in line


def check_scores(workdir):
    """The rows, the rates and the stored thresholds say the same; returns the rows."""
    document = runs.read_results(workdir, "bottle")
    thresholds = document["decisions"]["thresholds"]
    rows = runs.read_scores(workdir)
    unit = thresholds["half"] - thresholds["zero"]
    for row in rows:
        score = float(row["score"])
        assert (row["is_anomalous"] == "True") == (score > thresholds["image"])
        expected = 0.5 * (score - thresholds["zero"]) / unit
        assert float(row["normalized_score"]) == pytest.approx(expected, rel=1e-3)
        assert float(row["mask_share"]) == int(row["mask_area"]) / 64**2
        assert (int(row["mask_area"]) > 0) == (score > thresholds["pixel"])
    for name, label in (("image_tpr", "1"), ("image_fpr", "0")):
        found = [r["is_anomalous"] == "True" for r in rows if r["label"] == label]
        assert document["metrics"][name] == pytest.approx(np.mean(found))
    return rows


def test_rows_rates_and_thresholds_agree(finished):
    check_scores(finished.workdir)


def test_evaluation_with_thresholds_by_hand(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    before = check_scores(finished.workdir)
    middle = sorted(float(row["score"]) for row in before)[3]
    printed = experiment.evaluate(
        run.workdir, image_threshold=middle, pixel_threshold=-1e3
    )
    rows = check_scores(run.workdir)
    assert sum(row["is_anomalous"] == "True" for row in rows) == 3
    assert {row["mask_share"] for row in rows} == {"1.0"}
    for name in ("score", "normalized_score", "local_score"):
        assert [row[name] for row in rows] == [row[name] for row in before]
    assert printed.count("given by hand") == 2
    metrics = runs.read_results(run.workdir, "bottle")["metrics"]
    assert metrics["pixel_tpr"] == metrics["pixel_fpr"] == 1
    # Training left other ones: its command evaluates again.
    runs.train(run.config, run.workdir)
    runs.assert_same_category(run.workdir, finished.workdir)


def test_checkpoint_of_a_version_without_decisions(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    for name in ("decisions", "digest"):  # that version had no checksums, either
        for path in run.workdir.glob(f"bottle/checkpoints/*/{name}"):
            path.rename(tmp_path / f"lost-{name}-{path.parent.name}")
    message = r"hold decisions, found none: another version.*train anew"
    with pytest.raises(UserError, match=message):
        experiment.evaluate(run.workdir)


def test_config_of_a_version_without_thresholds(finished, tmp_path):
    run = runs.copy(finished, tmp_path)
    path = run.workdir / "config.json"
    fields = json.loads(path.read_text())
    del fields["threshold"]
    path.write_text(json.dumps(fields))
    message = r"found: no config\.threshold\.image_fpr.*or train anew"
    with pytest.raises(UserError, match=message):
        experiment.evaluate(run.workdir)
    with pytest.raises(UserError, match=message):
        runs.train(run.config, run.workdir)
