"""Writes a trained category as one file that runs without this package."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import serialization, traverse_util
from jax import export

import ulsad_jax
from ulsad_jax.methods import base as methods
from ulsad_jax.runtime import files
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.runtime.nested import Fields
from ulsad_jax.scoring.calibration import Calibration
from ulsad_jax.scoring.prediction import Weights, make_predict_step
from ulsad_jax.scoring.result import SUFFIX
from ulsad_jax.scoring.thresholds import Thresholds
from ulsad_jax.trunks.features import ChannelStatistics
from ulsad_jax.trunks.pyramid import FeaturePyramid

if TYPE_CHECKING:
    from jaxtyping import Array, UInt8

    from ulsad_jax.runs.saved import Run

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # those that jax.export supports
MODEL, METADATA = "model.jax", "metadata.json"  # in the file
FORMAT = 3
LARGEST = 2**31 - 2**26  # bytes; jax.export's format is limited to 2 GiB


def write(run: Run, path: Path, platforms: Sequence[str]) -> None:
    """Writes an uncompressed zip file with `model.jax` and `metadata.json`.

    `model.jax` is a serialised `jax.export.Exported`: a function from images, uint8
    [b, h, w, 3] with any b, to the fields of a `Prediction` by name (scores and maps as
    <name>_score and <name>_map), with the weights, the calibration and the thresholds
    as constants.

    Args:
        run: trained category to export.
        path: file to write; an existing file is replaced.
        platforms: platforms to lower to, a subset of `PLATFORMS`.

    Raises:
        UserError: weights that are too large for the format.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(as_arrays(run.weights)))
    if size > LARGEST:
        raise UserError(
            f"Expected weights of at most {LARGEST / 1e9:.2f} GB, which is what "
            f"jax.export can hold, found {size / 1e9:.2f} GB. Train with a smaller "
            "config.model.local_width, or use the run's folder with ulsad_jax.Detector."
        )
    metadata = describe(run) | {"platforms": list(platforms)}
    function = make_function(metadata, run.weights)
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *run.image_size, 3), jnp.uint8)
    exported = export.export(jax.jit(function), platforms=platforms)(images)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(MODEL, exported.serialize())
        archive.writestr(METADATA, json.dumps(metadata, indent=2))
    files.replace(path, content.getvalue())


def write_weights(run: Run, path: Path) -> None:
    """Writes only the weights and the metadata, as a .safetensors file.

    `read_weights` reads them in environments with another version of Orbax, or without
    Orbax.

    Args:
        run: trained category to export.
        path: file to write; an existing file is replaced.
    """
    from safetensors.numpy import save

    tree = serialization.to_state_dict(jax.device_get(as_arrays(run.weights)))
    arrays = traverse_util.flatten_dict(tree, sep="/")
    arrays = {name: array for name, array in arrays.items() if array is not None}
    files.replace(path, save(arrays, {"ulsad_jax": json.dumps(describe(run))}))


def read_weights(path: Path) -> tuple[dict[str, Any], Weights]:
    """Reads (metadata, weights) from a file that `write_weights` wrote.

    Args:
        path: the .safetensors file.

    Raises:
        UserError: there is no such file, or another program wrote it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads(file.metadata()["ulsad_jax"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(
            "Expected a file that `python -m ulsad_jax.export --weights` wrote, found "
            f"at {path}: {error}. Write it with that."
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"Expected {path} to be of format {FORMAT}, found format "
            f"{metadata.get('format')}: another version wrote it. Write it again with "
            "this one."
        )
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    statistics = tree.get("statistics")
    weights = Weights(
        trunk=tree.get("trunk"),
        statistics=statistics and ChannelStatistics(**statistics),
        model=tree["model"],
        calibration=Calibration.from_arrays(tree["calibration"]),
        thresholds=Thresholds(**tree["thresholds"]),
    )
    return metadata, weights


def make_function(
    metadata: Mapping[str, Any], weights: Weights
) -> Callable[[UInt8[Array, "b h w 3"]], dict[str, Array]]:
    """Returns a function of images only, with the weights as constants.

    Args:
        metadata: output of `describe`.
        weights: weights of the method and its trunk.

    Returns:
        A function from images, uint8 [b, h, w, 3], to a dictionary of arrays, as
        `write` describes it.
    """
    config = Fields(metadata["config"])
    method = methods.make(config)
    pyramid = None
    if weights.trunk is not None:
        trunk, dtype = config.trunk, jnp.dtype(config.train.dtype)
        levels = method.takes == methods.LEVELS
        size = tuple(metadata["map_size"])
        pyramid = FeaturePyramid(trunk.architecture, dtype, trunk.layers, levels, size)
    predict = make_predict_step(
        pyramid, method, top_share=config.score.top_share, keep_maps=True
    )
    arrays = as_arrays(weights)

    def detect(image: UInt8[Array, "b h w 3"]) -> dict[str, Array]:
        found = dict(vars(predict(arrays, image)))
        scores, maps = found.pop("scores"), found.pop("maps")
        found |= {f"{name}{SUFFIX}": score for name, score in scores.items()}
        return found | {f"{name}_map": values for name, values in maps.items()}

    return detect


def describe(run: Run) -> dict[str, Any]:
    """Returns the metadata of the file as a JSON object."""
    config, trunk = run.config, run.trunk
    groups = ("method", "methods", "model", "losses", "optimizer", "score", "trunk")
    groups += ("train",)
    return {
        "format": FORMAT,
        "versions": {"ulsad_jax": ulsad_jax.__version__, "jax": jax.__version__},
        "dataset": config.dataset.name,
        "category": run.category,
        "checkpoint": {"step": run.step, "selection": config.selection},
        "image_size": list(run.image_size),
        "map_size": list(config.image_size),
        "input": "uint8 [batch, height, width, 3], RGB, at image_size",
        "white_level": config.dataset.white_level,
        "resize": "bilinear, half-pixel centres, no antialiasing, aspect not kept",
        "config": {name: config.to_dict()[name] for name in groups},
        "trunk": trunk and {"source": trunk.source, "sha256": trunk.sha256},
        "calibration": run.weights.calibration.to_json(),
        **run.decisions.to_json(),
    }


def as_arrays(weights: Weights) -> Weights:
    """Returns the weights with thresholds and calibration as float32 arrays.

    Python numbers would be combined with each other in float64 during tracing, but the
    arguments of a jitted function are float32.
    """
    return jax.tree.map(jnp.asarray, weights)
