"""Trains and evaluates every category of a run in a work directory."""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path

from ml_collections import ConfigDict

from ulsad_jax.methods import base as methods
from ulsad_jax.methods.ulsad.losses import find_changed
from ulsad_jax.metrics import base as metrics_base
from ulsad_jax.metrics.values import with_nan
from ulsad_jax.report import tables
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import data, fitting, results, run_files, saved, setup, testing
from ulsad_jax.runs import folder as files_of
from ulsad_jax.runs.category import CategoryRun
from ulsad_jax.runtime import compilation, files, hosts, lock
from ulsad_jax.runtime import devices as devices_lib
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import weights as trunk_weights
from ulsad_jax.trunks.weights import Trunk


@devices_lib.without_mesh()
def train(config: ConfigDict, workdir: Path) -> str:
    """Trains and evaluates every category of a config, or resumes doing so.

    Args:
        config: complete config.
        workdir: work directory; an earlier run of the same config is resumed.

    Returns:
        The table of results and the paths of the other files.

    Raises:
        UserError: config, data or folder are not valid, or another command is using the
            folder. Finished work is kept.
        errors.Interrupted: a signal was received; the state is saved.
    """
    config_lib.validate(config)
    methods.check_losses(config.method, find_changed(config.losses))
    config = config_lib.resolve(config)
    hosts.check_same(config_lib.describe(config), "config")
    devices = _find_devices(config)
    devices_lib.check_trainable(
        devices, config.train.batch_size, config.parallel.backend
    )
    compilation.draw_by_kernel()
    compilation.keep(config.dataset.cache_dir)
    with lock.hold(workdir):
        return _train(config, workdir)


def _train(config: ConfigDict, workdir: Path) -> str:
    """Runs `train` in a work directory whose lock is held."""
    made = setup.make(config)
    with hosts.first_alone("workdir"):
        check_workdir(config, workdir)
        if hosts.is_first() and (warning := setup.check(made, config)):
            print(warning)  # before anything is written
        categories = data.list_categories(config)
        trunk = _claim(config, workdir)
    for category in categories:
        files_of.category_folder(workdir, category).mkdir(exist_ok=True)
        run = _open(config, made, category, workdir, trunk)
        step = fitting.fit(run)
        if not testing.is_evaluated(run, step):
            testing.evaluate(run, step)
    return collect(config, workdir, categories, trunk)


@devices_lib.without_mesh()
def evaluate(
    workdir: Path,
    *,
    root: str = "",
    selection: str = "",
    image_threshold: float | None = None,
    pixel_threshold: float | None = None,
    write_maps: bool = False,
) -> str:
    """Evaluates the checkpoints of a run again.

    Args:
        workdir: folder that `train` wrote.
        root: new path of the data, if they moved; empty otherwise.
        selection: replaces `config.selection` unless empty.
        image_threshold: replaces the run's threshold on image scores, in every
            category.
        pixel_threshold: replaces the run's threshold on map values, in every category.
        write_maps: True to write maps even if the run's config does not ask for them.

    Returns:
        The table of results and the paths of the other files.

    Raises:
        UserError: there is no run or no checkpoint, the trunk differs, or another
            command is using the folder.
    """
    config = config_lib.load(workdir / files_of.CONFIG)
    if root:
        config.dataset.root = root
    if selection:
        config.selection = selection
        config_lib.validate(config)
    config.evaluation.write_maps |= write_maps
    config.parallel.devices = 0  # all devices of this machine
    compilation.keep(config.dataset.cache_dir)
    given = {"image_threshold": image_threshold, "pixel_threshold": pixel_threshold}
    with lock.hold(workdir):
        return _evaluate(config, workdir, given)


def _evaluate(
    config: ConfigDict, workdir: Path, thresholds: dict[str, float | None]
) -> str:
    """Runs `evaluate` in a work directory whose lock is held."""
    made = setup.make(config)
    with hosts.first_alone("workdir"):
        categories = data.list_categories(config)
    trunk = saved.load_trunk(config, workdir)
    _check_trained(categories, workdir)
    for category in categories:
        run = _open(config, made, category, workdir, trunk, needs_training=False)
        testing.evaluate(run, **thresholds)
    return collect(config, workdir, categories, trunk)


