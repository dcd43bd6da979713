"""What the training loop asks of devices, and what callers do to them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from ulsad_jax.methods.base import TOTAL, Method, State
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import loop, steps
from ulsad_jax.runs.validation import Validation
from ulsad_jax.runtime.devices import find_devices
from ulsad_jax.runtime.errors import Diverged, UserError
from ulsad_jax.runtime.profile import Profile
from ulsad_jax.runtime.writer import Silence
from ulsad_jax.sweep import wave
from ulsad_jax.trunks import sources

BATCH, PER_EPOCH, EPOCHS = 2, 4, 2


@dataclasses.dataclass(frozen=True)
class Mean(Method):
    """Has two losses; the second is not finite at one step."""

    infinite_at: int = -1

    def init(self, key, spec):
        return State(jnp.zeros((), jnp.int32), {"x": jnp.zeros(3)}, {})

    def update(self, state, batch, key):
        own = jnp.where(state.step == self.infinite_at, jnp.inf, 1.0)
        model = {"x": state.model["x"] + batch.image.mean()}
        losses = {TOTAL: batch.image.mean(dtype=jnp.float32), "own": own}
        return State(state.step + 1, model, {}), losses


@dataclasses.dataclass
class Store:
    """A checkpoint store that keeps what it is given."""

    saved: dict[int, Any] = dataclasses.field(default_factory=dict)

    def latest(self):
        return None

    def save(self, step, **items):
        self.saved[step] = jax.device_get(items)

    def wait(self):
        pass


def make_trainer(tmp_path, kind=loop.Trainer, method=Mean(), profile=()):
    images = np.arange(BATCH * PER_EPOCH * 4 * 4 * 3, dtype=np.uint8)
    kept = sources.Kept(images.reshape(-1, 4, 4, 3), None)
    fields = {"train.batch_size": BATCH, "train.num_epochs": EPOCHS}
    return kind(
        runs.make_config(tmp_path, fields | {"train.checkpoint_every": EPOCHS}),
        "bottle",
        method=method,
        devices=find_devices(1),
        normals=sources.Normals(kept, kept, None),
        spec=steps.make_spec(BATCH, (4, 4), None),
        validate=lambda model, step: Validation({TOTAL: 0.0}, Nothing(), Nothing()),
        store=Store(),
        writer=Silence(),
        trunk=None,
        profile=Profile(profile, tmp_path / "profile"),
    )


class Nothing:
    def to_json(self):
        return {}


@pytest.fixture
def events(monkeypatch):
    """Steps and fetches in their order; scalars may not be fetched one by one."""
    found, get = [], jax.device_get

    def counted(tree):
        if any(isinstance(x, jax.Array) for x in jax.tree.leaves(tree)):
            found.append("fetch")
        return get(tree)

    def refuse(array):
        raise AssertionError("an array of its own is fetched")

    monkeypatch.setattr(jax, "device_get", counted)
    monkeypatch.setattr(type(jnp.zeros(())), "__float__", refuse)
    return found


def test_losses_are_fetched_one_step_late_and_at_once(tmp_path, events, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(Store, "save", lambda *_, **__: None)
    step = trainer._train_step
    trainer._train_step = lambda *a: events.append("step") or step(*a)
    trainer.run()
    epoch = ["step", *["step", "fetch"] * (PER_EPOCH - 1), "fetch"]
    assert events == epoch * EPOCHS


@pytest.mark.parametrize("backend", wave.BACKENDS)
def test_losses_of_a_wave_are_fetched_one_step_late(
    tmp_path, events, monkeypatch, backend
):
    """At once for all members, and without delay where an epoch ends."""
    trainers = [make_trainer(tmp_path, wave.MemberTrainer) for _ in range(3)]
    states = [member.begin() for member in trainers]
    program = wave.choose_backend(backend)(
        wave.make_update(Mean()), states, [{}] * 3, [member.key for member in trainers]
    )
    monkeypatch.setattr(Store, "save", lambda *_, **__: None)
    events.clear()
    step = program.step
    program.step = lambda batches: events.append("step") or step(batches)
    wave.train(trainers, program)
    epoch = ["step", *["step", "fetch"] * (PER_EPOCH - 1), "fetch"]
    assert events == epoch * EPOCHS
    assert [member.step for member in trainers] == [PER_EPOCH * EPOCHS] * 3


@pytest.mark.parametrize("step", [0, 1, PER_EPOCH - 1, PER_EPOCH])
@pytest.mark.parametrize("way", ["alone", "wave"])
def test_a_loss_that_is_not_finite_is_found_at_its_step(tmp_path, step, way):
    method = Mean(infinite_at=step)
    expected = rf"'own' at step {step + 1} of"
    if way == "alone":
        with pytest.raises(Diverged, match=expected):
            make_trainer(tmp_path, method=method).run()
        return
    member = make_trainer(tmp_path, wave.MemberTrainer, method)
    program = wave.InTurn(
        wave.make_update(method), [member.begin()], [{}], [member.key]
    )
    wave.train([member], program)
    assert re.search(expected, member.failure)


@pytest.mark.parametrize(
    ("profile", "expected"), [((), None), ((2, 5), [2, 3, 4]), ((6, 99), [6, 7])]
)
def test_profile(tmp_path, profile, expected):
    """Also where it would go beyond the last step."""
    make_trainer(tmp_path, profile=profile).run()
    found = list((tmp_path / "profile").rglob("*.xplane.pb"))
    if expected is None:
        assert not found
        return
    data = jax.profiler.ProfileData.from_file(str(found[0]))
    traced = [
        dict(event.stats)["step_num"]
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert traced == expected


@pytest.mark.parametrize("wrong", [(10,), (20, 10), (3, 3), (-1, 5), (1.5, 3)])
def test_profile_that_is_none(tmp_path, wrong):
    config = runs.make_config(tmp_path)
    with config.unlocked():
        config.train.profile = wrong
    with pytest.raises(UserError, match=r"train.profile to be two increasing integers"):
        config_lib.validate(config)
