"""What the short commands do not import: a text is filled in about the time that PyTorch takes to start."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import make_model

from asarm import TextTokenizer
from asarm.errors import TextError
from asarm.infilling import score_text

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


def test_what_is_wrong_with_a_text_is_said_before_anything_is_loaded():
    """Whatever the model: nothing of it is read, and PyTorch is not imported."""
    mistakes = {
        ("infill", "--text", "nothing to fill"): "no <mask>",
        ("infill", "--text", "a <mask:0>"): "at least one token",
        ("score", "--text", "a <mask> b <mask>", "--fills", "x"): "has 2 gap(s) and 1 fill(s)",
        ("score", "--text", "a <mask> b <mask>"): "has 2 gap(s) and 0 fill(s)",
        ("score", "--text", "a <mask><mask:2>", "--fills", "x", "y"): "has 1 gap(s) and 2 fill(s)",
        ("score", "--text", "a <mask>", "--fills", ""): "fill '' has no token",
        ("score", "--text", "no gap", "--fills", "x"): "no <mask>",
        ("score", "--text", "-"): "the text to score has no token",
        ("score", "--text", ""): "text, data_file must be one of the two",
    }
    script = f"""
import io, sys
from asarm.cli import main
for command in {list(mistakes)}:
    sys.stdin = io.StringIO("\\n")
    print(main([*command, "--model", "no/such-model"]))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2"] * len(mistakes), done.stderr
    for line, message in zip(done.stderr.splitlines(), mistakes.values(), strict=True):
        assert message in line


@pytest.mark.parametrize(
    ("text", "fills"),
    [("a <mask> b <mask>", ["x"]), ("a <mask>", ["x", "y"]), ("no gap", ["x"]), ("", []), ("a <mask>", [""])],
)
def test_from_python_the_same_is_refused(text, fills):
    with pytest.raises(TextError):
        score_text(*small_model(), text, fills)


def test_gaps_side_by_side_take_one_fill():
    assert score_text(*small_model(), "a <mask><mask:2> b", [" dog"]).tokens == [" dog"]


def small_model():
    return make_model(vocab_size=8192, mask_token_id=6), TextTokenizer.from_pretrained("tiny-english")
