"""Loads a trunk's weights: built-in, from the Hugging Face hub, a file, or random."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ulsad_jax.runtime import compilation, errors, files
from ulsad_jax.runtime.errors import UserError
from ulsad_jax.trunks import base, torch_names
from ulsad_jax.trunks.pyramid import pyramid_variables


@dataclasses.dataclass(frozen=True)
class TrunkIdentity:
    """The properties by which trunks are compared.

    Attributes:
        architecture: name of the architecture; see `base.find`.
        source: origin of the weights, for display.
        sha256: SHA-256 of the names, shapes and float32 values of the weights.
    """

    architecture: str
    source: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A frozen trunk.

    Attributes:
        identity: identity of the trunk.
        arrays: published weights by PyTorch's names, in float32.
        variables: variables of the `pyramid.FeaturePyramid`, on the device.
    """

    identity: TrunkIdentity
    arrays: Mapping[str, np.ndarray]
    variables: Mapping[str, Any]


def load_trunk(
    *, architecture: str, source: str, repository: str, path: str, seed: int
) -> Trunk:
    """Loads a trunk, or draws a random one.

    Args:
        architecture: name of the architecture; see `base.find`.
        source: "builtin", "hub", "file" or "random".
        repository: name of a Hugging Face repository with a model.safetensors in
            timm's names.
        path: .safetensors or .pth file in torchvision's or timm's names.
        seed: seed of a random trunk.

    Raises:
        UserError: the weights cannot be read, are not finite, or belong to another
            architecture; or the architecture has none built in.
    """
    if source == "random":
        return _draw(architecture, seed)
    if source == base.BUILTIN:
        return _make(
            architecture, f"builtin:{architecture}", _read_builtin(architecture)
        )
    if source == "hub":
        arrays, origin = _read(_download(repository)), f"hub:{repository}"
    else:
        arrays, origin = _read(Path(path).expanduser()), f"file:{Path(path).name}"
    return _make(architecture, origin, arrays)


def save_trunk(trunk: Trunk, path: Path) -> None:
    """Writes a trunk with its identity to a .safetensors file, in PyTorch's names."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(a) for name, a in trunk.arrays.items()}
    files.replace(path, save(arrays, dataclasses.asdict(trunk.identity)))


def load_saved_trunk(path: Path) -> Trunk:
    """Reads a trunk that `save_trunk` wrote.

    Raises:
        UserError: there is no such file, or it lacks the identity or the weights that
            were saved.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(
            f"Expected the run's trunk, found nothing at {path}. Restore the file, or "
            "run the train.py command again, which makes it anew."
        )
    arrays = _read(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    try:
        identity = TrunkIdentity(**metadata)
    except TypeError as error:
        raise UserError(
            f"Expected {path} to be the trunk of a run, with its identity, found the "
            f"metadata {metadata}. Restore the file."
        ) from error
    trunk = _make(identity.architecture, identity.source, arrays)
    check_same(identity, trunk.identity, path)
    return trunk


def check_same(expected: TrunkIdentity, found: TrunkIdentity, where: Path) -> None:
    """Checks that a trunk has the expected architecture and weights.

    Args:
        expected: identity of the trunk that training used.
        found: identity of the trunk to check.
        where: path of the trained networks, for the message.

    Raises:
        UserError: they differ; the message shows both identities.
    """
    if (expected.architecture, expected.sha256) != (found.architecture, found.sha256):
        raise UserError(
            f"Expected the trunk that {where} was trained with, {_describe(expected)}, "
            f"found {_describe(found)}. Features of another trunk mean nothing to "
            "these networks: restore the trunk, or train anew in another folder."
        )


def _describe(identity: TrunkIdentity) -> str:
    i = identity
    return f"{i.architecture} from {i.source} (SHA-256 {i.sha256[:12]})"


def _draw(architecture: str, seed: int) -> Trunk:
    init = jax.jit(
        lambda key: base.draw(architecture, key)[1],
        compiler_options=compilation.run_once(),
    )
    arrays = torch_names.export(init(jax.random.key(seed)))
    return _make(architecture, f"random:{seed}", arrays)


def _make(architecture: str, source: str, arrays: Mapping[str, np.ndarray]) -> Trunk:
    variables = torch_names.import_trunk(arrays, architecture)
    arrays = torch_names.export(variables)
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        if not np.isfinite(value).all():
            raise UserError(
                f"Expected finite trunk weights, found NaN or infinity in {name!r} of "
                f"{source}. Get the file again."
            )
        digest.update(f"{name}{value.shape}".encode())
        digest.update(value.tobytes())
    identity = TrunkIdentity(architecture, source, digest.hexdigest())
    own = jax.device_put(pyramid_variables(architecture, variables))
    return Trunk(identity, arrays, own)


def _read_builtin(architecture: str) -> dict[str, np.ndarray]:
    stored = base.find(architecture).builtin
    if stored is None:
        known = [name for name, found in base.collect().items() if found.builtin]
        raise UserError(
            f"Expected config.trunk.architecture to be one that has weights built in "
            f"({', '.join(known)}), found {architecture!r}. Set it with "
            f"--config.trunk.architecture={known[0]}, or take another "
            "--config.trunk.source."
        )
    return _read(stored)


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"Expected to download model.safetensors of the Hugging Face repository "
            f"{repository!r}, found: {error}. Check the name and the connection; or, "
            "on a machine that has one, download "
            f"https://huggingface.co/{repository}/resolve/main/model.safetensors, "
            "copy it here, and set --config.trunk.source=file "
            "--config.trunk.path=<the file>."
        ) from error


def _read(path: Path) -> dict[str, np.ndarray]:
    """Reads named arrays without unpickling code."""
    if not path.is_file():
        raise UserError(
            f"Expected a file of trunk weights, found nothing at {path}. Check "
            "--config.trunk.path; docs/trunks.md says how to get one."
        )
    if path.suffix in (".pth", ".pt"):
        return _read_torch(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"Expected a .safetensors file, found {path}: {error}. Download it again, "
            "or name a .pth file where PyTorch is installed; a run's own copy may be "
            "deleted: the train.py command makes it anew."
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"Expected PyTorch, to read {path}, found none. Install torch, or convert "
            "the file to .safetensors elsewhere."
        ) from error
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, Mapping):
            state = state.get("state_dict", state)
        if not isinstance(state, Mapping):
            raise ValueError(f"a {type(state).__name__}")
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"a {type(value).__name__} named {name!r}")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"Expected {path} to hold nothing but weights by name, found: "
            f"{errors.sentence(error)} Save the model's state_dict() alone."
        ) from error
    return {name: value.float().numpy() for name, value in state.items()}
