from __future__ import annotations

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import assert_same_arrays, list_steps
from ulsad_jax.runtime.checkpoint import CheckpointStore
from ulsad_jax.runtime.errors import UserError

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def place_first(shape):
    return DEVICE


def make_model(value=0.0):
    return {"params": {"w": jnp.full((2, 3), value, float), "b": jnp.arange(3.0)}}


def make_optimizer(count=0):
    return (jnp.int32(count), {"mu": jnp.full(3, count / 7)}, ())


def open_store(folder, *, metric="validation_loss", largest=False):
    return CheckpointStore(folder, metric=metric, largest=largest)


def save(store, step, loss=None, **metrics):
    """A checkpoint; without a loss it is one within an epoch."""
    if loss is not None:
        metrics["validation_loss"] = loss
    store.save(
        step,
        model=make_model(step),
        optimizer=make_optimizer(step),
        progress={"sums": {"total": step / 3}},
        calibration={"local_offset": step / 10} if metrics else None,
        decisions={"image": step / 5} if metrics else None,
        metrics=metrics or None,
    )
    store.wait()


def test_round_trip(tmp_path):
    with open_store(tmp_path) as store:
        assert store.latest() is None
        save(store, 7, loss=1.0)
    with open_store(tmp_path) as store:
        assert store.latest() == store.select(best=False) == 7
        model, optimizer, progress = store.restore_training(
            7, place_first, model=make_model(), optimizer=make_optimizer()
        )
        assert_same_arrays(model, make_model(7))
        assert_same_arrays(optimizer, make_optimizer(7))
        assert progress == store.restore_progress(7) == {"sums": {"total": 7 / 3}}
        model, calibration, decisions = store.restore_model(
            7, place_first, like=make_model()
        )
        assert_same_arrays(model, make_model(7))
        assert calibration == {"local_offset": 0.7}
        assert decisions == {"image": 1.4}


def test_last_and_best_are_kept(tmp_path):
    with open_store(tmp_path) as store:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
            save(store, step, loss)
        assert (store.select(best=True), store.select(best=False)) == (2, 4)
    assert list_steps(tmp_path) == [2, 4]
    with open_store(tmp_path) as store:
        save(store, 5, 0.5)
        assert store.select(best=True) == store.select(best=False) == 5
    assert list_steps(tmp_path) == [5]


def test_best_may_be_the_largest(tmp_path):
    with open_store(tmp_path, metric="auroc", largest=True) as store:
        for step, auroc in ((1, 0.3), (2, 0.9), (3, 0.5)):
            save(store, step, auroc=auroc)
        assert store.select(best=True) == 2
    assert list_steps(tmp_path) == [2, 3]


def test_checkpoint_within_an_epoch_is_no_reason_for_a_warning(tmp_path, caplog):
    with open_store(tmp_path) as store:
        save(store, 1)
        save(store, 2, loss=1.0)
        save(store, 3)
        save(store, 4, loss=2.0)
        assert store.select(best=True) == 2
    assert list_steps(tmp_path) == [2, 4]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == []


def test_checkpoint_within_an_epoch_is_resumed_not_evaluated(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 4, loss=1.0)
        save(store, 6)
        assert store.latest() == 6
        assert store.select(best=False) == store.select(best=True) == 4


def test_nothing_to_evaluate(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 6)
        with pytest.raises(UserError, match=r"steps \[6\] without it.*train\.py"):
            store.select(best=False)


def test_other_metric_is_missing(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 6, loss=1.0)
    with (
        open_store(tmp_path, metric="test_image_auroc", largest=True) as store,
        pytest.raises(UserError, match="test_image_auroc"),
    ):
        store.select(best=True)


