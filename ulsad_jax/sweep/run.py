"""A sweep: its folder, its members, their waves, their table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from tqdm import tqdm

from ulsad_jax.data.batches import Category
from ulsad_jax.methods.ulsad import loss_check
from ulsad_jax.methods.ulsad.losses import make_loss_fn
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import results, trained, training
from ulsad_jax.runs import run as experiment
from ulsad_jax.runs.category import CategoryRun
from ulsad_jax.runtime import compilation, files, lock
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.sweep import fusions, grid, memory, summary, wave
from ulsad_jax.sweep.shared import Source
from ulsad_jax.trunks import features
from ulsad_jax.trunks import weights as pretrained

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SWEEP, MEMBERS, TRUNKS = "sweep.json", "members", "trunks"
DIVERGED = "diverged.txt"  # in a member's folder: why, instead of results


@dataclasses.dataclass(frozen=True)
class Job:
    """A member, with everything that its training needs but features.

    Attributes:
        member: what to train.
        folder: a run's work directory of its own.
        data: its images.
        trunk: frozen.
        run: of its category.
    """

    member: grid.Member
    folder: Path
    data: Category
    trunk: pretrained.Trunk
    run: CategoryRun

    @property
    def category_folder(self) -> Path:
        """Inside `folder`."""
        return self.folder / results.folder_name(self.member.category)

    @property
    def source(self) -> tuple[Hashable, int]:
        """What tells its features from other members', and how many bytes they take."""
        config = self.member.config
        count = len(self.data.train) + len(self.data.validation)
        size = tuple(config.image_size)
        trunk = self.trunk.identity.sha256, training.make_pyramid(config)
        return (
            (self.member.category, self.data.fingerprint, size, *trunk),
            features.count_bytes(count, size),
        )


def train(config: ConfigDict, workdir: Path) -> str:
    """Trains and evaluates every member of a sweep, or goes on doing so.

    Args:
        config: with `sweep`, see configs/sweep.py.
        workdir: where everything goes; an earlier sweep of the same members, or of some
            of them, is resumed.

    Returns:
        The table, and where to find the rest.

    Raises:
        UserError: see `grid.list_members`, and `experiment.train`; no member could be
            trained.
        errors.Interrupted: by a signal, after saving.
    """
    config_lib.validate(config)
    if jax.process_count() > 1:
        raise UserError(
            "Expected one process, in which a sweep places its members over all "
            f"devices, found {jax.process_count()}. Start it without --distributed and "
            "--coordinator."
        )
    config.parallel.devices = 1  # of a member; members are what is split
    compilation.draw_by_kernel()
    compilation.keep(config.dataset.cache_dir)
    with lock.hold(workdir):
        return _train(config, workdir)


def _train(config: ConfigDict, workdir: Path) -> str:
    """Does what `train` does in a work directory that is its own."""
    members = grid.list_members(config, experiment.list_categories(config))
    _check_workdir(workdir)
    traced = grid.traced_fields(members)
    kinds = {grid.program(member, traced): member for member in members}
    for member in kinds.values():
        if warning := loss_check.check(member.config):  # before anything is written
            print(f"{member.name}: {warning}")
    (workdir / MEMBERS).mkdir(parents=True, exist_ok=True)
    files.replace(workdir / SWEEP, config.to_json_best_effort(indent=2) + "\n")
    jobs = _open(members, workdir)
    programs: dict[Hashable, list[Job]] = {}
    for job in jobs:
        programs.setdefault(grid.program(job.member, traced), []).append(job)
    for same in programs.values():
        budget = memory.find_budget(config.sweep)
        _train_program(same, traced, budget, config.sweep.backend)
    for job in jobs:
        _evaluate(job, with_fusions=config.sweep.fusions)
    entries = [_entry(job) for job in jobs]
    told = summary.write(workdir, entries, traced)
    if all(entry.failure for entry in entries):
        raise UserError(
            f"Expected a member that could be trained, found none:\n{told}\nCorrect "
            "the values in config.sweep, and give another --workdir."
        )
    return told


def _check_workdir(workdir: Path) -> None:
    """Refuses a folder that holds anything but a sweep."""
    if workdir.is_dir() and (workdir / SWEEP).exists():
        return
    if found := files.find_content(workdir):
        raise UserError(
            "Expected an empty or new folder, or that of an earlier sweep, found "
            f"{found}. Give another --workdir."
        )


