"""What a machine with JAX alone must be able to import."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys

unwanted = {"sklearn", "scipy.ndimage", "tensorflow", "torch", "tensorflow_datasets"}
unwanted |= {"grain", "PIL", "ml_collections", "tqdm", "matplotlib", "tensorboardX"}
unwanted |= {"safetensors", "huggingface_hub", "array_record", "jaxtyping"}


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in unwanted:
            raise ImportError(f"{name} is not on a machine with JAX alone")


sys.meta_path.insert(0, Refuse())
from ulsad_jax import checkpoint, features, losses, scoring, torch_import, training
from ulsad_jax.models import pyramid, ulsad
"""

ONNX = """
import sys

unwanted = {"orbax", "tensorflow_datasets", "grain", "array_record", "PIL", "sklearn"}
unwanted |= {"ml_collections", "tqdm", "matplotlib", "huggingface_hub", "jaxtyping"}


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in unwanted:
            raise ImportError(f"{name} is not where ONNX is made")


sys.meta_path.insert(0, Refuse())
from ulsad_jax import artifact, errors, export, files
"""


@pytest.mark.parametrize("program", [PROGRAM, ONNX], ids=["maths", "onnx"])
def test_what_is_needed(program):
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
