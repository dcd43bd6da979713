"""Trains and evaluates the members of a sweep in a work directory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from tqdm import tqdm

from ulsad_jax.data.batches import Category
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import data, fitting, setup, testing
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs import run as run_lib
from ulsad_jax.runs.category import CategoryRun
from ulsad_jax.runtime import compilation, files, lock
from ulsad_jax.runtime.devices import find_devices, without_mesh
from ulsad_jax.runtime.errors import Diverged, UserError
from ulsad_jax.sweep import costs, fusions, grid, memory, summary, wave
from ulsad_jax.sweep.shared import Source
from ulsad_jax.trunks import features, sources
from ulsad_jax.trunks.weights import Trunk, save_trunk

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Job:
    """A member with everything that its training needs, except features.

    Attributes:
        member: member to train.
        folder: work directory of the member.
        run: category of the member.
    """

    member: grid.Member
    folder: Path
    run: CategoryRun

    @property
    def source(self) -> tuple[Hashable, int]:
        """Key that identifies the member's features, and their size in bytes."""
        run = self.run
        setup, data = run.setup, run.data
        count = len(data.train) + len(data.validation)
        trunk = run.trunk and run.trunk.identity.sha256
        return (
            (run.name, data.fingerprint, setup.input_size, trunk, setup.pyramid),
            sources.count_bytes(count, setup.image_size, setup.features),
        )


@without_mesh()
def train(config: ConfigDict, workdir: Path) -> str:
    """Trains and evaluates every member of a sweep, or resumes doing so.

    Args:
        config: config with a field `sweep`, see configs/sweep.py.
        workdir: work directory; an earlier sweep of all or some of these members is
            resumed.

    Returns:
        The table of results and the paths of the other files.

    Raises:
        UserError: the sweep is not valid (see `grid.list_members` and `run.train`), or
            no member could be trained.
        errors.Interrupted: a signal was received; the state is saved.
    """
    config_lib.validate(config)
    if jax.process_count() > 1:
        raise UserError(
            "Expected one process, in which a sweep places its members over all "
            f"devices, found {jax.process_count()}. Start it without --distributed and "
            "--coordinator."
        )
    config.parallel.devices = 1  # per member: members, not batches, are split
    compilation.draw_by_kernel()
    compilation.keep(config.dataset.cache_dir)
    with lock.hold(workdir):
        return _train(config, workdir)


def _train(config: ConfigDict, workdir: Path) -> str:
    """Runs `train` in a work directory whose lock is held."""
    members = grid.list_members(config, data.list_categories(config))
    _check_workdir(workdir)
    traced = grid.traced_fields(members)
    kinds: dict[Hashable, grid.Member] = {}
    for member in members:
        made = setup.make(member.config)
        kind = grid.program(member, traced), str(made.features)
        if kind in kinds:
            continue
        kinds[kind] = member
        if warning := setup.check(made, member.config):  # before anything is written
            print(f"{member.name}: {warning}")
    (workdir / files_of.MEMBERS).mkdir(parents=True, exist_ok=True)
    files.replace(workdir / files_of.SWEEP, config.to_json_best_effort(indent=2) + "\n")
    jobs = _open(members, workdir)
    programs: dict[Hashable, list[Job]] = {}
    for job in jobs:
        program = grid.program(job.member, traced), str(job.run.setup.features)
        programs.setdefault(program, []).append(job)
    for same in programs.values():
        if config.sweep.costs:
            _train_alone(same)
            continue
        budget = memory.find_budget(config.sweep)
        _train_program(same, traced, budget, config.sweep.backend)
    for job in jobs:
        _evaluate(job, config.sweep)
    entries = [_entry(job) for job in jobs]
    told = summary.write(workdir, entries, traced)
    if all(entry.failure for entry in entries):
        raise UserError(
            f"Expected a member that could be trained, found none:\n{told}\nCorrect "
            "the values in config.sweep, and give another --workdir."
        )
    return told


