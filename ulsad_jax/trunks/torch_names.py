"""PyTorch-named arrays to Flax variables and back.

A module's name here is PyTorch's with "." before a number written "_", so one rule
converts every network: "layer1.0.conv1.weight" is params/layer1_0/conv1/kernel.
Convolutions are (out, in, kh, kw) there and [kh, kw, in, out] here; transposed ones
are (in, out, kh, kw) there and flipped here (see `models.layers`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ulsad_jax.methods.ulsad.autoencoder import GlobalAutoencoder
from ulsad_jax.methods.ulsad.local import LocalReconstructor
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks.pyramid import FEATURE_CHANNELS
from ulsad_jax.trunks.resnet import ResNet

Variables = dict[str, Any]
_LEAVES = {
    ("params", "bias"): "bias",
    ("params", "scale"): "weight",
    ("params", "kernel"): "weight",
    ("params", "transposed_kernel"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
# Parts of a published ResNet that the pyramid never uses.
_UNUSED = re.compile(r"(layer4|fc|classifier|head)\.|.*\.num_batches_tracked$")


def import_trunk(arrays: Mapping[str, np.ndarray], architecture: str) -> Variables:
    """Variables of `ResNet(architecture)` from a torchvision or timm state dict.

    Raises:
        UserError: an array is missing, unknown, or of another shape.
    """
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = _shapes(ResNet(architecture), image)
    return _import(arrays, shapes, f"a {architecture} trunk")


def import_local(
    arrays: Mapping[str, np.ndarray],
    *,
    channels: int = FEATURE_CHANNELS,
    width: int = 1536,
) -> Variables:
    """Variables of `LocalReconstructor(width)`; raises as `import_trunk` does."""
    features = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32)
    shapes = _shapes(LocalReconstructor(width), features, train=False)
    return _import(arrays, shapes, "the local reconstructor")


def import_global(
    arrays: Mapping[str, np.ndarray],
    *,
    image_size: tuple[int, int] = (256, 256),
) -> Variables:
    """Variables of `GlobalAutoencoder`; raises as `import_trunk` does."""
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    shapes = _shapes(GlobalAutoencoder(FEATURE_CHANNELS), image, train=False)
    return _import(arrays, shapes, "the global autoencoder")


def join_networks(local: Variables, global_: Variables) -> Variables:
    """Variables of `Ulsad` from those of its two networks."""
    return {
        kind: {"local": local[kind], "global": global_[kind]}
        for kind in ("params", "batch_stats")
    }


def export(variables: Variables) -> dict[str, np.ndarray]:
    """PyTorch-named arrays of variables: the inverse of the `import_*` functions.

    Takes {"params": ..., "batch_stats": ...}, or one of the two, of one network or
    of several under their names ("local.conv1.weight").
    """
    flat = traverse_util.flatten_dict(variables)
    return {
        _torch_name(path): _to_torch(path[-1], np.asarray(value))
        for path, value in flat.items()
    }


def _shapes(module: Any, *args: Any, **kwargs: Any) -> Variables:
    """Shapes of a module's variables, without computing anything."""
    init: Callable = module.init
    return jax.eval_shape(
        lambda key, *a: init(key, *a, **kwargs), jax.random.key(0), *args
    )


def _import(
    arrays: Mapping[str, np.ndarray], shapes: Variables, what: str
) -> Variables:
    """Picks, converts and checks every array that `shapes` asks for."""
    expected = {_torch_name(p): p for p in traverse_util.flatten_dict(shapes)}
    missing = sorted(expected.keys() - arrays.keys())
    unknown = sorted(
        name for name in arrays.keys() - expected.keys() if not _UNUSED.match(name)
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


def _torch_name(path: tuple[str, ...]) -> str:
    kind, *modules, leaf = path
    names = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*names, _LEAVES[kind, leaf]])


def _from_torch(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf == "kernel" and value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if leaf == "transposed_kernel" and value.ndim == 4:
        return value[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    return value


def _to_torch(leaf: str, value: np.ndarray) -> np.ndarray:
    if leaf == "kernel":
        return value.transpose(3, 2, 0, 1)
    if leaf == "transposed_kernel":
        return value.transpose(2, 3, 0, 1)[:, :, ::-1, ::-1]
    return value


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
