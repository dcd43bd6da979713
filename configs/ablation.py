"""The paper's ablation: `--config=configs/ablation.py:<config>[:<categories>]`."""

from ml_collections import ConfigDict

from configs import sweep
from ulsad_jax.trunks import base as trunks

LAMBDAS = {"0": 0.0, "1_4": 0.25, "3_4": 0.75, "1": 1.0}  # 1/2 is the full system
# timm's repositories of other trunks, where the config's comes from there, too.
TRUNKS = {"resnet18": "timm/resnet18.a1_in1k", "resnet50": "timm/resnet50.a1_in1k"}
TERMS = ("local", "attention", "consistency")


def get_config(base: str = "quickstart") -> ConfigDict:
    """Returns one variant for each thing that the paper varies, with three seeds.

    The full system is ULSAD alone with the published output activation, whatever the
    base has. Fusions are compared in every variant; features are whitened in all but
    one where the trunk is built in. DFR is the local term alone without cosine; its
    maps are the local ones.

    Args:
        base: see configs/sweep.py.
    """
    config = sweep.get_config(base)
    config.method = "ulsad"
    config.model.output_activation = "relu"
    config.score.fusion, config.score.top_share = "map", 0.0
    layers = trunks.find(config.trunk.architecture).layers
    config.sweep.fusions = True
    config.evaluation.original_resolution = False
    config.evaluation.pictures_per_type = 2
    variants = {
        "full": {},
        "dfr": {
            "losses": {
                "local": {"cosine_weight": 0.0},
                "attention": {"weight": 0.0},
                "consistency": {"weight": 0.0},
            }
        },
        "no_attention": {"losses": {"attention": {"weight": 0.0}}},
        "no_consistency": {"losses": {"consistency": {"weight": 0.0}}},
        **{name: {"trunk": {"layers": name}} for name in layers.split("+")},
        "random_trunk": {"trunk": {"source": "random"}},
        "identity_output": {"model": {"output_activation": "identity"}},
    }
    for name, value in LAMBDAS.items():
        losses = {term: {"cosine_weight": value} for term in TERMS}
        variants[f"lambda_{name}"] = {"losses": losses}
    if config.trunk.source == "hub":
        for name, repository in TRUNKS.items():
            trunk = {"source": "hub", "architecture": name, "repository": repository}
            variants[f"trunk_{name}"] = {"trunk": trunk}
    if config.trunk.source == "builtin":
        variants["not_whitened"] = {"trunk": {"whiten": "never"}}
        variants["random_trunk"]["trunk"]["whiten"] = "always"
    config.sweep.variants = ConfigDict(variants)
    return config
