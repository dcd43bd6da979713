"""How well a trunk's features tell anomalies: trunks against data sets in a table.

    python benchmarks/judge_trunk.py --trunks=random:0,trunk.safetensors \
        --datasets=photos,scenes --measure=nn --seeds=0 --output=judged.json

The data sets: `photos` (`photo_defects.py`), `surfaces` (`surface_defects.py`),
`scenes` (drawn trays) and `tiles` (Magnetic Tile Defects, at --magnetic_tile). Choose
a trunk with seed 0, and report on other seeds and on the tiles. The measures: `nn`,
the largest distance of a test patch's features to the nearest training patch; `ulsad`,
the system trained on top. Both give image AUROC by type, averaged over categories and
seeds; `ulsad` also that of each map alone, and pixel AUROC.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from absl import app, flags, logging

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]

_TRUNKS = flags.DEFINE_list(
    "trunks", None, "random:<seed>, builtin, or .safetensors files."
)
_DATASETS = flags.DEFINE_list("datasets", ["photos", "scenes"], "Which data sets.")
_MEASURE = flags.DEFINE_enum("measure", "nn", ["nn", "ulsad"], "Which measure.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Of the data sets; 0 is to choose by.")
_RUNS = flags.DEFINE_list("runs", ["0"], "Seeds of ULSAD's training.")
_EPOCHS = flags.DEFINE_integer("epochs", 20, "Of ULSAD's training.")
_POOL = flags.DEFINE_bool("pool", False, "nn: average features over 3 x 3 positions.")
_WHITEN = flags.DEFINE_bool("whiten", False, "Whiten every trunk's features.")
_LAYERS = flags.DEFINE_string("layers", "layer2+layer3", "Of the trunk.")
_SIZE = flags.DEFINE_integer("size", 128, "Side of the images in pixels.")
_TRAIN = flags.DEFINE_integer("train", 40, "Training images a category.")
_VALIDATION = flags.DEFINE_integer("validation", 10, "Validation images a category.")
_GOOD = flags.DEFINE_integer("good", 20, "Normal test images a category.")
_ANOMALOUS = flags.DEFINE_integer("anomalous", 12, "Test images of each defect.")
_TILES = flags.DEFINE_integer("tiles", 60, "At most so many tiles a type; 0: all.")
_MAGNETIC_TILE = flags.DEFINE_string("magnetic_tile", "", "Folder of the real tiles.")
_CACHE = flags.DEFINE_string("cache_dir", "~/.cache/ulsad_jax/judge", "For drawn data.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")
flags.mark_flags_as_required(["trunks"])


def main(argv: list[str]) -> None:
    """Prints a row for each trunk and writes the results of every category."""
    del argv
    logging.set_verbosity(logging.WARNING)
    from ulsad_jax import errors

    with errors.reported():
        measure = make_measure()
        sets = {
            (name, int(seed)): open_dataset(name, int(seed))
            for name in _DATASETS.value
            for seed in _SEEDS.value
        }
        rows = {}
        for spec in _TRUNKS.value:
            started = time.perf_counter()
            trunk = load(spec)
            rows[spec] = judge(trunk, sets, measure)
            rows[spec]["seconds"] = round(time.perf_counter() - started, 1)
            rows[spec]["sha256"] = trunk.identity.sha256
            print_row(spec, rows[spec], header=len(rows) == 1)
            if _OUTPUT.value:
                options = {f: flags.FLAGS[f].value for f in _options()}
                text = json.dumps({"options": options, "trunks": rows}, indent=1)
                Path(_OUTPUT.value).write_text(text + "\n")


def _options() -> list[str]:
    return [f.name for f in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]


def open_dataset(name: str, seed: int) -> list:
    """The categories of a data set."""
    import judge_data
    import photo_defects
    import surface_defects

    from ulsad_jax.data.synthetic import GENERATOR_VERSION
    from ulsad_jax.errors import UserError

    counts = judge_data.Counts(
        _TRAIN.value, _VALIDATION.value, _GOOD.value, _ANOMALOUS.value, _TILES.value
    )
    size, root = _SIZE.value, _MAGNETIC_TILE.value
    drawn = {"photos": photo_defects, "surfaces": surface_defects}
    if name in drawn:
        found = judge_data.open_drawn(drawn[name], seed, size, counts)
    elif name == "scenes":
        found = judge_data.open_scenes(seed, size, counts)
    elif name == "tiles" and root:
        found = judge_data.open_tiles(root, seed, size, counts)
    else:
        raise UserError(
            "Expected --datasets of photos, surfaces, scenes and tiles, and for tiles "
            f"--magnetic_tile=<folder>, found {name!r}. Name others, or the folder."
        )
    versions = {source: module.VERSION for source, module in drawn.items()}
    version = (versions | {"scenes": GENERATOR_VERSION}).get(name)
    place = str(Path(root).resolve()) if name == "tiles" else ""
    key = [name, version, seed, size, counts, place]
    return judge_data.keep(found, Path(_CACHE.value).expanduser(), key)


def load(spec: str):
    """The trunk that `spec` names: "random:<seed>", "builtin" or a file."""
    from ulsad_jax import pretrained

    kind, _, seed = spec.partition(":")
    source = kind if kind in ("random", "builtin") else "file"
    return pretrained.load_trunk(
        architecture="resnet18",
        source=source,
        repository="",
        path=spec if source == "file" else "",
        seed=int(seed or 0) if source == "random" else 0,
    )


def make_measure():
    """A function (trunk, category) -> {metric: value}."""
    if _MEASURE.value == "nn":
        import judge_nn

        return judge_nn.make_measure(
            pool=_POOL.value, whiten=_WHITEN.value, layers=_LAYERS.value
        )
    import judge_ulsad

    return judge_ulsad.Measure(
        epochs=_EPOCHS.value,
        seeds=[int(s) for s in _RUNS.value],
        size=_SIZE.value,
        whiten=_WHITEN.value,
        layers=_LAYERS.value,
    )


def judge(trunk, sets: dict, measure) -> dict:
    """Every category's metrics, and their means over categories and seeds."""
    from judge_ulsad import GLOBAL, LOCAL, PIXEL

    every = {}
    pooled = defaultdict(lambda: defaultdict(list))
    for (name, seed), categories in sets.items():
        for category in categories:
            metrics = measure(trunk, category)
            every[f"{name}/{seed}/{category.name}"] = metrics
            for metric, value in metrics.items():
                pooled[name][metric].append(value)
    means = {}
    for name, metrics in pooled.items():
        found = {metric: float(np.mean(v)) for metric, v in metrics.items()}
        types = [v for k, v in found.items() if k not in (LOCAL, GLOBAL, PIXEL)]
        means[name] = found | {"mean": float(np.mean(types))}
    return {"means": means, "categories": every}


def print_row(spec: str, row: dict, *, header: bool) -> None:
    """A line of the table, in percent."""
    columns = [
        (name, metric, value)
        for name, metrics in row["means"].items()
        for metric, value in metrics.items()
    ]
    width = 30
    if header:
        print(f"{'image AUROC in %, measure ' + _MEASURE.value:{width}}", end="")
        for name, metric, _ in columns:
            print(f" {name[:6] + '/' + metric[:7]:>14}", end="")
        print("  seconds")
    print(f"{spec[-width:]:{width}}", end="")
    print("".join(f" {100 * value:14.1f}" for *_, value in columns), end="")
    print(f"  {row['seconds']:7.1f}", flush=True)


if __name__ == "__main__":
    app.run(main)
