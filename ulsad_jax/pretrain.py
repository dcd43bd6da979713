"""Pretrains a trunk on drawn images.

    python -m ulsad_jax.pretrain --config=configs/pretrain.py --workdir=runs/trunk

The same command resumes. The trunk is trunk.safetensors in the work directory.
"""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from ulsad_jax import command_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main(argv: list[str]) -> None:
    """Runs, and says where the trunk is."""
    command_line.begin(argv)
    from ulsad_jax import errors

    with errors.reported():
        from ulsad_jax.pretraining import loop  # not for --help: JAX takes seconds

        print(loop.run(_CONFIG.value, Path(_WORKDIR.value).expanduser()))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=lambda argv: command_line.parse(argv, _CONFIG))
