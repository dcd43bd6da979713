"""A grid of trainings: `--config=configs/sweep.py:<config>[:<categories>]`."""

import importlib

from ml_collections import ConfigDict


def get_config(base: str = "quickstart") -> ConfigDict:
    """Returns another config, to be trained with three seeds.

    Args:
        base: a file of configs/ without .py, and what it takes after a colon, as
            "mvtec_ad:bottle,cable". Each category has members of its own.
    """
    name, _, argument = base.partition(":")
    module = importlib.import_module(f"configs.{name}")
    return add_sweep(module.get_config(argument) if argument else module.get_config())


def add_sweep(config: ConfigDict) -> ConfigDict:
    """Adds a grid over a config's fields, with three seeds in it."""
    config.sweep = ConfigDict({"grid": _no_values(config)})
    # The values to train with, of any field: all combinations. The fields of this
    # tree are those of the config itself; () leaves the config's own value.
    config.sweep.grid.seed = (0, 1, 2)
    # Named changes of fields, {name: {field: value}} in the same tree: each is trained
    # with all of the grid. None is the same as one that changes nothing.
    config.sweep.variants = ConfigDict()
    # Whether to score the test images by other fusions, too: every map and score alone,
    # and the mean of raw maps.
    config.sweep.fusions = False
    # Whether to measure what members cost. Each is then trained alone, on one device,
    # and the three fields below are not used.
    config.sweep.costs = False
    # How members are trained together: "vmap" at once, "loop" in turn through the same
    # program. Empty is "vmap", but "loop" on CPUs, where it is faster.
    config.sweep.backend = ""
    # Gibibytes that the members trained at once may take of each device, and their
    # features of the host. 0 is half of what the device has, a quarter of the host's.
    config.sweep.device_memory = 0.0
    config.sweep.host_memory = 0.0
    return config


def _no_values(fields: ConfigDict) -> ConfigDict:
    """The same tree with () for every value."""
    return ConfigDict(
        {
            name: _no_values(value) if isinstance(value, ConfigDict) else ()
            for name, value in fields.items()
        }
    )
