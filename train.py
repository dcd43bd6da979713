"""Trains and evaluates: `python train.py --config=configs/<file>.py:<category> ...`."""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with the category after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same command resumes it."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Runs, and prints the table of results."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags alone, found {' '.join(argv[1:])!r}.")
    logging.set_verbosity(logging.WARNING)  # libraries tell every step they take
    from ulsad_jax import errors, experiment  # not for --help: JAX takes seconds

    with errors.reported():
        print(experiment.train(_CONFIG.value, Path(_WORKDIR.value).expanduser()))


if __name__ == "__main__":
    app.run(main)
