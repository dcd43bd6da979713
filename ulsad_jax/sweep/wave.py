"""Trains the members of a wave at once, as one program over all devices."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ulsad_jax.methods.base import Batch, Method, State
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import steps
from ulsad_jax.runs.loop import Trainer, stop_signals
from ulsad_jax.runtime.errors import Diverged, Interrupted
from ulsad_jax.trunks import sources

if TYPE_CHECKING:
    from jaxtyping import Array, Float
    from ml_collections import ConfigDict

MEMBER = "member"  # mesh axis over which members are split
Numbers = dict[str, np.ndarray]
Update = Callable[..., tuple[State, dict[str, Any]]]


def take_numbers(config: ConfigDict, traced: Sequence[str]) -> Numbers:
    """Returns a member's values of the traced fields.

    Args:
        config: resolved config of the member.
        traced: fields from `grid.traced_fields`.
    """
    fields = dict(config_lib.flatten(config))
    return {field: np.float32(fields[field]) for field in traced}


@functools.lru_cache
def make_update(method: Method) -> Update:
    """Returns `update(numbers, state, batch, key)`, with traced fields as arguments.

    Args:
        method: method of the members, with the fields in which they do not differ.
    """

    def update(
        numbers: Numbers, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        return steps.make_update(method.trace(numbers))(state, batch, key)

    return update


class AtOnce:
    """Members stacked along a new axis: `vmap`, split over all devices.

    Each device updates its own members, without communication between devices.
    """

    def __init__(
        self,
        update: Update,
        states: Sequence[State],
        numbers: Sequence[Numbers],
        keys: Sequence[jax.Array],
    ):
        """Places the members; the first one is repeated to fill all devices equally.

        Args:
            update: function from `make_update`.
            states: initial state of each member, in host memory.
            numbers: traced fields of each member.
            keys: random key of each member's updates.
        """
        self._mesh = Mesh(np.array(jax.devices()[: len(states)]), (MEMBER,))
        self._filling = -len(states) % self._mesh.size
        self._states, self._numbers = self._place(states), self._place(numbers)
        self._keys = self._place_keys(keys)
        self._update = vectorize(update, self._mesh)

    def step(self, batches: Sequence[Batch]) -> dict[str, Float[Array, " m"]]:
        """Updates every member with its batch; returns the losses before the update."""
        self._states, losses = self._update(
            self._numbers, self._states, self._place(batches), self._keys
        )
        return losses

    def state(self, i: int) -> State:
        """Returns the state of member i, on the first device."""
        return jax.device_put(_pick(self._states, i), jax.devices()[0])

    def _place(self, trees: Sequence[Any]) -> Any:
        trees = [*trees, *[trees[0]] * self._filling]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
        sharding = NamedSharding(self._mesh, PartitionSpec(MEMBER))
        return jax.device_put(stacked, sharding)

    def _place_keys(self, keys: Sequence[jax.Array]) -> jax.Array:
        return jax.random.wrap_key_data(
            self._place(list(map(jax.random.key_data, keys)))
        )


class InTurn:
    """Members updated one after the other by one program, which is faster on CPUs.

    On CPUs, convolutions whose kernels differ by member run as grouped convolutions, at
    a quarter of the speed. Members are distributed over the devices.
    """

    def __init__(
        self,
        update: Update,
        states: Sequence[State],
        numbers: Sequence[Numbers],
        keys: Sequence[jax.Array],
    ):
        """Places the members; the arguments are those of `AtOnce`."""
        devices = jax.devices()
        self._devices = [devices[i % len(devices)] for i in range(len(states))]
        members = zip(states, numbers, keys, strict=True)
        places = zip(members, self._devices, strict=True)
        self._members = [jax.device_put(member, device) for member, device in places]
        self._update = _compile(update)

    def step(self, batches: Sequence[Batch]) -> dict[str, list[Float[Array, ""]]]:
        """Updates every member with its batch, see `AtOnce.step`."""
        losses = []
        for i, batch in enumerate(batches):
            state, numbers, key = self._members[i]
            placed = jax.device_put(batch, self._devices[i])
            state, own = self._update(numbers, state, placed, key)
            self._members[i] = state, numbers, key
            losses.append(own)
        return {name: [own[name] for own in losses] for name in losses[0]}

    def state(self, i: int) -> State:
        """Returns the state of member i, see `AtOnce.state`."""
        return jax.device_put(self._members[i][0], jax.devices()[0])


BACKENDS = {"vmap": AtOnce, "loop": InTurn}


def choose_backend(name: str) -> type[AtOnce] | type[InTurn]:
    """Returns the backend of a name; "" is "vmap", or "loop" on CPUs."""
    return BACKENDS[name or ("loop" if jax.default_backend() == "cpu" else "vmap")]


class MemberTrainer(Trainer):
    """Trainer of a member; the steps of all members are taken by the wave.

    Each member counts its own steps: members may differ in the length of their epochs,
    and in the step at which they resumed. A member that has finished or diverged stays
    in the program, and its further results are ignored.
    """

    failure: str = ""  # why training ended early

    def begin(self) -> State:
        """Restores the last checkpoint; returns the state, in host memory."""
        self._resume()
        self._step = int(self._state.step)
        state, self._state = jax.device_get(self._state), None
        self._epoch_order = -1, np.empty(0, int)
        return state

    @property
    def is_done(self) -> bool:
        """True if the member has no more steps to take."""
        last = self._epochs * self._steps_per_epoch
        return bool(self.failure) or self._step >= last

    def next_batch(self) -> Batch:
        """Returns the batch of the next step, in host memory.

        If there is no next step, the batch is arbitrary.
        """
        epoch, i = divmod(self._step, self._steps_per_epoch)
        if epoch != self._epoch_order[0]:
            self._epoch_order = epoch, self._order(epoch)
        rows, count = self._rows(self._epoch_order[1], i)
        return sources.read(self._train, rows, count)

    @property
    def key(self) -> jax.Array:
        """Random key of the member's updates."""
        return self._key

    def advance(self) -> None:
        """Counts a step that was taken."""
        self._step += 1

    @property
    def is_at_end_of_epoch(self) -> bool:
        """True if the last counted step was the last one of an epoch."""
        return self._step % self._steps_per_epoch == 0

    def start_clock(self) -> None:
        """Starts to measure the time of an epoch."""
        self._started = time.perf_counter()

    def report(
        self,
        step: int,
        losses: Mapping[str, np.ndarray],
        get_state: Callable[[], State],
    ) -> None:
        """Adds the losses of a step; ends the epoch if it was the last one of it.

        Args:
            step: number of updates with that step.
            losses: losses by name.
            get_state: function that returns the member's state; it is called at the end
                of an epoch, to validate and save.
        """
        if self.failure:  # in the step before
            return
        try:
            self._count(step, losses)
            if step % self._steps_per_epoch == 0:
                now = time.perf_counter()
                seconds, self._started = now - self._started, now
                self._state = get_state()
                epoch = step // self._steps_per_epoch - 1
                self._end_epoch(epoch, seconds)
        except Diverged as error:
            self.failure = str(error)
            self._writer.say(self.failure)
        finally:
            self._state = None

    def save(self, state: State) -> None:
        """Saves the state within an epoch."""
        self._save(state)

    def finish(self) -> None:
        """Waits until all checkpoints are on disk."""
        self._store.wait()

    @property
    def step(self) -> int:
        """Number of updates so far."""
        return self._step


