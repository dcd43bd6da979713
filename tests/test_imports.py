"""What a machine with JAX alone must be able to import."""

import subprocess
import sys

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


def test_the_maths_and_the_step_need_jax_alone():
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