def _check_workdir(workdir: Path) -> None:
    """Rejects a folder with other content than a sweep."""
    if workdir.is_dir() and (workdir / files_of.SWEEP).exists():
        return
    if found := files.find_content(workdir):
        raise UserError(
            "Expected an empty or new folder, or that of an earlier sweep, found "
            f"{found}. Give another --workdir."
        )


def _open(members: Sequence[grid.Member], workdir: Path) -> list[Job]:
    """Makes the members' folders, after checking that all members can be resumed."""
    folders = [workdir / files_of.MEMBERS / member.name for member in members]
    for member, folder in zip(members, folders, strict=True):
        run_lib.check_workdir(member.config, folder)
    trunks: dict[str, Trunk | None] = {}
    images: dict[Hashable, Category] = {}
    jobs = []
    for member, folder in zip(members, folders, strict=True):
        config, category = member.config, member.category
        key = str(setup.trunk_fields(config))
        if key not in trunks:
            trunks[key] = setup.load_trunk(config)
        trunk = trunks[key]
        sizes = tuple(config.image_size), config_lib.input_size(config)
        key = str(config.dataset), sizes, config.seed
        if key not in images:
            images[key] = data.open_data(config, category)
        folder.mkdir(exist_ok=True)
        config_lib.save(config, folder / files_of.CONFIG)
        if trunk is not None:
            _link_trunk(trunk, folder / files_of.TRUNK, workdir / files_of.TRUNKS)
        run = CategoryRun(
            config=config,
            setup=setup.make(config),
            name=category,
            data=images[key],
            folder=files_of.category_folder(folder, category),
            trunk=trunk,
            devices=find_devices(config.parallel.devices),
            title=member.name,
        )
        run.folder.mkdir(exist_ok=True)
        jobs.append(Job(member, folder, run))
    return jobs


def _link_trunk(trunk: Trunk, path: Path, store: Path) -> None:
    """Links or copies a trunk, which is stored once per sweep, to a member's folder."""
    if path.exists():
        return
    store.mkdir(exist_ok=True)
    shared = store / f"{trunk.identity.sha256}.safetensors"
    if not shared.exists():
        save_trunk(trunk, shared)
    try:
        os.link(shared, path)
    except OSError:
        shutil.copyfile(shared, path)


def _train_alone(jobs: Sequence[Job]) -> None:
    """Trains the unfinished members one by one, so that their times are their own."""
    for job in jobs:
        if _is_over(job):
            continue
        with lock.hold(job.folder):
            try:
                fitting.fit(job.run)
            except Diverged as error:
                files.replace(job.folder / files_of.DIVERGED, f"{error}\n")


def _estimate_bytes(jobs: Sequence[Job]) -> int:
    """Estimates the device memory of the largest member of a program.

    Members of one program may differ in size: students of reverse distillation have the
    blocks of their trunk.
    """
    batch_size = jobs[0].member.config.train.batch_size
    count = max(len(job.run.data.train) for job in jobs)
    setups = {job.run.setup for job in jobs}
    return max(s.method.estimate_bytes(s.spec(batch_size, count)) for s in setups)


def _train_program(
    jobs: Sequence[Job], traced: Sequence[str], budget: memory.Budget, backend: str
) -> None:
    """Trains the unfinished members of one program, in waves."""
    left = [job for job in jobs if not _is_over(job)]
    if not left:
        return
    # Group members of equal length, and those that share features.
    left.sort(key=lambda job: (fitting.count_steps(job.run), str(job.source)))
    made = left[0].run.setup
    size = _estimate_bytes(left)
    waves = memory.cut_waves(
        left,
        item_bytes=size,
        source=lambda job: job.source,
        devices=jax.device_count(),
        budget=budget,
    )
    tqdm.write(
        f"{len(left)} members in {len(waves)} wave{'s' * (len(waves) > 1)} of up to "
        f"{len(waves[0])}: {size / memory.GIB:.2f} GiB each by estimate, "
        f"{budget.device / memory.GIB:.2f} GiB allowed on each of "
        f"{jax.device_count()} device(s)"
        f"{', one member at least' * (size > budget.device)}"
    )
    update = wave.make_update(made.method)
    make_program = functools.partial(wave.choose_backend(backend), update)
    shared: dict[Hashable, Source] = {}
    for jobs_of_wave in waves:
        needed = {job.source[0]: job for job in jobs_of_wave}
        shared = {key: shared[key] for key in shared if key in needed}
        for key, job in needed.items():
            if key not in shared:
                shared[key] = _extract(job.run)
        _train_wave(jobs_of_wave, traced, make_program, shared)


