"""Trains and evaluates: `python train.py --config=configs/<file>.py:<category> ...`."""

import sys
import traceback
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
    from ulsad_jax import errors

    with errors.reported():
        from ulsad_jax import experiment  # not for --help: JAX takes seconds

        print(experiment.train(_CONFIG.value, Path(_WORKDIR.value).expanduser()))


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a config file or a field that is not there is one message."""
    try:
        arguments = app.parse_flags_with_usage(argv)
        _ = _CONFIG.value.seed  # fails here if the file could not be read
        return arguments
    except (AttributeError, LookupError, OSError, SyntaxError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "get_config" for frame in frames):
            raise  # an error of the config file's own
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        found = error.args[0] if isinstance(error, KeyError) else error
        sys.exit(
            "error: Expected a config file, --config=<file>.py[:<category>], and "
            f"fields of it, --config.<field>=<value>, found: {found}. See README, "
            "section Configuration; configs/default.py has every field."
        )


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
