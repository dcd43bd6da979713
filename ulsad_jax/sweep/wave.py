"""A wave: members that are trained at once, as one program over all devices."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ulsad_jax.methods.ulsad.networks import Ulsad
from ulsad_jax.runs import training
from ulsad_jax.runs.loop import Trainer, stop_signals
from ulsad_jax.runtime.errors import Diverged, Interrupted

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8
    from ml_collections import ConfigDict

MEMBER = "member"  # the mesh's axis, along which members are split
Numbers = dict[str, dict[str, Any]]
Batch = tuple[np.ndarray, np.ndarray]  # features, images
Update = Callable[..., tuple[training.TrainState, dict[str, Any]]]


def take_numbers(config: ConfigDict, traced: Sequence[str]) -> Numbers:
    """A member's own values of the fields that `grid.traced_fields` names.

    Returns:
        {"optimizer": {name: number}, "losses": {entry: {name: number}}}.
    """
    numbers: Numbers = {"optimizer": {}, "losses": {}}
    for field in traced:
        group, *entry, name = field.split(".")
        fields, taken = config[group], numbers[group]
        if entry:
            fields, taken = fields[entry[0]], taken.setdefault(entry[0], {})
        taken[name] = np.float32(fields[name])
    return numbers


def make_update(
    model: Ulsad, loss_fn: Callable, optimizer: Mapping[str, float]
) -> Update:
    """`training.make_update` with numbers as arguments: `update(numbers, state, ...)`.

    Args:
        model: the networks.
        loss_fn: see `losses.make_loss_fn`.
        optimizer: what `training.make_optimizer` takes, where members do not differ.
    """

    def update(
        numbers: Numbers,
        state: training.TrainState,
        features: Float[Array, "b h/8 w/8 c"],
        image: UInt8[Array, "b h w 3"],
    ) -> tuple[training.TrainState, dict[str, Float[Array, ""]]]:
        own = training.make_update(
            model,
            functools.partial(loss_fn, numbers=numbers["losses"]),
            training.make_optimizer(**{**optimizer, **numbers["optimizer"]}),
        )
        return own(state, features, image)

    return update


class AtOnce:
    """Members as one array with an axis of members: `vmap`, split over all devices.

    Members share nothing: each device updates its own, without a word to the others.
    """

    def __init__(
        self,
        update: Update,
        states: Sequence[training.TrainState],
        numbers: Sequence[Numbers],
    ):
        """Places the members; where they do not fill the devices, the first repeats.

        Args:
            update: see `make_update`.
            states: of each member, in host memory.
            numbers: of each member.
        """
        self._mesh = Mesh(np.array(jax.devices()[: len(states)]), (MEMBER,))
        self._filling = -len(states) % self._mesh.size
        self._states, self._numbers = self._place(states), self._place(numbers)
        self._update = _vectorize(update, self._mesh)

    def step(self, batches: Sequence[Batch]) -> dict[str, Float[Array, " m"]]:
        """Updates every member with its batch; returns the losses before."""
        self._states, losses = self._update(
            self._numbers, self._states, *self._place(batches)
        )
        return losses

    def state(self, i: int) -> training.TrainState:
        """Of a member, on the first device."""
        return jax.device_put(_pick(self._states, i), jax.devices()[0])

    def _place(self, trees: Sequence[Any]) -> Any:
        trees = [*trees, *[trees[0]] * self._filling]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
        sharding = NamedSharding(self._mesh, PartitionSpec(MEMBER))
        return jax.device_put(stacked, sharding)


class InTurn:
    """Members one after the other, through one program: faster on CPUs.

    There, convolutions whose kernels differ by member are run as grouped ones, at a
    quarter of the speed. Members take turns on the devices.
    """

    def __init__(
        self,
        update: Update,
        states: Sequence[training.TrainState],
        numbers: Sequence[Numbers],
    ):
        """Places the members; arguments are those of `AtOnce`."""
        devices = jax.devices()
        self._devices = [devices[i % len(devices)] for i in range(len(states))]
        pairs = zip(states, numbers, strict=True)
        places = zip(pairs, self._devices, strict=True)
        self._members = [jax.device_put(pair, device) for pair, device in places]
        self._update = _compile(update)

    def step(self, batches: Sequence[Batch]) -> dict[str, Float[np.ndarray, " m"]]:
        """See `AtOnce.step`."""
        losses = []
        for i, batch in enumerate(batches):
            state, numbers = self._members[i]
            state, own = self._update(
                numbers, state, *jax.device_put(batch, self._devices[i])
            )
            self._members[i] = state, numbers
            losses.append(own)
        losses = jax.device_get(losses)
        return {name: np.stack([own[name] for own in losses]) for name in losses[0]}

    def state(self, i: int) -> training.TrainState:
        """See `AtOnce.state`."""
        return jax.device_put(self._members[i][0], jax.devices()[0])


BACKENDS = {"vmap": AtOnce, "loop": InTurn}


def choose_backend(name: str) -> type[AtOnce] | type[InTurn]:
    """The one of a name; without a name "vmap", but on CPUs "loop"."""
    return BACKENDS[name or ("loop" if jax.default_backend() == "cpu" else "vmap")]


class MemberTrainer(Trainer):
    """The trainer of a member: steps are taken outside, for all members at once.

    Members count their steps themselves: each has its own epochs, and may have been
    resumed at another step than the others. One that has finished, or diverged, stays
    in the program, and what becomes of it there is not looked at.
    """

    failure: str = ""  # why training ended early

    def begin(self) -> training.TrainState:
        """Resumes; returns the state to go on from, in host memory."""
        self._resume()
        self._step = int(self._state.step)
        state, self._state = jax.device_get(self._state), None
        self._started = time.perf_counter()
        self._epoch_order = -1, np.empty(0, int)
        return state

    @property
    def is_done(self) -> bool:
        """Whether there are no more steps to take."""
        last = self._config.train.num_epochs * self._steps_per_epoch
        return bool(self.failure) or self._step >= last

    def next_batch(self) -> Batch:
        """Features and images of the next step; of any, if there is none."""
        epoch, i = divmod(self._step, self._steps_per_epoch)
        if epoch != self._epoch_order[0]:
            self._epoch_order = epoch, self._order(epoch)
        batch = self._config.train.batch_size
        return self._train.batch(self._epoch_order[1][i * batch : (i + 1) * batch])

    def advance(self) -> None:
        """Counts a step that was taken."""
        self._step += 1

    def report(
        self,
        losses: Mapping[str, np.ndarray],
        get_state: Callable[[], training.TrainState],
    ) -> None:
        """Takes the losses of the step that was just counted.

        At the end of an epoch it asks for the state, to validate and save as any run.
        """
        try:
            self._count(self._step, losses)
            if self._step % self._steps_per_epoch == 0:
                now = time.perf_counter()
                seconds, self._started = now - self._started, now
                self._state = get_state()
                epoch = self._step // self._steps_per_epoch - 1
                self._end_epoch(epoch, seconds)
        except Diverged as error:
            self.failure = str(error)
            self._writer.say(self.failure)
        finally:
            self._state = None

    def save(self, state: training.TrainState) -> None:
        """Saves within an epoch."""
        self._state = state
        self._save()
        self._state = None

    def finish(self) -> None:
        """Returns when everything is on disk."""
        self._store.wait()

    @property
    def step(self) -> int:
        """Updates so far."""
        return self._step


def train(members: Sequence[MemberTrainer], program: AtOnce | InTurn) -> None:
    """Trains a wave to the end of its last member.

    Args:
        members: at least one.
        program: of these members, from the states that `MemberTrainer.begin` gives.

    Raises:
        Interrupted: by SIGTERM or SIGINT, after saving every member.
    """
    with stop_signals() as stop:
        batches = [member.next_batch() for member in members]
        while not stop and not all(member.is_done for member in members):
            losses = program.step(batches)
            active = [(i, m) for i, m in enumerate(members) if not m.is_done]
            for _, member in active:
                member.advance()
            # While the devices compute.
            batches = [member.next_batch() for member in members]
            losses = jax.device_get(losses)
            for i, member in active:
                own = {name: value[i] for name, value in losses.items()}
                member.report(own, functools.partial(program.state, i))
        if stop:
            for i, member in enumerate(members):
                if not member.is_done:
                    member.save(program.state(i))
        for member in members:
            member.finish()
        if stop:
            raise Interrupted(stop[0], max(member.step for member in members))


@functools.lru_cache
def _vectorize(update: Update, mesh: Mesh) -> Update:
    spec = PartitionSpec(MEMBER)
    members = jax.shard_map(
        jax.vmap(update), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return jax.jit(members, donate_argnums=1)


@functools.lru_cache
def _compile(update: Update) -> Update:
    return jax.jit(update, donate_argnums=1)


@jax.jit
def _pick(states: training.TrainState, i: int) -> training.TrainState:
    return jax.tree.map(lambda leaf: leaf[i], states)