def _extract(run: CategoryRun) -> Source:
    """Runs the trunk over the images that members share."""
    pyramid, variables = run.setup.pyramid, run.trunk_variables
    count = len(run.data.train) + len(run.data.validation)
    return Source(
        run.data,
        pyramid and features.make_extractor(pyramid, variables),
        batch_size=min(run.config.evaluation.batch_size, count),
        title=f"[{run.name}] features",
    )


def _train_wave(
    jobs: Sequence[Job],
    traced: Sequence[str],
    make_program: Callable[..., wave.AtOnce | wave.InTurn],
    shared: Mapping[Hashable, Source],
) -> None:
    members, states = [], {}
    numbers = [wave.take_numbers(job.member.config, traced) for job in jobs]
    with contextlib.ExitStack() as stack:
        for i, (job, own) in enumerate(zip(jobs, numbers, strict=True)):
            stack.enter_context(lock.hold(job.folder))  # against a concurrent eval.py
            writer, store = stack.enter_context(fitting.open_files(job.run))
            normals = shared[job.source[0]].part(
                job.run.data, whiten=job.run.setup.whiten
            )
            member = fitting.make_trainer(
                job.run, wave.MemberTrainer, normals, store, writer, own
            )
            members.append(member)
            states[i] = member.begin()
        same: dict[str, list[int]] = {}  # those that `vmap` can stack
        for i in range(len(jobs)):
            shapes = jax.tree.map(np.shape, states[i])
            same.setdefault(str(shapes), []).append(i)
        for rows in same.values():
            own = [members[i] for i in rows]
            program = make_program(
                [states.pop(i) for i in rows],  # which frees their memory
                [numbers[i] for i in rows],
                [member.key for member in own],
            )
            wave.train(own, program)
    for job, member in zip(jobs, members, strict=True):
        if member.failure:
            files.replace(job.folder / files_of.DIVERGED, member.failure + "\n")


def _is_over(job: Job) -> bool:
    """Returns whether a member is trained or has diverged."""
    return (job.folder / files_of.DIVERGED).exists() or _trained_step(job) is not None


def _trained_step(job: Job) -> int | None:
    """Returns the step to evaluate, or None if training is not complete."""
    run = job.run
    if not (run.folder / files_of.CHECKPOINTS).is_dir():
        return None
    with files_of.open_store(run.config, run.folder, read_only=True) as store:
        if fitting.is_trained(run, store):
            return files_of.select(run.config, store)
    return None


def _evaluate(job: Job, sweep: ConfigDict) -> None:
    """Evaluates a trained member, unless its folder already has the results."""
    step = _trained_step(job)
    if (job.folder / files_of.DIVERGED).exists() or step is None:
        return
    with lock.hold(job.folder):
        run = job.run
        evaluated = testing.is_evaluated(run, step)
        if not evaluated:
            testing.evaluate(run, step)
        if not evaluated or not (job.folder / files_of.RESULTS).exists():
            run_lib.collect(run.config, job.folder, [run.name], run.trunk)
        if sweep.fusions:
            fusions.write(run, step, again=not evaluated)
        if sweep.costs:
            costs.write(run, step, again=not evaluated)


def _entry(job: Job) -> summary.Entry:
    diverged = job.folder / files_of.DIVERGED
    return summary.read_entry(
        job.member,
        job.folder,
        failure=diverged.read_text().strip() if diverged.exists() else "",
    )
