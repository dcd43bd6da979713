"""Exports a category: `python -m ulsad_jax.export --workdir=RUN --output=FILE`.

The file holds everything that turns images into decisions, and needs only JAX: see
docs/predict_and_export.md. The exit status is 0 if the file was written, 1 if it was
not, and 2 for wrong flags.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ulsad_jax.command_line import add_run_arguments, as_path


def main(arguments: list[str]) -> None:
    """Exports a category and prints the path and size of the file."""
    flags = parse(arguments)
    from ulsad_jax.runtime import errors

    with errors.reported():
        from ulsad_jax import artifact
        from ulsad_jax.runs import saved

        check_output(flags.output)
        platforms = tuple(dict.fromkeys(flags.platforms.split(",")))
        if not set(platforms) <= set(artifact.PLATFORMS):
            raise errors.UserError(
                f"Expected --platforms to be some of {','.join(artifact.PLATFORMS)}, "
                f"separated by commas, found {flags.platforms!r}. Name some of them."
            )
        run = saved.load_run(
            flags.workdir,
            flags.category,
            selection=flags.selection,
            image_threshold=flags.image_threshold,
            pixel_threshold=flags.pixel_threshold,
        )
        if flags.weights:
            artifact.write_weights(run, flags.output)
        else:
            artifact.write(run, flags.output, platforms)
    size = flags.output.stat().st_size / 1e6
    print(f"{run.category}, step {run.step}: {flags.output} ({size:.1f} MB)")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line; exits with status 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m ulsad_jax.export", allow_abbrev=False, description=__doc__
    )
    add_run_arguments(parser)
    add = parser.add_argument
    add("--output", required=True, type=as_path, help="File to write.")
    add("--platforms", default="cpu,cuda,tpu", help="To export for; also rocm.")
    add(
        "--weights",
        action="store_true",
        help="Write the weights alone, .safetensors, for ulsad_jax.export_onnx.",
    )
    return parser.parse_args(arguments)


def check_output(path: Path) -> None:
    """Checks that the output file can be written, before anything is computed.

    Raises:
        UserError: the parent folder does not exist, or the path is a folder.
    """
    from ulsad_jax.runtime.errors import UserError

    if path.is_dir() or not path.parent.is_dir():
        found = "a folder" if path.is_dir() else "no such folder"
        raise UserError(
            f"Expected --output to be a file in a folder that is there, found {found} "
            f"at {path if path.is_dir() else path.parent}. Make the folder, or name "
            "another file."
        )


if __name__ == "__main__":
    main(sys.argv[1:])
