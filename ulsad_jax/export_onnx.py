"""Exports to ONNX: `python -m ulsad_jax.export_onnx --weights=FILE --output=FILE.onnx`.

Needs jax2onnx and onnxruntime, in a separate environment, because jax2onnx requires an
older Orbax than training does. The weights come from
`python -m ulsad_jax.export --weights`, run in the usual environment. The ONNX model is
compared with JAX before it is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4  # share of the largest value of an output
BATCHES = (1, 3, 8)  # batch sizes to compare with


def main(arguments: list[str]) -> None:
    """Converts the weights, compares the model with JAX and writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m ulsad_jax.export_onnx", allow_abbrev=False, description=__doc__
    )
    parser.add_argument("--weights", required=True, type=Path, help=".safetensors")
    parser.add_argument("--output", required=True, type=Path, help=".onnx to write.")
    flags = parser.parse_args(arguments)
    from ulsad_jax import export
    from ulsad_jax.runtime import errors, files

    with errors.reported():
        export.check_output(flags.output)
        from ulsad_jax import artifact

        metadata, weights = artifact.read_weights(flags.weights)
        function = artifact.make_function(metadata, weights)
        content = convert(function, metadata)
        differences = compare(content, function, tuple(metadata["image_size"]))
        print("\n".join(f"{name:18}{value:.1e}" for name, value in differences.items()))
        if not all(value <= TOLERANCE for value in differences.values()):
            raise errors.UserError(
                f"Expected onnxruntime to agree with JAX within {TOLERANCE:.0e} of the "
                "largest value, found the differences above. Nothing was written; try "
                "another version of jax2onnx or onnxruntime."
            )
        files.replace(flags.output, content)
    print(f"{flags.output} ({len(content) / 1e6:.1f} MB)")


def convert(function: Callable, metadata: Mapping[str, Any]) -> bytes:
    """Returns a serialised ONNX model for any batch size.

    The input is called "image"; outputs have the names that `function` gives them.

    Args:
        function: function from images to arrays, see `artifact.make_function`.
        metadata: JSON object to store in the model, under "ulsad_jax".
    """
    import jax
    import jax.numpy as jnp
    from jax.extend.core import jaxpr_as_fun
    from jax2onnx import to_onnx

    from ulsad_jax.nn import convolution

    (batch,) = jax.export.symbolic_shape("b")
    image = jax.ShapeDtypeStruct((batch, *metadata["image_size"], 3), jnp.uint8)
    # Traced here, because jax2onnx would replace Flax's layers by its own.
    with convolution.plain():
        jaxpr, outputs = jax.make_jaxpr(function, return_shape=True)(image)
    model = to_onnx(
        jaxpr_as_fun(jaxpr),
        [image],
        model_name="ulsad",
        input_names=["image"],
        output_names=sorted(outputs),  # JAX sorts the keys of a dictionary
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = "ulsad_jax", json.dumps(metadata)
    return model.SerializeToString()


def compare(
    content: bytes, function: Callable, image_size: tuple[int, int]
) -> dict[str, float]:
    """Returns the largest error of every output, as a share of its largest value.

    Args:
        content: serialised ONNX model.
        function: JAX function that the model has to agree with.
        image_size: (height, width) in pixels.
    """
    import jax
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    rng, differences = np.random.default_rng(0), dict.fromkeys(names, 0.0)
    for count in BATCHES:
        images = rng.integers(0, 256, (count, *image_size, 3), np.uint8)
        expected = jax.device_get(jax.jit(function)(images))
        given = session.run(names, {"image": images})
        for name, found in zip(names, given, strict=True):
            wanted = expected[name].astype(np.float64)
            difference = np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-9)
            # max() would drop NaN.
            differences[name] = float(np.maximum(differences[name], difference))
    return differences


if __name__ == "__main__":
    main(sys.argv[1:])
