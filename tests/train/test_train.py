"""Training: what is learnt, validated and kept, and what is refused before the first step."""

import itertools
import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from training_runs import losses, natively_bfloat16, small_run
from wandb.errors import UsageError

from asarm import AnySubsetLM, TextTokenizer
from asarm.cli import main
from asarm.errors import (
    CheckpointMismatchError,
    ConfigError,
    DataFileError,
    DiskSpaceError,
    DivergedError,
    MemoryBudgetError,
    OutputDirError,
)
from asarm.train import model as model_training
from asarm.train import start
from asarm.train.checkpoint import checkpoints, load_checkpoint
from asarm.train.config import ObjectiveConfig, ValidationConfig
from asarm.train.model import train


def test_training_learns_and_the_final_checkpoint_loads(text_file, tmp_path):
    final = train(small_run(text_file, tmp_path / "run", steps=60, optimizer={"precision": "bf16"}))
    curve = losses(tmp_path / "run")
    assert len(curve) == 60
    assert sum(curve[-5:]) / 5 < 0.75 * sum(curve[:5]) / 5
    model, tokenizer = AnySubsetLM.from_pretrained(final), TextTokenizer.from_pretrained(final)
    assert model.config.vocab_size == len(tokenizer)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 60 and record["tokens_per_second"] > 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["optimizer"]["steps"] == 60 and saved["seed"] == 0


def test_precision_is_that_of_the_device_unless_it_is_named(monkeypatch):
    cpu = torch.device("cpu")
    for native, precision in ((True, "bf16"), (False, "fp32")):
        natively_bfloat16(native, monkeypatch)
        assert start.precision_on(cpu, "auto") == precision
        assert start.precision_on(cpu, "fp32") == "fp32"
    with pytest.warns(UserWarning, match="this cpu emulates bfloat16.*use optimizer.precision fp32"):
        assert start.precision_on(cpu, "bf16") == "bf16"


