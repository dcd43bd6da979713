"""A run: a work directory, its categories, training and evaluation of each."""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ulsad_jax.data.batches import Category, open_category
from ulsad_jax.data.layouts import select_categories
from ulsad_jax.data.synthetic import categories as synthetic
from ulsad_jax.methods.ulsad import loss_check
from ulsad_jax.report import page
from ulsad_jax.runs import config as config_lib
from ulsad_jax.runs import results
from ulsad_jax.runs.category import MAPS, RESULTS, CategoryRun
from ulsad_jax.runs.trained import CHECKPOINTS, CONFIG, TRUNK
from ulsad_jax.runtime import compilation, files, hosts, lock
from ulsad_jax.runtime import devices as parallel
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import weights as pretrained


def train(config: ConfigDict, workdir: Path) -> str:
    """Trains and evaluates every category of a config, or goes on doing so.

    Args:
        config: of all fields.
        workdir: where everything goes; an earlier run of the same config is resumed.

    Returns:
        The table of results and where to find the rest.

    Raises:
        UserError: see README; what is finished by then stays. Another command is at
            work in the folder.
        errors.Interrupted: by a signal, after saving.
    """
    config_lib.validate(config)
    config = config_lib.resolve(config)
    hosts.check_same(config_lib.describe(config), "config")
    devices = parallel.find_devices(config.parallel.devices)
    parallel.check_trainable(devices, config.train.batch_size, config.parallel.backend)
    compilation.draw_by_kernel()
    compilation.keep(config.dataset.cache_dir)
    with lock.hold(workdir):
        return _train(config, workdir)


def _train(config: ConfigDict, workdir: Path) -> str:
    """Does what `train` does in a work directory that is its own."""
    with hosts.first_alone("workdir"):
        check_workdir(config, workdir)
        if hosts.is_first() and (warning := loss_check.check(config)):
            print(warning)  # before anything is written
        categories = list_categories(config)
        trunk = _claim(config, workdir)
    for category in categories:
        folder = workdir / results.folder_name(category)
        folder.mkdir(exist_ok=True)
        with hosts.first_alone("data"):
            data = open_data(config, category)
        run = CategoryRun(config, category, data=data, folder=folder, trunk=trunk)
        step = run.fit()
        if not run.is_evaluated(step):
            run.evaluate(step)
    return collect(config, workdir, categories, trunk)


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
        workdir: that `train` wrote.
        root: of the data, if it moved.
        selection: another `config.selection` than the run's.
        image_threshold: instead of the run's, in every category.
        pixel_threshold: instead of the run's, in every category.
        write_maps: also writes maps, if the run's config does not say so.

    Returns:
        The table of results and where to find the rest.

    Raises:
        UserError: no run, no checkpoint, another trunk, another command at work.
    """
    config = config_lib.load(workdir / CONFIG)
    if root:
        config.dataset.root = root
    if selection:
        config.selection = selection
        config_lib.validate(config)
    config.evaluation.write_maps |= write_maps
    config.parallel.devices = 0  # those of this machine
    compilation.keep(config.dataset.cache_dir)
    given = {"image_threshold": image_threshold, "pixel_threshold": pixel_threshold}
    with lock.hold(workdir):
        return _evaluate(config, workdir, given)


def _evaluate(
    config: ConfigDict, workdir: Path, thresholds: dict[str, float | None]
) -> str:
    """Does what `evaluate` does in a work directory that is its own."""
    with hosts.first_alone("workdir"):
        categories = list_categories(config)
    trunk = pretrained.load_saved_trunk(workdir / TRUNK)
    _check_trained(categories, workdir)
    for category in categories:
        folder = workdir / results.folder_name(category)
        with hosts.first_alone("data"):
            data = open_data(config, category, needs_training=False)
        run = CategoryRun(config, category, data=data, folder=folder, trunk=trunk)
        run.evaluate(**thresholds)
    return collect(config, workdir, categories, trunk)


def list_categories(config: ConfigDict) -> list[str]:
    """The categories that a config asks for; draws the synthetic ones."""
    dataset = config.dataset
    names = [name.strip() for name in dataset.category.split(",")]
    if dataset.name != "synthetic":
        return select_categories(dataset.name, Path(dataset.root).expanduser(), names)
    names = ["assembly"] if names == ["all"] else list(dict.fromkeys(names))
    for name in names:
        synthetic.write_category(
            synthetic_root(config), category=name, **dataset.synthetic
        )
    return names


def synthetic_root(config: ConfigDict) -> Path:
    """Where the synthetic data set lies: a folder of its own for each drawing."""
    dataset = config.dataset
    if dataset.root:
        return Path(dataset.root).expanduser()
    drawing = "-".join(str(v) for v in dataset.synthetic.to_dict().values())
    drawing = f"v{synthetic.GENERATOR_VERSION}-{drawing}"
    return Path(dataset.cache_dir).expanduser() / "synthetic" / drawing


def open_data(
    config: ConfigDict, category: str, *, needs_training: bool = True
) -> Category:
    """Opens the images of a category that `list_categories` gave.

    Says what was noticed of them, in every run that uses them.

    Args:
        config: the run's.
        category: its name.
        needs_training: see `open_category`.
    """
    dataset = config.dataset
    root = synthetic_root(config) if dataset.name == "synthetic" else Path(dataset.root)
    data = open_category(
        dataset.name,
        root=root.expanduser(),
        category=category,
        image_size=tuple(config.image_size),
        cache_dir=Path(dataset.cache_dir).expanduser(),
        validation_fraction=dataset.validation_fraction,
        white_level=dataset.white_level,
        seed=config.seed,
        needs_training=needs_training,
    )
    if hosts.is_first():
        if not data.train:
            print(
                f"[{category}] no training images: whether the run was trained on "
                "this data set's is not looked at",
                flush=True,
            )
        for remark in data.remarks:
            print(f"[{category}] {remark}", flush=True)
    return data


def load_trunk(config: ConfigDict) -> pretrained.Trunk:
    """The trunk that a config describes."""
    return pretrained.load_trunk(**trunk_fields(config))


def trunk_fields(config: ConfigDict) -> dict[str, Any]:
    """What decides a trunk, as `pretrained.load_trunk` takes it."""
    fields = config.trunk.to_dict()
    for name in ("layers", "whiten"):  # of its features: it is loaded whole
        fields.pop(name)
    is_drawn = config.trunk.source == "random"
    return fields | {"seed": config.seed if is_drawn else 0}


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Refuses a work directory that this run could not go on in.

    Raises:
        UserError: it is something else, or holds checkpoints of another config.
    """
    path = workdir / CONFIG
    if path.exists():
        if _has_checkpoints(workdir):
            config_lib.check_resumable(config_lib.load(path), config, workdir)
    elif found := files.find_content(workdir):
        raise UserError(
            "Expected an empty or new folder, or that of an earlier run, found "
            f"{found}. Give another --workdir."
        )


