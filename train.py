"""Trains and evaluates: `python train.py --config=configs/<file>.py:<category> ...`."""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from ulsad_jax import command_line

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with the category after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same command resumes it."
)
_JOIN = command_line.define_processes()
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Runs, and prints the table of results."""
    command_line.begin(argv)
    from ulsad_jax.runtime import errors

    config, workdir = _CONFIG.value, Path(_WORKDIR.value).expanduser()
    with errors.reported(), _JOIN():
        if "sweep" in config:  # imported here, not for --help: JAX takes seconds
            from ulsad_jax.sweep.run import train
        else:
            from ulsad_jax.runs.run import train
        print(train(config, workdir))


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command_line.parse(argv, _CONFIG))
