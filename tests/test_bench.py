"""The decoding benchmark, on a small model."""

import json

import pytest
import torch

from asarm.bench.config import BenchDecodeConfig
from asarm.bench.decode import round_seconds
from asarm.cli import main
from asarm.errors import ConfigError
from asarm.loading import load
from asarm.sampling import sample as sample_module


def test_the_last_line_is_json_and_agrees_with_itself(capsys):
    arguments = (
        "--size tiny-english --length 256 --rounds 1 --batch_sizes 1,2 --dtypes float32 --memory_lengths 128 256"
    )
    words = ["bench", "decode", *arguments.split(), "--acceptance_sequences", "2", "--no_baseline"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    rows = {(row["sampler"], row["batch_size"]): row for row in result["rows"]}
    assert len(rows) == 10
    for (name, batch_size), row in rows.items():
        for key in ("round_seconds", "call_seconds", "streaming_seconds", "stored_streaming_seconds"):
            assert row[key] > 0
        assert row["seconds_per_token"] * row["tokens_per_second"] == pytest.approx(1)
        rounds = result["acceptance"][name]["rounds"]
        assert row["seconds_per_token"] == pytest.approx(row["round_seconds"] * rounds / batch_size)
        assert row["nfe_per_token"] <= 1
    assert [row["batch_size"] for row in result["draft_steps"]] == [1, 2]
    assert all(row[way] > 0 for row in result["draft_steps"] for way in ("low_rank", "full", "frequent"))
    assert all(row["peak"] > 0 and row["weights"] > 2**20 for row in result["memory"])
    assert sum(line.startswith("| float32") for line in lines) == 10 + 2 + 2


def test_only_the_asked_for_rounds_are_played(monkeypatch):
    played = []
    original = sample_module.ROUNDS["sequential"]
    monkeypatch.setitem(
        sample_module.ROUNDS, "sequential", lambda state: (played.append(int(state.settled_B[0])), original(state))
    )
    config = BenchDecodeConfig(size="tiny-english", length=100, masked_fraction=0.8, rounds=3, k=1)
    model, _ = load("tiny-english")
    seconds, call_seconds = round_seconds(config, model, "sequential", 2, point=0.5)
    assert seconds > 0 and call_seconds > 0
    assert played == list(range(60, 60 + 2 + 2 * 3))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtypes": ["float16"]}, "dtypes must be float32 or bfloat16, got 'float16'"),
        ({"batch_sizes": [0]}, "batch_sizes must be at least 1, got 0"),
        ({"masked_fraction": 0.0}, r"masked_fraction must be in \(0, 1\], got 0.0"),
        ({"memory_lengths": [64]}, "memory_lengths must be at least 120 with k = 5, got 64"),
        ({"samplers": ["best"]}, "'best'"),
        ({"rounds": 40}, "rounds must be fewer: they draw up to 492 tokens where 97 are left, got 40"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BenchDecodeConfig(**settings)
