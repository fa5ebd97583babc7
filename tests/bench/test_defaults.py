"""What the benchmarks time unless told otherwise, and how far they say they are."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config

from asarm.bench import baselines, dtypes
from asarm.bench import run as run_module
from asarm.bench import train as train_module
from asarm.bench.config import ARCHITECTURES, BenchDecodeConfig, BenchTrainConfig
from asarm.bench.decode import Halfway, round_seconds
from asarm.cli import main
from asarm.engine import Engine
from asarm.loading import load

CPU = torch.device("cpu")
TINY = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 30}


@pytest.fixture(params=[False, True], ids=["emulates bfloat16", "multiplies bfloat16"])
def native(request, monkeypatch):
    """Whether this machine multiplies bfloat16, whatever it does."""
    monkeypatch.setattr(dtypes, "multiplies_bfloat16", lambda device: request.param)
    return request.param


def test_emulated_types_are_left_out_unless_named(native, capsys):
    assert dtypes.timed_dtypes([], CPU) == ["float32", "bfloat16"][: 1 + native]
    assert ("bfloat16 is left out" in capsys.readouterr().err) != native
    assert dtypes.timed_dtypes(["bfloat16"], CPU) == ["bfloat16"]
    assert capsys.readouterr().err == ""


def test_a_processor_that_is_told_to_be_one_with_avx2_emulates_bfloat16():
    """The question follows the settings of PyTorch's libraries, and not the machine alone."""
    script = (
        "import torch; from asarm.engine import can_pack, multiplies_bfloat16; cpu = torch.device('cpu');"
        "print(multiplies_bfloat16(cpu), can_pack(cpu, torch.bfloat16))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["False", "False"]


def test_the_training_bench_leaves_them_out_too(native, monkeypatch):
    def side_by_side(config, folder, dtype):
        systems = (train_module.OURS, train_module.THEIRS)
        row = {"dtype": dtype, "step_seconds": 1.0, "step_flop": 1, "product_flop_per_second": 1.0}
        return [row | {"system": system} for system in systems]

    monkeypatch.setitem(ARCHITECTURES, "xlnet-base", TINY)
    monkeypatch.setattr(train_module, "_side_by_side", side_by_side)
    result = train_module.bench(BenchTrainConfig())
    assert list(dict.fromkeys(row["dtype"] for row in result["rows"])) == ["float32", "bfloat16"][: 1 + native]
    assert result["config"]["dtypes"] == ["float32", "bfloat16"][: 1 + native]


def test_one_bar_over_all_cells_and_one_line_of_json(native, monkeypatch, capsys):
    ran = []

    def stand_in(name):
        def run(self, *arguments):
            ran.append((name, *arguments))
            if name == "_begin":
                self.dtype = arguments[0]
            if name == "_time_sampler":
                row = dict.fromkeys(("streaming_seconds", "stored_streaming_seconds", "uncached_call_seconds"), 1.0)
                row |= dict.fromkeys(("round_seconds", "call_seconds", "nfe_per_token"), 1.0)
                row |= {"seconds_per_token": 1.0, "tokens_per_second": 1.0}
                self.rows.append({"dtype": self.dtype, "batch_size": arguments[0], "sampler": arguments[1]} | row)

        return run

    for name in ("_accept", "_begin", "_time_sampler", "_time_gpt2", "_measure_memory"):
        monkeypatch.setattr(run_module.Bench, name, stand_in(name))
    monkeypatch.setattr(run_module, "require_draft_heads", lambda config: None)
    assert main(["bench", "decode"]) == 0
    shown = capsys.readouterr()
    config, types = BenchDecodeConfig(), ["float32", "bfloat16"][: 1 + native]
    assert json.loads(shown.out.splitlines()[-1])["config"]["dtypes"] == types
    assert "100%" in shown.err and " left" in shown.err
    expected = [("_accept",)]
    for dtype in types:
        expected.append(("_begin", dtype))
        for batch_size in config.batch_sizes:
            expected += [("_time_sampler", batch_size, name) for name in config.samplers]
            expected.append(("_time_gpt2", batch_size))
    assert ran == [*expected, *(("_measure_memory", dtype, 512) for dtype in types)]


def test_rounds_are_timed_without_computing_their_prompts(monkeypatch):
    kept = []

    class Kept(Halfway):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(Engine, "prefill", lambda *_: pytest.fail("a prompt was computed"))
    model, _ = load("tiny-english")
    config = BenchDecodeConfig(size="tiny-english", length=100, masked_fraction=0.8, rounds=1, k=1)
    assert min(round_seconds(config, model, "assd", 2, 0.5, Kept)) > 0
    prompt_LB2HSD = kept[0].cache.key_value_LB2HSD[..., :60, :]  # 20 given, and half of 80
    assert 0.9 < prompt_LB2HSD.std() < 1.1 and (prompt_LB2HSD != 0).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_gpt2_reads_its_prompt_once_and_then_a_token_at_a_time(monkeypatch, batch_size):
    small = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    monkeypatch.setattr(baselines, "GPT2Config", lambda: small)
    model, shapes, lengths = baselines.gpt2(CPU, torch.float32), [], []
    forward = model.forward

    def noted(input_ids, *arguments, past_key_values=None, **settings):
        shapes.append(tuple(input_ids.shape))
        lengths.append(0 if past_key_values is None else past_key_values.get_seq_length())
        return forward(input_ids, *arguments, past_key_values=past_key_values, **settings)

    monkeypatch.setattr(model, "forward", noted)
    baselines.gpt2_token_seconds(model, 64, batch_size)
    assert shapes[0] == (1, 31) and set(shapes[1:]) == {(batch_size, 1)}
    assert len(shapes) == 1 + 3 * (baselines.GPT2_TOKENS + 1) + 3
    assert lengths[1 : baselines.GPT2_TOKENS + 2] == list(range(31, 31 + baselines.GPT2_TOKENS + 1))
