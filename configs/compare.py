"""Compares methods: `--config=configs/compare.py:<config>[:<categories>]`."""

from ml_collections import ConfigDict

from configs import sweep

# Each with its own defaults. Whitening would leave PCA no directions to choose from.
# As published, EfficientAD's teacher learns standardised features, and a batch is one
# image.
# DRAEM has an eighth of its channels, with which a CPU can train it.
METHODS = {
    "ulsad": {},
    "padim": {},
    "patchcore": {},
    "pca": {"trunk": {"whiten": "never"}},
    "dfr": {},
    "rd": {},
    "fastflow": {},
    "cflow": {},
    "efficientad": {"trunk": {"whiten": "never"}, "train": {"batch_size": 1}},
    "draem": {"methods": {"draem": {"repair_width": 16, "segment_width": 8}}},
}


def get_config(base: str = "quickstart") -> ConfigDict:
    """Returns a variant for each method, on the same data and trunk, with three seeds.

    An image's score is the maximum of its map in all of them. The methods that train
    have the base's number of updates.

    Args:
        base: see configs/sweep.py.
    """
    config = sweep.get_config(base)
    config.score.fusion, config.score.top_share = "map", 0.0
    config.evaluation.pictures_per_type = 2
    config.sweep.costs = True
    variants = {name: {"method": name, **own} for name, own in METHODS.items()}
    config.sweep.variants = ConfigDict(variants)
    return config
