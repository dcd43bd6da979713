"""Converts PyTorch-named arrays to Flax variables and back.

A module's name here is PyTorch's with "." before a number written "_", so one rule
converts every network: "layer1.0.conv1.weight" is params/layer1_0/conv1/kernel.
Convolutions are (out, in, kh, kw) there and [kh, kw, in, out] here, matrices (out, in)
and [in, out]; transposed convolutions are (in, out, kh, kw) there and flipped here (see
`nn.layers`). Parameters that no layer of Flax has keep their names and axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import base

Variables = dict[str, Any]
_LEAVES = {
    ("params", "scale"): "weight",
    ("params", "kernel"): "weight",
    ("params", "transposed_kernel"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def import_trunk(arrays: Mapping[str, np.ndarray], architecture: str) -> Variables:
    """Returns the variables of a trunk, as published, from a PyTorch state dict.

    Args:
        arrays: arrays by PyTorch's names.
        architecture: name of the architecture; see `base.find`.

    Raises:
        UserError: an array is missing, unknown, or of another shape.
    """
    unused = base.find(architecture).unused
    used = {n: a for n, a in arrays.items() if not n.startswith(unused)}
    _, shapes = base.shapes(architecture)
    return import_arrays(used, shapes, f"a {architecture} trunk")


def import_arrays(
    arrays: Mapping[str, np.ndarray], shapes: Variables, what: str
) -> Variables:
    """Selects, converts and checks the arrays of a module.

    Args:
        arrays: arrays by PyTorch's names.
        shapes: shapes of the module's variables.
        what: name of the module, for messages.

    Raises:
        UserError: an array is missing, unknown, or of another shape.
    """
    expected = {_torch_name(p): p for p in traverse_util.flatten_dict(shapes)}
    missing = sorted(expected.keys() - arrays.keys())
    unknown = sorted(
        name
        for name in arrays.keys() - expected.keys()
        if not name.endswith(".num_batches_tracked")
    )
    if missing or unknown:
        raise UserError(
            f"Expected the PyTorch arrays of {what}; missing: {_some(missing)}; not "
            f"known: {_some(unknown)}. Check that the architecture is the file's."
        )
    flat_shapes = traverse_util.flatten_dict(shapes)
    flat = {}
    for name, path in expected.items():
        value = _from_torch(path[-1], np.asarray(arrays[name], np.float32))
        if value.shape != flat_shapes[path].shape:
            raise UserError(
                f"Expected {what}'s array {name!r} to have shape "
                f"{flat_shapes[path].shape} (as {'/'.join(path)}), found "
                f"{value.shape}. Check that the architecture is the file's."
            )
        flat[path] = value
    return traverse_util.unflatten_dict(flat)


def export(variables: Variables) -> dict[str, np.ndarray]:
    """Returns PyTorch-named arrays of variables, the inverse of `import_arrays`.

    Args:
        variables: {"params": ..., "batch_stats": ...}, or one of the two, of one
            network or of several under their names ("local.conv1.weight").
    """
    flat = traverse_util.flatten_dict(variables)
    return {
        _torch_name(path): _to_torch(path[-1], np.asarray(value))
        for path, value in flat.items()
    }


def _torch_name(path: tuple[str, ...]) -> str:
    kind, *modules, leaf = path
    names = [re.sub(r"_(?=\d)", ".", module) for module in modules]
    return ".".join([*names, _LEAVES.get((kind, leaf), leaf)])


def _from_torch(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf == "kernel" and value.ndim >= 2:
        return np.moveaxis(value, (1, 0), (-2, -1))
    if leaf == "transposed_kernel" and value.ndim == 4:
        return value[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    return value


def _to_torch(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf == "kernel":
        return np.moveaxis(value, (-2, -1), (1, 0))
    if leaf == "transposed_kernel":
        return value.transpose(2, 3, 0, 1)[:, :, ::-1, ::-1]
    return value


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
