"""Evaluates a run again: `python eval.py --workdir=<folder of the run>`."""

from pathlib import Path

from absl import app, flags

from ulsad_jax import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that train.py wrote.")
_ROOT = flags.DEFINE_string("root", "", "Folder of the data set, if it moved.")
_SELECTION = flags.DEFINE_enum(
    "selection",
    None,
    command_line.SELECTIONS,
    "Another checkpoint than the config's.",
)
_IMAGE_THRESHOLD = flags.DEFINE_float(
    "image_threshold", None, "Score above which images are anomalous, not the run's."
)
_PIXEL_THRESHOLD = flags.DEFINE_float(
    "pixel_threshold", None, "Map value above which pixels are, not the run's."
)
_WRITE_MAPS = flags.DEFINE_boolean(
    "write_maps", False, "Write maps as .tiff, as config.evaluation.write_maps does."
)
_JOIN = command_line.define_processes()
flags.mark_flags_as_required(["workdir"])


def main(argv: list[str]) -> None:
    """Evaluates, and prints the table of results."""
    command_line.begin(argv)
    from ulsad_jax.runtime import errors

    with errors.reported(), _JOIN():
        from ulsad_jax.runs import run as experiment

        workdir = Path(_WORKDIR.value).expanduser()
        printed = experiment.evaluate(
            workdir,
            root=_ROOT.value,
            selection=_SELECTION.value or "",
            image_threshold=_IMAGE_THRESHOLD.value,
            pixel_threshold=_PIXEL_THRESHOLD.value,
            write_maps=_WRITE_MAPS.value,
        )
        print(printed)


if __name__ == "__main__":
    app.run(main)