def _open(members: Sequence[grid.Member], workdir: Path) -> list[Job]:
    """Makes the members' folders, after looking that all can be gone on with."""
    folders = [workdir / MEMBERS / member.name for member in members]
    for member, folder in zip(members, folders, strict=True):
        experiment.check_workdir(member.config, folder)
    trunks: dict[Any, pretrained.Trunk] = {}
    data: dict[Any, Category] = {}
    jobs = []
    for member, folder in zip(members, folders, strict=True):
        config, category = member.config, member.category
        key = str(experiment.trunk_fields(config))
        if key not in trunks:
            trunks[key] = experiment.load_trunk(config)
        trunk = trunks[key]
        key = str(config.dataset), str(config.image_size), config.seed
        if key not in data:
            data[key] = experiment.open_data(config, category)
        folder.mkdir(exist_ok=True)
        config_lib.save(config, folder / trained.CONFIG)
        _link_trunk(trunk, folder / trained.TRUNK, workdir / TRUNKS)
        run = CategoryRun(
            config,
            category,
            data=data[key],
            folder=folder / results.folder_name(category),
            trunk=trunk,
            title=member.name,
        )
        jobs.append(Job(member, folder, data[key], trunk, run))
        jobs[-1].category_folder.mkdir(exist_ok=True)
    return jobs


def _link_trunk(trunk: pretrained.Trunk, path: Path, store: Path) -> None:
    """Gives a member its trunk, which is on disk once where links can be made."""
    if path.exists():
        return
    store.mkdir(exist_ok=True)
    shared = store / f"{trunk.identity.sha256}.safetensors"
    if not shared.exists():
        pretrained.save_trunk(trunk, shared)
    try:
        os.link(shared, path)
    except OSError:
        shutil.copyfile(shared, path)


def _train_program(
    jobs: Sequence[Job], traced: Sequence[str], budget: memory.Budget, backend: str
) -> None:
    """Trains what is left of the members that one program trains, in waves."""
    left = [job for job in jobs if not _is_over(job)]
    if not left:
        return
    # Members that end together go together, and those that share features.
    left.sort(key=lambda job: (job.run.steps, str(job.source)))
    config = left[0].member.config
    size = memory.estimate_member(config)
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
    model, loss_fn = training.make_model(config), make_loss_fn(config.losses)
    update = wave.make_update(model, loss_fn, config.optimizer.to_dict())
    make_program = functools.partial(wave.choose_backend(backend), update)
    sources: dict[Hashable, Source] = {}
    for jobs_of_wave in waves:
        needed = {job.source[0]: job for job in jobs_of_wave}
        sources = {key: sources[key] for key in sources if key in needed}
        for key, job in needed.items():
            if key not in sources:
                title = f"[{job.member.category}] features"
                sources[key] = Source(job.member.config, job.data, job.trunk, title)
        _train_wave(jobs_of_wave, traced, loss_fn, make_program, sources)


def _train_wave(
    jobs: Sequence[Job],
    traced: Sequence[str],
    loss_fn: Any,
    make_program: Callable[..., wave.AtOnce | wave.InTurn],
    sources: Mapping[Hashable, Source],
) -> None:
    members, states = [], []
    numbers = [wave.take_numbers(job.member.config, traced) for job in jobs]
    with contextlib.ExitStack() as stack:
        for job, own in zip(jobs, numbers, strict=True):
            stack.enter_context(lock.hold(job.folder))  # eval.py may be at work
            writer, store = stack.enter_context(job.run.open())
            normals = sources[job.source[0]].part(
                job.data, whiten=config_lib.whitens(job.member.config)
            )
            member = job.run.make_trainer(
                wave.MemberTrainer, normals, loss_fn, store, writer, own["losses"]
            )
            members.append(member)
            states.append(member.begin())
        program = make_program(states, numbers)
        del states
        wave.train(members, program)
    for job, member in zip(jobs, members, strict=True):
        if member.failure:
            files.replace(job.folder / DIVERGED, member.failure + "\n")


def _is_over(job: Job) -> bool:
    """Whether a member is trained, or has diverged."""
    return (job.folder / DIVERGED).exists() or _trained_step(job) is not None


def _trained_step(job: Job) -> int | None:
    """The step to evaluate, if training has come to its end."""
    if not (job.category_folder / trained.CHECKPOINTS).is_dir():
        return None
    config = job.member.config
    with trained.open_store(config, job.category_folder, read_only=True) as store:
        if job.run.is_trained(store):
            return trained.select(config, store)
    return None


def _evaluate(job: Job, *, with_fusions: bool) -> None:
    """Makes a member's folder that of a finished run, if it is not yet."""
    step = _trained_step(job)
    if (job.folder / DIVERGED).exists() or step is None:
        return
    with lock.hold(job.folder):
        evaluated = job.run.is_evaluated(step)
        if not evaluated:
            job.run.evaluate(step)
        if not evaluated or not (job.folder / experiment.RESULTS).exists():
            category = job.member.category
            experiment.collect(job.member.config, job.folder, [category], job.trunk)
        if with_fusions:
            fusions.write(job.run, job.category_folder, step, again=not evaluated)


def _entry(job: Job) -> summary.Entry:
    diverged = job.folder / DIVERGED
    return summary.read_entry(
        job.member,
        job.folder,
        failure=diverged.read_text().strip() if diverged.exists() else "",
    )
