"""The decoding benchmark, on a small model."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from asarm.bench import run as run_module
from asarm.bench import train as train_bench
from asarm.bench.config import ARCHITECTURES, BenchDecodeConfig, BenchTrainConfig
from asarm.bench.decode import round_seconds
from asarm.cli import main
from asarm.errors import ConfigError
from asarm.loading import load
from asarm.samplers import SAMPLERS

SYSTEMS = (train_bench.OURS, train_bench.THEIRS)


@pytest.mark.slow
def test_the_last_line_is_json_and_agrees_with_itself(capsys):
    arguments = (
        "--size tiny-english --length 256 --rounds 1 --batch_sizes 1,2 --dtypes float32 --memory_lengths 160 256"
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
    original = SAMPLERS["sequential"]

    def noted(state):
        played.append(int(state.settled_B[0]))
        original.play_round(state)

    monkeypatch.setitem(SAMPLERS, "sequential", replace(original, round=noted))
    config = BenchDecodeConfig(size="tiny-english", length=100, masked_fraction=0.8, rounds=3, k=1)
    model, _ = load("tiny-english")
    seconds, call_seconds = round_seconds(config, model, "sequential", 2, point=0.5)
    assert seconds > 0 and call_seconds > 0
    assert played == list(range(60, 60 + 1 + 3 + 1))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtypes": ["float16"]}, "dtypes must be float32 or bfloat16, got 'float16'"),
        ({"batch_sizes": [0]}, "batch_sizes must be at least 1, got 0"),
        ({"masked_fraction": 0.0}, r"masked_fraction must be in \(0, 1\], got 0.0"),
        ({"memory_lengths": [64]}, "memory_lengths must be at least 120 with k = 5, got 64"),
        ({"memory_lengths": [50], "k": 1}, "memory_lengths must be at least 64 with k = 1, got 50"),
        ({"samplers": ["best"]}, "'best'"),
        ({"samplers": ["assd:5"]}, "samplers must be without a k of their own.*, got 'assd:5'"),
        ({"num_threads": -1}, "num_threads must be at least 1, got -1"),
        ({"rounds": 40}, "rounds must be fewer: they draw up to 264 tokens where 122 are left, got 40"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BenchDecodeConfig(**settings)


@pytest.mark.parametrize("setting", ["size", "acceptance_model"])
def test_a_missing_draft_head_is_an_error_before_anything_is_measured(setting, monkeypatch):
    for name in ("acceptance_of", "model_of"):
        monkeypatch.setattr(run_module, name, lambda *_: pytest.fail("measured first"))
    config = BenchDecodeConfig(**{"size": "tiny-english"} | {setting: "tiny-code"})
    with pytest.raises(ConfigError, match="tiny-code' has no draft head"):
        run_module.bench(config)


@pytest.mark.parametrize(("k", "length"), [(1, 64), (5, 120), (7, 160)])
def test_the_least_memory_length_is_one_that_can_be_decoded(k, length):
    config = BenchDecodeConfig(k=k, memory_lengths=[length])
    assert replace(config, length=length, rounds=1, masked_fraction=1.0).length == length  # as memory_of does
    with pytest.raises(ConfigError, match=f"at least {length}"):
        BenchDecodeConfig(k=k, memory_lengths=[length - 1])


def test_a_training_step_is_compared_on_the_same_work(capsys, monkeypatch):
    small = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "vocab_size": 300}
    monkeypatch.setattr(train_bench, "ProcessPoolExecutor", lambda *args, **kwargs: ThreadPoolExecutor(1))
    monkeypatch.setitem(ARCHITECTURES, "xlnet-base", small)
    monkeypatch.setattr(train_bench, "PRODUCT", (64, 64, 64))  # the real one takes minutes where bfloat16 is emulated
    arguments = "--length 24 --batch_size 3 --repeats 1 --num_threads 1 --dtypes float32,bfloat16"
    assert main(["bench", "train", *arguments.split()]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 4 and len(result["times_faster"]) == 3
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-3)):
        ours, theirs = (next(r for r in result["rows"] if r["dtype"] == dtype and r["system"] == s) for s in SYSTEMS)
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
        assert ours["losses"][1] < ours["losses"][0]
        assert result["times_faster"][dtype] == pytest.approx(theirs["step_seconds"] / ours["step_seconds"])
        assert ours["step_flop"] == flop_of_a_step(**small, batch=3, length=24)
        alone = ours["step_flop"] / ours["product_flop_per_second"]
        assert result["most_times_faster"][dtype] == pytest.approx(theirs["step_seconds"] / alone)


def flop_of_a_step(batch, length, d_model, n_layer, d_inner, vocab_size, masked_fraction=0.92, **_) -> int:
    """Operations of the products of an optimiser step, by hand: forward, and backward for both factors."""
    B, N, E, P = batch, length, d_model, 2 * length
    n_targets = length - round((1 - masked_fraction) * length)
    Q, T = (-(-n // 32) * 32 for n in (n_targets, B * n_targets))  # padded
    flop = 3 * 2 * T * E * vocab_size
    for layer in range(n_layer):
        R = Q if layer == n_layer - 1 else N + Q  # the last layer's content rows are keys and values only
        query_and_out, key_and_value, attention = 2 * R * E * E, 2 * N * E * E, R * E * (N + P + N)
        flop += 3 * 2 * B * (query_and_out + key_and_value + 2 * R * E * d_inner + attention)
        flop += 2 * 2 * P * E * E  # relative keys: what they are made from takes no gradient
    return flop


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "tiny"}, "xlnet-base, xlnet-large, got 'tiny'"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"num_threads": -1}, "num_threads must be at least 1, got -1"),
    ],
)
def test_settings_of_the_training_bench_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        BenchTrainConfig(**settings)