def train(members: Sequence[MemberTrainer], program: AtOnce | InTurn) -> None:
    """Trains a wave until its last member is done.

    Args:
        members: trainers of the members; at least one.
        program: program of these members, made with the states from
            `MemberTrainer.begin`.

    Raises:
        Interrupted: SIGTERM or SIGINT was received; every member is saved.
    """
    for member in members:
        member.start_clock()
    with stop_signals() as stop:
        batches, late = [member.next_batch() for member in members], []
        while not stop and not all(member.is_done for member in members):
            losses = program.step(batches)
            active = [(i, m) for i, m in enumerate(members) if not m.is_done]
            for _, member in active:
                member.advance()
            # Batches are read while the devices compute.
            batches = [member.next_batch() for member in members]
            late.append((losses, [(i, m, m.step) for i, m in active]))
            # Losses are fetched one step late, so that the devices do not wait, except
            # where an epoch ends: there a member needs the state of this step.
            ends = any(member.is_at_end_of_epoch for _, member in active)
            while len(late) > (0 if ends else 1):
                _report(program, *late.pop(0))
        for step in late:
            _report(program, *step)
        if stop:
            for i, member in enumerate(members):
                if not member.is_done:
                    member.save(program.state(i))
        for member in members:
            member.finish()
        if stop:
            raise Interrupted(stop[0], max(member.step for member in members))


def _report(
    program: AtOnce | InTurn,
    losses: Mapping[str, Any],
    taken: Sequence[tuple[int, MemberTrainer, int]],
) -> None:
    """Reports a step to the members, given as (index, member, updates with it)."""
    losses = jax.device_get(losses)  # of all members at once
    for i, member, step in taken:
        own = {name: value[i] for name, value in losses.items()}
        member.report(step, own, functools.partial(program.state, i))


@functools.lru_cache
def vectorize(update: Update, mesh: Mesh) -> Update:
    """Returns the jitted update of stacked members, split over a mesh.

    Args:
        update: function from `make_update`.
        mesh: mesh along the axis `MEMBER`.
    """
    spec = PartitionSpec(MEMBER)
    members = jax.shard_map(
        jax.vmap(update), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return jax.jit(members, donate_argnums=1)


@functools.lru_cache
def _compile(update: Update) -> Update:
    return jax.jit(update, donate_argnums=1)


@jax.jit
def _pick(states: State, i: int) -> State:
    return jax.tree.map(lambda leaf: leaf[i], states)
