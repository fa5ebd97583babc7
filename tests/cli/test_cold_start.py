"""What the short commands do not import: a text is filled in about the time that PyTorch takes to start."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

# PyTorch's compiler and what it needs, PyTorch's sharding, SciPy, and what of Hugging Face's libraries training and
# other models need: each takes from a tenth of a second to a second
HEAVY = (
    *("torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "mpmath"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"),
    *("scipy", "pandas", "pyarrow", "datasets", "matplotlib", "wandb"),
    *("accelerate", "transformers.modeling_utils", "transformers.generation.utils", "transformers.activations"),
    *("transformers.loss", "transformers.quantizers", "transformers.integrations.accelerate"),
)
SHORT = (
    ("infill", "--text", "Tom lost his <mask:2>."),
    ("infill", "--text", "Tom lost his <mask:2>.", "--sampler", "assd-head"),
    ("score", "--text", "Tom lost his <mask>.", "--fills", " toy"),
)


def test_a_short_command_imports_nothing_heavy_that_it_does_not_use():
    script = f"""
import json, sys
from asarm.cli import main
for command in {SHORT}:
    assert main(list(command)) == 0
print(json.dumps([name for name, module in sys.modules.items() if module is not None]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "asarm.network", "asarm.draft_head"} <= imported
    assert not imported & {*HEAVY, "asarm.model"}


@pytest.mark.parametrize("name", HEAVY)
def test_the_list_is_of_modules_that_there_are(name):
    """A name that moved would make the test above pass for nothing."""
    assert find_spec(name) is not None