def test_what_is_saved_is_what_was_given(tmp_path):
    """The next step overwrites these buffers while they are being saved."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    model = {"w": jnp.zeros((512, 512))}
    with open_store(tmp_path) as store:
        store.save(
            1,
            model=model,
            optimizer=make_optimizer(),
            progress={},
            calibration={},
            decisions={},
            metrics={"validation_loss": 1.0},
        )
        for _ in range(5):
            model = step(model)
    with open_store(tmp_path) as store:
        saved, *_ = store.restore_model(1, place_first, like=model)
        np.testing.assert_array_equal(saved["w"], 0)


@pytest.mark.parametrize("missing", ["commit_success.txt", "model", None])
def test_half_a_checkpoint_is_none(tmp_path, missing):
    """What a save that was killed leaves: a folder with a temporary name."""
    with open_store(tmp_path) as store:
        save(store, 3, loss=2.0)
        save(store, 6, loss=1.0)
        save(store, 9, loss=3.0)
    half = tmp_path / "12.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "9", half)
    (half / "commit_success.txt").unlink(missing_ok=True)
    if missing == "model":
        shutil.rmtree(half / "model")
    with open_store(tmp_path) as store:
        assert store.latest() == 9
        assert store.select(best=True) == 6
        save(store, 12, loss=0.5)
        assert store.select(best=True) == 12


def test_reader_leaves_alone_what_is_being_saved(tmp_path):
    """Evaluation may run beside training."""
    with open_store(tmp_path) as store:
        save(store, 3, loss=2.0)
    half = tmp_path / "6.orbax-checkpoint-tmp"
    half.mkdir()
    settings = {"metric": "validation_loss", "largest": False}
    with CheckpointStore(tmp_path, **settings, read_only=True) as store:
        assert store.select(best=False) == 3
        store.restore_model(3, place_first, like=make_model())
    assert half.exists()
    with open_store(tmp_path) as store:
        save(store, 9, loss=1.0)
    assert not half.exists()


def test_reader_makes_no_folder(tmp_path):
    settings = {"metric": "validation_loss", "largest": False}
    with (
        CheckpointStore(tmp_path / "none", **settings, read_only=True) as store,
        pytest.raises(UserError, match="found none"),
    ):
        store.select(best=False)
    assert not (tmp_path / "none").exists()


def test_other_networks_are_refused(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 3, loss=2.0)
        wider = {"params": {"w": jnp.zeros((2, 4))}}
        with pytest.raises(UserError, match=r"checkpoint 3 .*this config's networks"):
            store.restore_model(3, place_first, like=wider)
        deeper = {"params": {**make_model()["params"], "c": jnp.zeros(3)}}
        with pytest.raises(UserError, match="checkpoint 3"):
            store.restore_model(3, place_first, like=deeper)


def test_step_is_saved_once(tmp_path):
    with open_store(tmp_path) as store:
        save(store, 3, loss=2.0)
        save(store, 3, loss=1.0)
        assert store.select(best=True) == 3


def list_files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 6, of arrays that fill several blocks; read-only."""
    folder = tmp_path_factory.mktemp("saved")
    with open_store(folder) as store:
        for step in (3, 6):
            save(store, step, loss=1.0 / step if step == 3 else 2.0)
    return folder


def restore_all(folder):
    """Everything of the last checkpoint, as evaluation and training read it."""
    with CheckpointStore(folder, metric="validation_loss", read_only=True) as store:
        step = store.select(best=False)
        return (
            *store.restore_model(step, place_first, like=make_model()),
            *store.restore_training(
                step, place_first, model=make_model(), optimizer=make_optimizer()
            ),
        )


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2 if how == "middle" else 0] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["first", "middle", "cut", "gone"])
def test_damaged_file_is_harmless_or_one_message(saved, tmp_path, capfd, caplog, how):
    """Whichever it is: the values that were saved, or what is damaged; no traceback."""
    expected = restore_all(saved)
    told = set()
    for i, name in enumerate(list_files(saved / "6")):
        folder = shutil.copytree(saved, tmp_path / str(i))
        path = folder / "6" / name
        if how == "gone":
            path.unlink()
        else:
            damage(path, how)
        try:
            assert_same_arrays(restore_all(folder), expected)
        except UserError as error:
            message = str(error)
            told.add(name.parts[0])
            assert message.startswith(f"Expected checkpoint 6 in {folder} to be as it ")
            assert f"found {folder / '6' / name.parts[0]}" in message
            assert message.count("damaged: ") == 1
            assert message.endswith(
                f"Restore the folder {folder / '6'} from a copy. Or delete it, and run "
                "the train.py command again, which then goes on from checkpoint 3."
            )
            assert len(message) < 700 + 3 * len(str(folder))
    gc.collect()  # what is told of tasks that failed is told of them now
    items = {"model", "optimizer", "progress", "calibration", "decisions", "digest"}
    assert told >= items | {"metrics"}
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_advice_about_a_damaged_checkpoint_can_be_followed(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    damage(folder / "6" / "decisions" / "metadata", "cut")
    with pytest.raises(UserError, match="goes on from checkpoint 3"):
        restore_all(folder)
    shutil.rmtree(folder / "6")
    assert restore_all(folder)[1] == {"local_offset": 0.3}
    damage(folder / "3" / "decisions" / "metadata", "cut")
    with pytest.raises(UserError, match=r"which then begins anew\."):
        restore_all(folder)


def test_checkpoint_of_a_version_without_digests(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    for step in ("3", "6"):
        shutil.rmtree(folder / step / "digest")
    assert_same_arrays(restore_all(folder), restore_all(saved))
    shutil.rmtree(folder / "6" / "decisions")
    with pytest.raises(UserError, match="to hold decisions, found none: another vers"):
        restore_all(folder)


@pytest.mark.parametrize("deleted", ["model", "decisions", None])
def test_reader_sees_that_training_went_on(saved, tmp_path, deleted):
    """It may have begun to delete what the reader chose."""
    folder = shutil.copytree(saved, tmp_path / "copy")
    with CheckpointStore(folder, metric="validation_loss", read_only=True) as store:
        step = store.select(best=False)
        assert not store.is_overtaken()
        (folder / "6").rename(folder / "9")
        if deleted:
            shutil.copytree(saved / "6", folder / "6")
            shutil.rmtree(folder / "6" / deleted)
        with pytest.raises(UserError):
            store.restore_model(step, place_first, like=make_model())
        assert store.is_overtaken()


def test_checkpoint_that_is_being_saved(tmp_path):
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()
    with (
        CheckpointStore(tmp_path, metric="validation_loss", read_only=True) as store,
        pytest.raises(UserError, match="found none, but one that is being saved"),
    ):
        store.select(best=False)
