"""The two sides of `benchmarks/peers.py`.

Both have the same Wide ResNet-50-2 with the same random weights, all its channels, the
same images and the same numbers of images in a batch. EfficientAD needs no trunk once
it has a teacher: its fit is a training step of student and autoencoder for each image,
with a random teacher. anomalib's penalty is on a small image, ours has none.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed_sides import draw_trunk, make_images
from benchmarks.turns import clock
from ulsad_jax.trunks import base as trunks

ARCHITECTURE = "wide_resnet50_2"
# Outputs whose features each method compares, on the grid of the first; as in anomalib,
# channels are not pooled.
LAYERS = {"patchcore": "layer2+layer3", "padim": "layer1+layer2+layer3"}
# The smallest image that anomalib's EfficientAD takes in place of its penalty's.
LEAST = 64
CHANNELS = 100  # of PaDiM, chosen at random
M_MMAP_THRESHOLD = -3  # glibc's number of the size from which memory is mapped
SHARE = 0.1  # of the patches, in PatchCore's coreset

patchcore, padim = (
    dataclasses.replace(
        trunks.find(ARCHITECTURE),
        grid=layers.partition("+")[0],
        layers=layers,
        channels=None,
    )
    for layers in LAYERS.values()
)
efficientad = trunks.find(ARCHITECTURE)  # pooled to as many channels as the teacher has


class _Side:
    """What both sides do alike."""

    def __init__(self, *, method: str, images: int, size: int, batch: int, path: str):
        """Draws the images.

        Args:
            method: name of the method.
            images: number of training images.
            size: height and width of the images.
            batch: images in a batch.
            path: the .npz file of the trunk's weights, which our side writes.
        """
        self.method, self.batch, self.path = method, batch, path
        self.images = make_images(images, size)

    def read_peak(self) -> int:
        """Returns the most memory that this process has had, in bytes (Linux)."""
        text = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", text)[1])


class Ours(_Side):
    """This package, through the functions that training and prediction use."""

    def __init__(self, **options: Any):
        """Draws the trunk's weights and writes them for the other side."""
        super().__init__(**options)
        from ulsad_jax.runtime import host_memory

        host_memory.keep_freed()  # as train.py does
        import jax

        from configs import default
        from ulsad_jax.runs import config as config_lib
        from ulsad_jax.runs import setup
        from ulsad_jax.runtime import devices
        from ulsad_jax.trunks import torch_names
        from ulsad_jax.trunks.pyramid import pyramid_variables

        config = default.get_config()
        config.method, config.image_size = self.method, self.images.shape[1:3]
        config.trunk.architecture = f"{__name__}:{self.method}"
        config.train.batch_size = self.batch
        config.methods.padim.channels = CHANNELS
        config.methods.patchcore.share = SHARE
        config.dataset.name, config.dataset.root = "folder", "."
        self.made = setup.make(config_lib.resolve(config))
        trunk = draw_trunk(ARCHITECTURE)
        np.savez(self.path, **torch_names.export(trunk))
        self.trunk = jax.device_put(pyramid_variables(config.trunk.architecture, trunk))
        self.devices = devices.find_devices(1)

    def fit(self) -> float:
        """Fits to the images; returns the seconds."""
        seconds, self.weights = clock(self._fit)
        return seconds

    def predict(self, count: int) -> float:
        """Returns the seconds from uint8 images in host memory to maps and scores."""
        import jax

        from ulsad_jax.scoring.prediction import make_predict_step

        step = make_predict_step(self.made.pyramid, self.made.method)
        images = self.images[:count]
        return clock(lambda: jax.device_get(step(self.weights, images)))[0]

    def _fit(self) -> Any:
        import jax

        from ulsad_jax.runs import steps
        from ulsad_jax.scoring.calibration import Calibration
        from ulsad_jax.scoring.prediction import Weights
        from ulsad_jax.scoring.thresholds import Thresholds
        from ulsad_jax.trunks import sources

        method, n = self.made.method, len(self.images)
        normals = self._extract()
        spec = self.made.spec(self.batch, n, 2 * n)
        state = steps.make_init(method, spec)(jax.random.key(0))
        if self.method == "efficientad":  # the teacher is done
            done = state.training["distilling"] + 0  # not donated twice
            state = state.replace(step=done)
        state = self.devices.place_state(state)
        step = steps.make_train_step(method, self.devices, "jit")
        for rows, valid in self._list_batches():
            loaded = sources.load(normals.train, rows, int(valid.sum()), self.devices)
            state, _ = step(state, loaded, jax.random.key(0))
        model = jax.block_until_ready(method.finish(state).model)
        shapes = jax.eval_shape(method.maps, model, self.made.spec(1).batch)
        same = Calibration(dict.fromkeys(shapes, 0.0), dict.fromkeys(shapes, 1.0))
        return Weights(self.trunk, normals.statistics, model, same, Thresholds())

    def _extract(self) -> Any:
        """Returns images and features; features of zeros where none are needed."""
        from ulsad_jax.trunks import features, sources

        n, shape = len(self.images), self.made.features.shape[1:]
        if self.method == "efficientad":
            kept = sources.Kept(self.images, np.zeros((n, *shape), np.float32))
            same = np.zeros(shape[-1:], np.float32), np.ones(shape[-1:], np.float32)
            return sources.Normals(kept, kept, features.ChannelStatistics(*same))
        batches = [
            {"image": self.images[rows], "index": rows, "valid": valid}
            for rows, valid in self._list_batches()
        ]
        normals = sources.keep(
            self.made.pyramid,
            self.trunk,
            [batches, batches[:1]],
            [n, self.batch],
            whiten=False,
            devices=self.devices,
        )
        return sources.place(normals, self.devices)

    def _list_batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the rows of each batch, and which of them are not padding."""
        from ulsad_jax.runs import steps

        n, size = len(self.images), self.batch
        filled = [
            steps.fill_batch(np.arange(i, min(i + size, n)), size)
            for i in range(0, n, size)
        ]
        return [(rows, np.arange(size) < count) for rows, count in filled]


class Theirs(_Side):
    """anomalib's models."""

    def __init__(self, **options: Any):
        """Sets up PyTorch."""
        super().__init__(**options)
        import torch

        # By itself glibc raises it, and anomalib's coreset then lost 24 MB at a choice.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**22)
        self.torch = torch
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)

    def fit(self) -> float:
        """Fits to the images; returns the seconds, without those to make the model."""
        self.model = self._make()
        return clock(self._fit)[0]

    def predict(self, count: int) -> float:
        """Returns the seconds from uint8 images in host memory to maps and scores."""
        images = self.images[:count]

        def run():
            with self.torch.no_grad():
                found = self.model(self._normalize(images))
            return found.anomaly_map.numpy(), found.pred_score.numpy()

        return clock(run)[0]

    def _make(self):
        from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
        from anomalib.models.image.padim.torch_model import PadimModel
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        if self.method == "efficientad":
            return EfficientAdModel(efficientad.channels).eval()
        layers = LAYERS[self.method].split("+")
        kwargs = {"backbone": ARCHITECTURE, "layers": layers, "pre_trained": False}
        if self.method == "padim":
            model = PadimModel(**kwargs, n_features=CHANNELS)
        else:
            model = PatchcoreModel(**kwargs)
        backbone = model.feature_extractor.feature_extractor
        with np.load(self.path) as arrays:
            weights = {k: self.torch.tensor(arrays[k]) for k in arrays.files}
        unused = backbone.load_state_dict(weights, strict=False)
        missing = [k for k in unused.missing_keys if "num_batches_tracked" not in k]
        assert not missing, missing
        return model.eval()

    def _fit(self) -> None:
        if self.method == "efficientad":
            return self._learn()
        model = self.model
        model.training = True  # its trunk stays in inference mode
        with self.torch.no_grad():
            for start in range(0, len(self.images), self.batch):
                model(self._normalize(self.images[start : start + self.batch]))
            if self.method == "padim":
                model.fit()
            else:
                model.subsample_embedding(SHARE)
        model.eval()

    def _learn(self) -> None:
        """Takes a step of Adam on each batch."""
        model = self.model.train()
        learned = [*model.student.parameters(), *model.ae.parameters()]
        adam = self.torch.optim.Adam(learned, lr=1e-4, weight_decay=1e-5)
        for start in range(0, len(self.images), self.batch):
            x = self._normalize(self.images[start : start + self.batch])
            losses = model(x, x[:, :, :LEAST, :LEAST])
            adam.zero_grad()
            sum(losses).backward()
            adam.step()
        model.eval()

    def _normalize(self, images: np.ndarray):
        """Returns images as the model takes them, float32 [b, 3, h, w]."""
        from ulsad_jax.nn.layers import IMAGENET_MEAN, IMAGENET_STD

        x = self.torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        if self.method == "efficientad":  # it does so itself
            return x.contiguous()
        mean, std = (
            self.torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return ((x - mean) / std).contiguous()