def _open(
    config: ConfigDict,
    made: setup.Setup,
    category: str,
    workdir: Path,
    trunk: Trunk | None,
    *,
    needs_training: bool = True,
) -> CategoryRun:
    """Opens a category's images."""
    with hosts.first_alone("data"):
        images = data.open_data(config, category, needs_training=needs_training)
    return CategoryRun(
        config=config,
        setup=made,
        name=category,
        data=images,
        folder=files_of.category_folder(workdir, category),
        trunk=trunk,
        devices=_find_devices(config),
        title=category,
    )


def _find_devices(config: ConfigDict) -> devices_lib.Devices:
    """Returns the devices that a config asks for."""
    parallel = config.parallel
    return devices_lib.find_devices(parallel.devices, shards_state=parallel.shard_state)


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Checks that a run with this config can use a work directory.

    Raises:
        UserError: it holds other files, or checkpoints of another config.
    """
    path = workdir / files_of.CONFIG
    if path.exists():
        if _has_checkpoints(workdir):
            config_lib.check_resumable(config_lib.load(path), config, workdir)
    elif found := files.find_content(workdir):
        raise UserError(
            "Expected an empty or new folder, or that of an earlier run, found "
            f"{found}. Give another --workdir."
        )


def _claim(config: ConfigDict, workdir: Path) -> Trunk | None:
    """Writes config and trunk to the work directory; returns the trunk."""
    path = workdir / files_of.TRUNK
    if not hosts.is_first():
        return saved.load_trunk(config, workdir)
    kept = path.exists() and _has_checkpoints(workdir)
    trunk = saved.load_trunk(config, workdir) if kept else setup.load_trunk(config)
    workdir.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, workdir / files_of.CONFIG)
    if trunk is not None and not kept:
        trunk_weights.save_trunk(trunk, path)
    return trunk


def _has_checkpoints(workdir: Path) -> bool:
    """Returns whether any category has a checkpoint."""
    return any(workdir.glob(f"*/{files_of.CHECKPOINTS}/*"))


def _check_trained(categories: list[str], workdir: Path) -> None:
    """Rejects categories without a folder of checkpoints."""
    for category in categories:
        folder = workdir / files_of.folder_name(category) / files_of.CHECKPOINTS
        if not folder.is_dir():
            trained = sorted(
                p.parent.name for p in workdir.glob(f"*/{files_of.CHECKPOINTS}")
            )
            raise UserError(
                f"Expected checkpoints of category {category!r} in {folder}, found "
                f"those of {', '.join(trained) or 'none'}. Run the train.py command "
                "again; or, if your own folder or table has another name now, give "
                "it the name it had."
            )


def collect(
    config: ConfigDict, workdir: Path, categories: list[str], trunk: Trunk | None
) -> str:
    """Joins the categories' results and returns a text to print."""
    if not hosts.is_first():
        return "Results are reported by process 0."
    rows, decisions = {}, {}
    for name in categories:
        path = files_of.category_folder(workdir, name) / files_of.RESULTS
        document = json.loads(path.read_text())
        metrics, decisions[name] = document["metrics"], document["decisions"]
        rows[name] = with_nan(metrics)
    about = {
        "selection": config.selection,
        "selected_on_test": config.selection == config_lib.BEST_TEST_AUROC,
        "calibration": config.calibration,
        "decisions": decisions,
        "method": config.method,
        "columns": metrics_base.columns(metrics_base.find(config.evaluation.metrics)),
        "trunk": trunk and dataclasses.asdict(trunk.identity),
        "image_size": list(config.image_size),
        "versions": {
            name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")
        },
    }
    results.write(workdir, rows, about)
    run_files.write_report(workdir)
    lines = [tables.table(rows, about)]
    if trunk and trunk.identity.source.startswith("random"):
        lines.append(
            "The trunk has random weights, whose features detect little: expect "
            "poor numbers until you use a trained one (docs/trunks.md)."
        )
    names = files_of.RESULTS, files_of.TABLE, files_of.REPORT, files_of.MAPS
    document, table, report, maps = (workdir / name for name in names)
    lines.append(f"Results: {document}, {table}")
    lines.append(f"Report: {report}")
    lines.append(f"Pictures: {workdir}/<category>/{files_of.PICTURES}/<type>/*.png")
    if config.evaluation.write_maps:
        lines.append(f"Maps: {maps}/<category>/test/<type>/*.tiff")
    return "\n".join(lines)
