"""What the command-line programs that take a config share."""

from __future__ import annotations

import sys
import traceback

from absl import app, flags, logging


def refuse_arguments(argv: list[str]) -> None:
    """Takes flags alone; libraries, which tell every step they take, are silenced."""
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags alone, found {' '.join(argv[1:])!r}.")
    logging.set_verbosity(logging.WARNING)


def parse(argv: list[str], config: flags.FlagHolder) -> list[str]:
    """Parses the flags; a config file or a field that is not there is one message."""
    try:
        arguments = app.parse_flags_with_usage(argv)
        _ = config.value.seed  # fails here if the file could not be read
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