def test_fine_tuning_starts_from_the_given_weights(text_file, tmp_path):
    config = small_run(text_file, tmp_path / "tuned", steps=1, optimizer={"lr": 1e-12})
    final = train(replace(config, model="tiny-english", architecture={}, tokenizer=None))
    before, after = AnySubsetLM.from_pretrained("tiny-english"), AnySubsetLM.from_pretrained(final)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: replace(c, model="tiny-english"), ConfigError, "remove the architecture"),
        (lambda c: replace(c, architecture={}), ConfigError, "needs a model to start from"),
        (
            lambda c: replace(c, data=replace(c.data, files=[])),
            ConfigError,
            "data.files or .*data.dataset, and nothing",
        ),
        (lambda c: replace(c, data=replace(c.data, files=["nowhere.txt"])), DataFileError, "nowhere.txt"),
        (lambda c: replace(c, output_dir="/proc/asarm"), OutputDirError, "/proc/asarm"),
        (
            lambda c: replace(c, optimizer=replace(c.optimizer, rows_per_pass=3)),
            ConfigError,
            "multiple of rows_per_pass",
        ),
        (lambda c: replace(c, masking=replace(c.masking, final_low=0.95)), ConfigError, "inside"),
        (lambda c: replace(c, masking=replace(c.masking, final_high=1.0)), ConfigError, "inside"),
        (
            lambda c: replace(c, masking=replace(c.masking, span_fraction=0.6, left_to_right_fraction=0.6)),
            ConfigError,
            "1.2",
        ),
        (lambda c: replace(c, objective=ObjectiveConfig("mlm")), ConfigError, "objective.name.*joint, parallel.*'mlm'"),
        (lambda c: replace(c, objective=ObjectiveConfig(prompt_attention="all")), ConfigError, "prompt_attention"),
        (lambda c: replace(c, objective=ObjectiveConfig(loss_scale="rate")), ConfigError, "loss_scale.*'rate'"),
        (lambda c: replace(c, validation=ValidationConfig(file="nowhere.txt")), DataFileError, "nowhere.txt"),
        (lambda c: replace(c, resume="yes"), ConfigError, "never, auto, must, got 'yes'"),
        (lambda c: replace(c, fsdp=True, optimizer=replace(c.optimizer, ema_decay=0.9)), ConfigError, "with fsdp"),
        (lambda c: replace(c, architecture={"d_modle": 64}), ConfigError, "d_modle"),
        (lambda c: replace(c, architecture={"dropout": 1.5}), ConfigError, r"dropout must be in \[0, 1\), got 1.5"),
        (lambda c: replace(c, architecture={"n_layer": 0}), ConfigError, "n_layer must be at least 1, got 0"),
        (lambda c: replace(c, architecture={"d_model": 15, "n_head": 1}), ConfigError, "d_model must be even, got 15"),
        (lambda c: replace(c, architecture={"ff_activation": "gleu"}), ConfigError, "one of .*gelu.*, got 'gleu'"),
        (lambda c: replace(c, optimizer=replace(c.optimizer, beta2=1.5)), ConfigError, "optimizer.beta2.*got 1.5"),
        (lambda c: replace(c, num_threads=0), ConfigError, "num_threads must be at least 1, got 0"),
        (
            lambda c: replace(c, validation=ValidationConfig(judge="gpt2")),
            ConfigError,
            "judge.*a file or",
        ),
        (lambda c: replace(c, architecture={"d_model": 30, "n_head": 4}), ConfigError, "n_head"),
        (lambda c: replace(c, architecture={"vocab_size": 100}), CheckpointMismatchError, "8192 pieces"),
        (lambda c: replace(c, log_every=0), ConfigError, "log_every"),
        (lambda c: replace(c, seed=-1), ConfigError, "seed"),
        (lambda c: replace(c, data=replace(c.data, source_weights={"a": -1.0})), ConfigError, "source_weights"),
        (lambda c: replace(c, data=replace(c.data, max_length=100_000)), MemoryBudgetError, "100000 tokens"),
    ],
)
def test_errors_before_the_first_step(text_file, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train(change(small_run(text_file, tmp_path / "run")))


def test_no_room_for_the_checkpoints_is_an_error_before_the_first_step(text_file, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(DiskSpaceError, match=r"0.000977 GiB is free.*--keep_checkpoints"):
        train(small_run(text_file, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def with_nan(steps: set[int], monkeypatch) -> None:
    """Make the loss of some steps not a number."""
    original = model_training.make_batch

    def spoilt(rows_BN, indices, step, *arguments):
        batch = original(rows_BN, indices, step, *arguments)
        return replace(batch, weight_B=batch.weight_B * (float("nan") if step in steps else 1))

    monkeypatch.setattr(model_training, "make_batch", spoilt)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(text_file, tmp_path, monkeypatch):
    with_nan({3, 6}, monkeypatch)
    run = small_run(text_file, tmp_path / "run", checkpoint_every=1, keep_checkpoints=20)
    with pytest.warns(UserWarning, match="step 4 is skipped: loss nan"):
        train(run)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped_steps"] for r in records] == [0] * 3 + [1] * 3 + [2] * 6
    assert [r["step"] for r in records if r["loss"] is None] == [4, 7]
    saved = [load_checkpoint(path) for path in checkpoints(tmp_path / "run" / "checkpoints")]
    moved = [
        not all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        for a, b in itertools.pairwise(saved)
    ]
    assert moved == [step not in (4, 7) for step in range(2, 13)]


def test_training_stops_when_nothing_is_finite_any_more(text_file, tmp_path, monkeypatch):
    with_nan(set(range(4, 100)), monkeypatch)
    run = small_run(text_file, tmp_path / "run", optimizer={"max_skipped_steps": 3})
    with (
        pytest.raises(DivergedError, match="3 steps in a row, up to step 7"),
        pytest.warns(UserWarning, match="skipped"),
    ):
        train(run)


def test_validation_measures_and_leaves_training_alone(text_file, tmp_path, capsys):
    """With dropout on; the last measurement equals that of the final checkpoint by the command for it."""
    validation = ValidationConfig(file=str(text_file), rows=6, masked_fractions=[0.5], generations=2, every=5)
    final = train(small_run(text_file, tmp_path / "with", validation=validation))
    train(small_run(text_file, tmp_path / "without"))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    records = [json.loads(line) for line in (tmp_path / "with" / "validation.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [5, 10, 12]
    assert all(0 < r["nfe_per_token"] <= 1 and r["entropy"] > 0 for r in records)
    words = ["--model", str(final), "--data_file", str(text_file), "--num_sequences", "6", "--max_length", "16"]
    assert main(["score", *words, "--masked_fractions", "0.5", "--json"]) == 0
    (scored,) = json.loads(capsys.readouterr().out)["likelihood"]
    assert records[-1]["nll_0.5"] == pytest.approx(scored["nll_per_token"])
    assert records[-1]["nll_0.5"] < records[0]["nll_0.5"]


def test_the_average_of_the_weights_is_what_is_kept(text_file, tmp_path):
    run = small_run(text_file, tmp_path / "run", steps=6, checkpoint_every=1, keep_checkpoints=9)
    final = load_file(train(replace(run, optimizer=replace(run.optimizer, ema_decay=0.7))) / "model.safetensors")
    saved = [load_checkpoint(path)["model"] for path in checkpoints(tmp_path / "run" / "checkpoints")]
    for key, value in final.items():
        average = saved[0][f"model.{key}"]
        for state in saved[1:]:
            average = 0.7 * average + 0.3 * state[f"model.{key}"]
        assert torch.allclose(value, average, atol=1e-6), key


@pytest.mark.slow
def test_compiled_layers_train_the_same(text_file, tmp_path):
    """Dropout included: its random numbers are the same."""
    runs = [small_run(text_file, tmp_path / str(c), steps=3, compile=c) for c in (False, True)]
    for run in runs:
        torch._dynamo.utils.counters.clear()
        train(run)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == run.compile
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)


def test_wandb_offline(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(small_run(text_file, tmp_path / "run", steps=2, wandb="asarm-test"))
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while b"masking_low" not in log.read_bytes():  # written by a process of wandb's own
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_wandb_without_a_key_is_named(text_file, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise UsageError("No API key configured.")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(ConfigError, match=r"wandb 'asarm-test': UsageError: No API key.*WANDB_MODE=offline"):
        train(small_run(text_file, tmp_path / "run", wandb="asarm-test"))
