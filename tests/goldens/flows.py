"""Computes flows.npz with anomalib and PyTorch: `python -m tests.goldens.flows`.

It holds what anomalib's flows make of drawn levels and weights: normal variables,
log-determinants, log-likelihoods, maps, losses of a few steps, and norms of the first
gradient. CFLOW takes the steps that its authors' program takes, with their rotations.
It was made with anomalib 2.7.0, FrEIA 0.2 and torch 2.14.1.
"""

from __future__ import annotations

import pathlib
import re
import zlib

import numpy as np

SIZE, BATCH, SEED, STEPS, UPDATES = (32, 40), 2, 7, 2, 3
DECAY = 0.1  # more than the default, so that it shows
CONDITION, POSITIONS = 16, 48  # positions of one level are not all of a step's
LEVELS = {"layer1": (8, 10, 7), "layer2": (4, 5, 12)}


def levels() -> dict[str, np.ndarray]:
    """Outputs of a trunk, [b, h, w, c]."""
    rng = np.random.default_rng(SEED)
    drawn = {k: rng.standard_normal((BATCH, *s), np.float32) for k, s in LEVELS.items()}
    return {k: np.maximum(x, 0) for k, x in drawn.items()}


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of a flow, by its name and shape here, such as "norms_0/scale"."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    z = rng.standard_normal(shape, np.float32)
    if name.endswith("order"):
        return rng.permutation(shape[0])
    if name.endswith("rotation"):
        return np.linalg.qr(z)[0]
    if name.endswith("kernel"):
        return z * np.float32(2 / np.sqrt(np.prod(shape[:-1])))
    if name.endswith("global_scale"):
        return 10 + z
    return 1 + z / 10 if name.endswith("/scale") else z / 10


def order(name: str) -> np.ndarray:
    """The order of a level's positions."""
    height, width, _ = LEVELS[name]
    return np.random.default_rng(SEED).permutation(BATCH * height * width)


