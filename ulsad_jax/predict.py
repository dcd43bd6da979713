"""Predicts images: `python -m ulsad_jax.predict --workdir=RUN INPUT... --output=DIR`.

The exit status is 0 if every image was predicted, 1 if some could not be predicted, and
2 if the arguments are wrong and nothing was predicted.
"""

from __future__ import annotations

import argparse
import sys

from ulsad_jax.command_line import add_run_arguments, as_path
from ulsad_jax.runtime import host_memory


def main(arguments: list[str]) -> int:
    """Predicts the images and returns the exit status."""
    flags = parse(arguments)
    host_memory.keep_freed()
    from ulsad_jax.runtime import errors

    with errors.reported(stopped="Stopped. Images that have a row are finished."):
        # Imported here, because JAX takes seconds, which --help need not wait for.
        from ulsad_jax import predictions
        from ulsad_jax.detector import Detector
        from ulsad_jax.runs import config as config_lib
        from ulsad_jax.runs import folder
        from ulsad_jax.runtime import compilation

        try:
            inputs = predictions.find_inputs(flags.inputs)
            predictions.check_output(flags.output, inputs)
            config = config_lib.load(flags.workdir / folder.CONFIG)
            compilation.keep(config.dataset.cache_dir)
            detector = Detector.load(
                flags.workdir,
                flags.category,
                selection=flags.selection,
                image_threshold=flags.image_threshold,
                pixel_threshold=flags.pixel_threshold,
                batch_size=flags.batch_size,
            )
        except errors.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        kinds = {kind: getattr(flags, kind) for kind in ("overlays", "masks", "maps")}
        try:
            counts = predictions.predict_files(detector, inputs, flags.output, **kinds)
        except predictions.OutputTaken as error:  # taken since the check above
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(
        f"{counts.images} images, {counts.anomalous} anomalous, {counts.failed} failed."
        f" Rows: {flags.output / predictions.CSV}, {flags.output / predictions.JSON}"
    )
    return 1 if counts.failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line; exits with status 2 if it is wrong.

    It uses argparse instead of absl, because argparse allows inputs between the flags
    and exits with that status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ulsad_jax.predict", allow_abbrev=False, description=__doc__
    )
    add_run_arguments(parser)
    add = parser.add_argument
    text = "Image, folder (links to folders are followed, too), or quoted glob."
    add("inputs", nargs="+", metavar="INPUT", help=text)
    add("--output", required=True, type=as_path, help="New or empty folder.")
    add("--overlays", action="store_true", help="Write overlays/: heatmap and outline.")
    add("--masks", action="store_true", help="Write masks/: 0 or 255, .png.")
    add("--maps", action="store_true", help="Write maps/: float32 .tiff.")
    add("--batch_size", type=int, help="Images at once, not config.evaluation's.")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
