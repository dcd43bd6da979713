"""What a machine with JAX alone must be able to import."""

import subprocess
import sys

import pytest

from tests import runs

COMMANDS = {
    "train.py": "run_path",
    "eval.py": "run_path",
    "ulsad_jax.predict": "run_module",
    "ulsad_jax.export": "run_module",
    "ulsad_jax.export_onnx": "run_module",
    "ulsad_jax.inspect_losses": "run_module",
}
HELP = """
import runpy, sys

sys.argv = [{name!r}, "--help"]
try:
    runpy.{run}({name!r}, run_name="__main__")
except SystemExit as stopped:
    print("imported", *sorted(sys.modules))
    sys.exit(stopped.code)
"""

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
from ulsad_jax.runtime import checkpoint
from ulsad_jax.trunks import features
from ulsad_jax.methods.ulsad import losses
from ulsad_jax.scoring import calibration as scoring
from ulsad_jax.trunks import torch_names as torch_import
from ulsad_jax.runs import steps
from ulsad_jax.trunks import pyramid
from ulsad_jax.methods import base, padim
from ulsad_jax.methods.ulsad import method
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
from ulsad_jax import artifact, export
from ulsad_jax.runtime import errors
from ulsad_jax.runtime import files
"""


@pytest.mark.parametrize("program", [PROGRAM, ONNX], ids=["maths", "onnx"])
def test_what_is_needed(program):
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
    """JAX alone takes seconds."""
    program = HELP.format(run=COMMANDS[name], name=name)
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=runs.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    shown, _, modules = ran.stdout.partition("imported ")
    assert ran.returncode in (0, 1), ran.stderr  # 1 is absl's
    assert "--" in shown + ran.stderr
    heavy = {"jax", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets"}
    heavy |= {"grain", "numpy", "scipy", "matplotlib", "onnx", "torch"}
    assert modules
    assert not heavy & set(modules.split())