def _claim(config: ConfigDict, workdir: Path) -> pretrained.Trunk:
    """Makes the work directory this run's: its config, its copy of the trunk."""
    path = workdir / TRUNK
    if not hosts.is_first():
        return pretrained.load_saved_trunk(path)
    kept = path.exists() and _has_checkpoints(workdir)
    trunk = pretrained.load_saved_trunk(path) if kept else load_trunk(config)
    workdir.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, workdir / CONFIG)
    if not kept:
        pretrained.save_trunk(trunk, path)
    return trunk


def _has_checkpoints(workdir: Path) -> bool:
    """Whether anything was trained that another config could not go on with."""
    return any(workdir.glob(f"*/{CHECKPOINTS}/*"))


def _check_trained(categories: list[str], workdir: Path) -> None:
    """Refuses to evaluate what was not trained."""
    for category in categories:
        folder = workdir / results.folder_name(category) / CHECKPOINTS
        if not folder.is_dir():
            trained = sorted(p.parent.name for p in workdir.glob(f"*/{CHECKPOINTS}"))
            raise UserError(
                f"Expected checkpoints of category {category!r} in {folder}, found "
                f"those of {', '.join(trained) or 'none'}. Run the train.py command "
                "again; or, if your own folder or table has another name now, give "
                "it the name it had."
            )


def collect(
    config: ConfigDict, workdir: Path, categories: list[str], trunk: pretrained.Trunk
) -> str:
    """Joins the categories' results; returns what to tell the person."""
    if not hosts.is_first():
        return "Results are reported by process 0."
    rows, decisions = {}, {}
    for name in categories:
        path = workdir / results.folder_name(name) / RESULTS
        document = json.loads(path.read_text())
        metrics, decisions[name] = document["metrics"], document["decisions"]
        rows[name] = results.with_nan(metrics)
    about = {
        "selection": config.selection,
        "selected_on_test": config.selection == config_lib.BEST_TEST_AUROC,
        "calibration": config.calibration,
        "decisions": decisions,
        "trunk": dataclasses.asdict(trunk.identity),
        "image_size": list(config.image_size),
        "versions": {
            name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")
        },
    }
    results.write(workdir, rows, about)
    page.write(workdir)
    lines = [results.table(rows, about)]
    if trunk.identity.source.startswith("random"):
        lines.append(
            "The trunk has random weights, whose features detect little: expect "
            "poor numbers until you use a trained one (README, section Trunk weights)."
        )
    lines.append(f"Results: {workdir / RESULTS}, {workdir / 'results.csv'}")
    lines.append(f"Report: {workdir / page.REPORT}")
    lines.append(f"Pictures: {workdir}/<category>/pictures/<type>/*.png")
    if config.evaluation.write_maps:
        lines.append(f"Maps: {workdir / MAPS}/<category>/test/<type>/*.tiff")
    return "\n".join(lines)
