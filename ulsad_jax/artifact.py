"""A trained category as one file that runs without this package."""

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
from ulsad_jax.methods.ulsad.networks import Ulsad
from ulsad_jax.runs import training
from ulsad_jax.runtime import files
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.scoring import prediction as inference
from ulsad_jax.scoring import thresholds as decisions
from ulsad_jax.trunks import features
from ulsad_jax.trunks.pyramid import FeaturePyramid

if TYPE_CHECKING:
    from jaxtyping import Array, UInt8

    from ulsad_jax.runs.trained import Run

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # that jax.export knows
MODEL, METADATA = "model.jax", "metadata.json"  # in the file
FORMAT = 1
LARGEST = 2**31 - 2**26  # bytes: the container of jax.export ends at 2 GiB


def write(run: Run, path: Path, platforms: Sequence[str]) -> None:
    """Writes a zip file, not compressed, of `model.jax` and `metadata.json`.

    `model.jax` is a serialised `jax.export.Exported`: a function from images, uint8
    [b, h, w, 3] with any b, to the fields of `inference.Prediction` by name, with the
    weights, the calibration and the thresholds as constants.

    Args:
        run: what to export.
        path: the file; what was there is replaced.
        platforms: to lower for, of `PLATFORMS`.

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
    function = make_function(metadata["networks"], run.weights)
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *run.config.image_size, 3), jnp.uint8)
    exported = export.export(jax.jit(function), platforms=platforms)(images)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(MODEL, exported.serialize())
        archive.writestr(METADATA, json.dumps(metadata, indent=2))
    files.replace(path, content.getvalue())


def write_weights(run: Run, path: Path) -> None:
    """Writes the weights and the metadata alone, as .safetensors.

    They can be read where Orbax is another version or none: see `read_weights`.
    """
    from safetensors.numpy import save

    tree = serialization.to_state_dict(jax.device_get(as_arrays(run.weights)))
    arrays = traverse_util.flatten_dict(tree, sep="/")
    arrays = {name: array for name, array in arrays.items() if array is not None}
    files.replace(path, save(arrays, {"ulsad_jax": json.dumps(describe(run))}))


def read_weights(path: Path) -> tuple[dict[str, Any], inference.Weights]:
    """Reads what `write_weights` wrote: (metadata, weights).

    Raises:
        UserError: no such file, or another one.
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
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    weights = inference.Weights(
        trunk=tree["trunk"],
        statistics=features.ChannelStatistics(**tree["statistics"]),
        variables=tree["variables"],
        calibration=scoring.Calibration(**tree["calibration"]),
        thresholds=decisions.Thresholds(**tree["thresholds"]),
    )
    return metadata, weights


def make_function(
    networks: Mapping[str, Any], weights: inference.Weights
) -> Callable[[UInt8[Array, "b h w 3"]], dict[str, Array]]:
    """A function of images alone, with the weights as its constants.

    Args:
        networks: as `describe` gives them.
        weights: of them.
    """
    dtype = jnp.dtype(networks["dtype"])
    predict = inference.make_predict_step(
        FeaturePyramid(networks["architecture"], dtype, networks["layers"]),
        Ulsad(**networks["model"], dtype=dtype),
    )
    arrays = as_arrays(weights)

    def detect(image: UInt8[Array, "b h w 3"]) -> dict[str, Array]:
        return dict(vars(predict(arrays, image)))

    return detect


def describe(run: Run) -> dict[str, Any]:
    """What a person or a program wants to know of the file, as JSON."""
    config = run.config
    return {
        "format": FORMAT,
        "versions": {"ulsad_jax": ulsad_jax.__version__, "jax": jax.__version__},
        "dataset": config.dataset.name,
        "category": run.category,
        "checkpoint": {"step": run.step, "selection": config.selection},
        "image_size": list(config.image_size),
        "input": "uint8 [batch, height, width, 3], RGB, at image_size",
        "white_level": config.dataset.white_level,
        "resize": "bilinear, half-pixel centres, no antialiasing, aspect not kept",
        "networks": {
            "architecture": config.trunk.architecture,
            "layers": training.make_pyramid(config).layers,
            "dtype": config.train.dtype,
            "model": config.model.to_dict(),
        },
        "trunk": {"source": run.trunk.source, "sha256": run.trunk.sha256},
        "calibration": serialization.to_state_dict(run.weights.calibration),
        **run.decisions.to_json(),
    }


def as_arrays(weights: inference.Weights) -> inference.Weights:
    """Thresholds and calibration as float32 arrays, too.

    Python's numbers would meet in float64, unlike the arguments of a jitted function.
    """
    return jax.tree.map(jnp.asarray, weights)
