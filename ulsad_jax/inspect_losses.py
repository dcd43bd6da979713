"""Prints the value and gradient of each loss term before training.

    python -m ulsad_jax.inspect_losses --config=configs/<file>.py:<category> ...

Values, shares and gradient norms are those of the first training batch, with the
initial weights.
"""

from absl import app, flags
from ml_collections import config_flags

from ulsad_jax import command_line

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with the category after a colon.", lock_config=True
)
_STEP = flags.DEFINE_integer(
    "step", 0, "Updates so far, as terms with a schedule are told.", lower_bound=0
)
_JSON = flags.DEFINE_boolean("json", False, "Print JSON instead of a table.")


def main(argv: list[str]) -> None:
    """Prints the table; fails if training with a term is not possible."""
    command_line.begin(argv)
    from ulsad_jax.runtime import errors

    with errors.reported():
        import json

        from ulsad_jax.runs import loss_inspection

        document = loss_inspection.inspect(_CONFIG.value, step=_STEP.value)
        if _JSON.value:
            print(json.dumps(document, indent=2))
        else:
            print(loss_inspection.table(document))
        if document["error"]:
            raise errors.UserError(document["error"])


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=lambda argv: command_line.parse(argv, _CONFIG))
