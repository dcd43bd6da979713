"""The two sides of `benchmarks/speed.py`, each in a process of its own.

A timed method returns its seconds; the work is done when it returns.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from benchmarks.turns import clock
from ulsad_jax.runtime import host_memory

TERMS = ("local", "attention", "consistency")
# Calibration of local and global maps: any but none.
OFFSETS, SCALES = (0.5, 1.0), (0.25, 0.125)


def make(*, side: str, memory_kept: bool, **options: Any) -> JaxSide | TorchSide:
    """Returns a side; its process keeps freed memory if `memory_kept`."""
    if memory_kept:
        host_memory.keep_freed()
    return {"jax": JaxSide, "torch": TorchSide}[side](**options)


def make_images(count: int, size: int) -> np.ndarray:
    """Random uint8 images of 8 x 8 patches and noise, [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 224, (count, 8, 8, 3), np.uint8)
    patches = patches.repeat(size // 8, 1).repeat(size // 8, 2)
    return patches + rng.integers(0, 32, patches.shape, np.uint8)


class _Side:
    """What both sides do alike.

    A side has `versions`, the `images` of a training step, and `_step`, `_update`,
    `_wait`, `_maps` and `_fetch`.
    """

    def read_versions(self) -> dict[str, str]:
        """Versions of the libraries."""
        return self.versions

    def step(self) -> float:
        """A training step from kept features and images."""
        return clock(self._step)[0]

    def steps(self, count: int) -> float:
        """So many training steps in a row; the host waits for the last one."""

        def run():
            for _ in range(count):
                self._update()
            self._wait()

        return clock(run)[0]

    def predict(self, batch: int) -> float:
        """From uint8 images in host memory to fused maps there."""
        images = make_images(batch, self.images.shape[1])
        return clock(lambda: self._predict(images))[0]

    def stream(self, batch: int, count: int) -> float:
        """So many batches to maps; a result is fetched while the next is computed."""
        images = make_images(batch, self.images.shape[1])

        def run():
            late = None
            for _ in range(count):
                before, late = late, self._maps(images)
                if before is not None:
                    self._fetch(before)
            return self._fetch(late)

        return clock(run)[0]

    def _predict(self, images: np.ndarray) -> np.ndarray:
        return self._fetch(self._maps(images))


class JaxSide(_Side):
    """This package, through the functions that training and evaluation use."""

    def __init__(
        self,
        *,
        size: int,
        batch: int,
        dtype: str,
        weights: str = "",
        system: str = "default",
        **_: Any,
    ):
        """Draws weights and saves them for the other side.

        Args:
            size: of the square images.
            batch: of a training step.
            dtype: computation type.
            weights: the .npz file to write, or nothing.
            system: module of `configs`; PyTorch has the default alone.
        """
        import importlib

        import jax

        from ulsad_jax.runs import config as config_lib
        from ulsad_jax.runs import setup, steps
        from ulsad_jax.runtime import devices as devices_lib
        from ulsad_jax.scoring.prediction import make_predict_step
        from ulsad_jax.trunks import features, sources
        from ulsad_jax.trunks.pyramid import pyramid_variables

        self.jax = jax
        self.versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        config = importlib.import_module(f"configs.{system}").get_config()
        config.method, config.trunk.source = "ulsad", "random"
        config = config_lib.resolve(config)
        if dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")
        elif dtype != "tfloat32":  # which is JAX's default on a GPU
            config.train.dtype = dtype
        config.image_size = (size, size)
        made = setup.make(config)
        trunk = draw_trunk(config.trunk.architecture)
        variables = pyramid_variables(config.trunk.architecture, trunk)
        variables = jax.device_put(variables)
        self.images = images = make_images(batch, size)
        self.devices = devices_lib.find_devices(1)
        self.extractor = features.make_extractor(made.pyramid, variables)
        # First calls, which compile, but for the call's own time.
        self.first = {}
        self.first["extract"], raw = clock(self._extract)
        self.statistics = features.channel_statistics(raw)
        kept = sources.Kept(images, self.statistics.standardize(raw))
        normals = sources.Normals(kept, kept, self.statistics)
        self.kept = sources.place(normals, self.devices).train  # as train.py does
        self.key = jax.random.key(0)
        init = steps.make_init(made.method, made.spec(batch))
        self.first["init"], state = clock(lambda: jax.block_until_ready(init(self.key)))
        self.state = self.devices.replicate(state)
        self.load = sources.load
        self.train_step = steps.make_train_step(
            made.method, self.devices, config.parallel.backend
        )
        self.predict_step = make_predict_step(made.pyramid, made.method)
        # A copy, because training gives its state away.
        networks = jax.tree.map(np.array, self.state.model)
        self.weights = make_weights(variables, self.statistics, networks)
        if weights:
            save_weights(weights, trunk, self.statistics, networks)

    def results(self, training: bool, inference: bool) -> dict[str, np.ndarray]:
        """What both sides have to agree on; in training by two steps."""
        found = {"features": np.asarray(self.kept.features)}
        if inference:
            found["map"] = self._predict(self.images)
        if training:
            self.first["step"], found["first losses"] = clock(self._step)
            found["second losses"] = self._step()
        return found

    def extract(self) -> float:
        """Raw features of a batch, to host memory."""
        return clock(self._extract)[0]

    def first_calls(self) -> dict[str, float]:
        """Seconds of the first calls of what a fit compiles."""
        return self.first

    def peak_memory(self) -> int | None:
        """Bytes on the device at most, where it tells."""
        return (self.jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def _extract(self) -> np.ndarray:
        return np.asarray(self.extractor(self.images)[1])

    def _step(self) -> np.ndarray:
        losses = self._update()
        self._wait()
        return np.array([losses[name] for name in TERMS])

    def _update(self) -> dict[str, Any]:
        count = len(self.kept)
        batch = self.load(self.kept, np.arange(count), count, self.devices)
        self.state, losses = self.train_step(self.state, batch, self.key)
        return losses

    def _wait(self) -> None:
        self.jax.block_until_ready(self.state)

    def _maps(self, images: np.ndarray):
        return self.predict_step(self.weights, images).anomaly_map

    def _fetch(self, maps) -> np.ndarray:
        return np.asarray(maps)


def draw_trunk(architecture: str) -> dict[str, Any]:
    """A random trunk whose running statistics are not those of a new one."""
    import jax

    from ulsad_jax.trunks import torch_names as torch_import
    from ulsad_jax.trunks import weights as pretrained

    arrays = pretrained.load_trunk(
        architecture=architecture, source="random", repository="", path="", seed=0
    ).arrays
    trunk = torch_import.import_trunk(arrays, architecture)
    rng = np.random.default_rng(0)
    low = {"mean": -0.5, "var": 0.5}
    trunk["batch_stats"] = jax.tree_util.tree_map_with_path(
        lambda path, x: rng.uniform(
            low[path[-1].key], low[path[-1].key] + 1, x.shape
        ).astype(np.float32),
        trunk["batch_stats"],
    )
    return trunk


def make_weights(trunk, statistics, variables):
    """What this package's inference takes, on the device."""
    import jax

    from ulsad_jax.scoring.calibration import Calibration
    from ulsad_jax.scoring.prediction import Weights
    from ulsad_jax.scoring.thresholds import Thresholds

    offset, scale = (
        dict(zip(("local", "global"), numbers, strict=True))
        for numbers in (OFFSETS, SCALES)
    )
    calibration = Calibration(offset, scale)
    weights = Weights(trunk, statistics, variables, calibration, Thresholds())
    return jax.device_put(weights)


def save_weights(path: str, trunk, statistics, variables) -> None:
    """Writes everything under the names of `torch_ulsad.Ulsad`."""
    from ulsad_jax.trunks import torch_names as torch_import

    networks = {"trunk": trunk}
    for ours, theirs in (("local", "local"), ("global", "global_")):
        networks[theirs] = {kind: tree.get(ours) for kind, tree in variables.items()}
    arrays = {
        f"{network}.{name}": value
        for network, tree in networks.items()
        for name, value in torch_import.export(tree).items()
    }
    constants = {
        "mean": statistics.mean,
        "std": statistics.std,
        "offset": OFFSETS,
        "scale": SCALES,
    }
    for name, value in constants.items():
        arrays[name] = np.asarray(value, np.float32)[:, None, None]
    np.savez(path, **arrays)


class TorchSide(_Side):
    """`torch_ulsad`, on a GPU where PyTorch finds one."""

    def __init__(
        self,
        *,
        size: int,
        batch: int,
        dtype: str,
        training_layout: str,
        compiled: bool,
        weights: str = "",
        **_: Any,
    ):
        """Reads the weights of the other side.

        Args:
            size: of the square images.
            batch: of a training step.
            dtype: computation type; bfloat16 through autocast.
            training_layout: of the trained networks; everything else is channels_last.
            compiled: whether to `torch.compile`.
            weights: the .npz file to read; without one PyTorch's own initial weights.
        """
        import torch

        from benchmarks import torch_ulsad

        self.torch = torch
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.versions = {"torch": torch.__version__}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        tf32 = dtype != "float32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
        self.layout = getattr(torch, training_layout)
        self.trained, self.fixed = (torch_ulsad.Ulsad(size) for _ in range(2))
        arrays = dict(np.load(weights)) if weights else {}
        for model in (self.trained, self.fixed):
            if arrays:
                model.load(arrays)
            model.to(self.device, memory_format=torch.channels_last)
        self.trained.local.to(memory_format=self.layout)
        self.trained.global_.to(memory_format=self.layout)
        self.fixed.eval()
        self.optimizer = torch_ulsad.make_optimizer(self.trained)
        self.autocast = contextlib.nullcontext
        if not dtype.endswith("float32"):
            kind = getattr(torch, dtype)
            self.autocast = lambda: torch.autocast(self.device, kind)
        self.extract_fn, self.losses_fn, self.predict_fn = (
            torch.compile(function) if compiled else function
            for function in (
                self.trained.extract,
                self.trained.losses,
                self.fixed.predict,
            )
        )
        self.images = make_images(batch, size)
        self.features = self._features(self.images)
        self.kept = self._put(self.images)

    def results(self, training: bool, inference: bool) -> dict[str, np.ndarray]:
        """What both sides have to agree on; in training by two steps."""
        found = {"features": self.features.permute(0, 2, 3, 1).cpu().numpy()}
        if inference:
            found["map"] = self._predict(self.images)
        if training:
            found["first losses"] = self._step()
            found["second losses"] = self._step()
        return found

    def step_with_trunk(self) -> float:
        """A training step that runs the trunk, as the reference's do."""
        return clock(lambda: self._step(self._features(self.images)))[0]

    def extract(self) -> float:
        """Features of a batch, to host memory."""
        return clock(lambda: self._features(self.images).cpu())[0]

    def peak_memory(self) -> int | None:
        """Bytes on the device at most, where it is a GPU."""
        cuda = self.device == "cuda"
        return self.torch.cuda.max_memory_allocated() if cuda else None

    def _put(self, images: np.ndarray):
        """Images on the device, [b, 3, h, w]; such a view is channels_last."""
        return self.torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)

    def _features(self, images: np.ndarray):
        with self.torch.no_grad(), self.autocast():
            return self.extract_fn(self.trained.normalize(self._put(images)))

    def _step(self, features=None) -> np.ndarray:
        losses = self._update(features)
        self._wait()
        return losses.detach().cpu().numpy()

    def _update(self, features=None):
        """Takes a step from features, by default the kept ones."""
        x = self.features if features is None else features
        x = x.contiguous(memory_format=self.layout)
        normalized = self.trained.normalize(self.kept)
        normalized = normalized.contiguous(memory_format=self.layout)
        with self.autocast():
            losses = self.losses_fn(x, normalized)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        return losses

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def _fetch(self, maps) -> np.ndarray:
        return maps.cpu().numpy()

    def _maps(self, images: np.ndarray):
        with self.torch.inference_mode(), self.autocast():
            return self.predict_fn(self._put(images)).float()