def convert(name: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
    """The name here of one of anomalib's arrays, and its value there."""
    ours = name.replace("fast_flow_blocks", "flows").replace("module_list", "steps")
    ours = re.sub(r"\.(?=\d)", "_", ours).replace(".", "/")
    if ours.startswith("norms"):
        c, h, w = shape
        ours = ours.replace("weight", "scale")
        return ours, fill(ours, (h, w, c)).transpose(2, 0, 1)
    if "w_perm" in ours:
        rotates = len(shape) == 2
        ours = re.sub("w_perm(_inv)?", "rotation" if rotates else "order", ours)
        drawn = fill(ours, shape if rotates else shape[:1])
        matrix = drawn if rotates else np.eye(len(drawn), dtype=np.float32)[drawn]
        return ours, (matrix.T if name.endswith("inv") else matrix).reshape(shape)
    if ours.endswith("weight"):
        ours = ours.replace("weight", "kernel")
        o, i, *size = shape
        size = [] if size == [1, 1] else size
        axes = (-1, -2, *range(len(size)))
        return ours, fill(ours, (*size, i, o)).transpose(axes).reshape(shape)
    return ours, fill(ours, (max(shape),)).reshape(shape)


def load(module) -> dict[str, str]:
    """Gives a module drawn weights; returns the names here of its parameters."""
    import torch

    names, arrays = {}, {}
    for name, value in module.state_dict().items():
        names[name], array = convert(name, tuple(value.shape))
        arrays[name] = torch.tensor(np.ascontiguousarray(array))
    module.load_state_dict(arrays)
    return {n: names[n] for n, a in module.named_parameters() if a.requires_grad}


def fastflow() -> dict[str, np.ndarray]:
    """The arrays of FastFlow."""
    import torch
    from anomalib.models.image.fastflow import anomaly_map, loss, torch_model

    module, modules = torch.nn.Module(), torch.nn.ModuleList
    shapes = [(c, h, w) for h, w, c in LEVELS.values()]
    module.norms = modules([torch.nn.LayerNorm(shape) for shape in shapes])
    module.fast_flow_blocks = modules(
        [torch_model.create_fast_flow_block(s, False, 1.0, STEPS) for s in shapes]
    )
    names = load(module)
    inputs = [torch.tensor(x).permute(0, 3, 1, 2) for x in levels().values()]

    def run():
        pairs = zip(module.fast_flow_blocks, module.norms, inputs, strict=True)
        return zip(*(flow(norm(x)) for flow, norm, x in pairs), strict=True)

    with torch.no_grad():
        variables, determinants = run()
        found = anomaly_map.AnomalyMapGenerator(SIZE)(variables)
    golden = {"map": found[:, 0].numpy()}
    for i, (z, determinant) in enumerate(zip(variables, determinants, strict=True)):
        golden[f"variables{i}"] = z.permute(0, 2, 3, 1).numpy()
        golden[f"determinants{i}"] = determinant.numpy()
    trained = [a for a in module.parameters() if a.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=DECAY)
    losses = []
    for i in range(UPDATES):
        optimizer.zero_grad()
        total = loss.FastflowLoss()(*run())
        total.backward()
        optimizer.step()
        losses.append(total.item())
        if i == 0:
            moments = [optimizer.state[a]["exp_avg"].norm().item() for a in trained]
    golden["losses"] = np.array(losses)
    golden["names"] = np.array(list(names.values()))
    golden["moments"] = np.array(moments)
    return golden


def cflow() -> dict[str, np.ndarray]:
    """The arrays of CFLOW."""
    import torch
    from anomalib.models.image.cflow import anomaly_map, utils

    heads = {
        name: utils.cflow_head(CONDITION, STEPS, 1.9, shape[-1], permute_soft=True)
        for name, shape in LEVELS.items()
    }
    module = torch.nn.ModuleDict(heads)
    names, golden, found, sizes = load(module), {}, [], []
    optimizer = torch.optim.Adam(
        [a for a in module.parameters() if a.requires_grad], lr=1e-3
    )
    for name, x in levels().items():
        height, width, channels = LEVELS[name]
        sizes.append((height, width))
        x = torch.tensor(x).reshape(-1, channels)
        codes = utils.positional_encoding_2d(CONDITION, height, width)
        codes = codes.permute(1, 2, 0).reshape(-1, CONDITION).repeat(BATCH, 1)

        def run(rows, x=x, codes=codes, channels=channels, head=heads[name]):
            z, determinants = head(x[rows], [codes[rows]])
            return utils.get_logp(channels, z, determinants) / channels

        with torch.no_grad():
            found.append(run(slice(None)))
        golden[f"{name}/likelihoods"] = found[-1].reshape(BATCH, height, width).numpy()
        rows, losses, highest = torch.tensor(order(name)), [], []
        count = min(POSITIONS, len(rows))
        for i in range(len(rows) // count):
            likelihoods = run(rows[i * count : (i + 1) * count])
            loss = -torch.nn.functional.logsigmoid(likelihoods)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            losses.append(loss.mean().item())
            highest.append(likelihoods.max().item())
        golden[f"{name}/losses"] = np.array(losses)
        golden[f"{name}/highest"] = np.array(highest)
    maps = anomaly_map.AnomalyMapGenerator([*LEVELS])
    heights, widths = zip(*sizes, strict=True)
    golden["map"] = maps(
        distribution=found, height=heights, width=widths, image_size=SIZE
    ).numpy()
    trained = {n: a for n, a in module.named_parameters() if n in names}
    moments = [optimizer.state[a]["exp_avg"].norm().item() for a in trained.values()]
    golden["names"] = np.array(list(names.values()))
    golden["moments"] = np.array(moments)
    return golden


def main() -> None:
    """Writes the golden next to this script."""
    golden = {f"fastflow/{name}": array for name, array in fastflow().items()}
    golden |= {f"cflow/{name}": array for name, array in cflow().items()}
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **golden)


if __name__ == "__main__":
    main()
