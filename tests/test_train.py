"""Training: the objective against a slow loop, exact resume, and a real process killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model
from safetensors.torch import load_file

from asarm import AnySubsetLM, Order, TextTokenizer, joint_log_prob
from asarm.config import DataConfig
from asarm.data.packing import PackedRows
from asarm.data.sources import Document
from asarm.errors import (
    EXIT_STOPPED,
    CheckpointMismatchError,
    ConfigError,
    DataFileError,
    MemoryBudgetError,
    OutputDirError,
)
from asarm.train import loop
from asarm.train.checkpoint import checkpoints
from asarm.train.config import MaskingConfig, OptimizerConfig, TrainConfig
from asarm.train.loop import train
from asarm.train.objective import accumulate_gradients, step_batch
from asarm.train.schedule import lr_factor, masking_range

SENTENCES = ["The cat sat on the mat.", "A dog ran to the park.", "The sun was warm.", "She gave him a red apple."]


def write_text(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": " ".join(SENTENCES[i % 4 :])}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def text_file(tmp_path):
    return write_text(tmp_path / "text.jsonl")


def small_run(text_file, out, steps=12, **changes) -> TrainConfig:
    optimizer = {
        "lr": 3e-3,
        "steps": steps,
        "warmup_steps": 3,
        "rows_per_step": 4,
        "rows_per_pass": 2,
        "precision": "fp32",
    }
    return TrainConfig(
        output_dir=str(out),
        tokenizer="tiny-english",
        architecture={"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "dropout": 0.1},
        data=DataConfig(files=[str(text_file)], max_length=16),
        masking=MaskingConfig(0.15, 0.15, 0.3, 0.9, warmup_steps=4),
        optimizer=OptimizerConfig(**optimizer | changes.pop("optimizer", {})),
        checkpoint_every=changes.pop("checkpoint_every", 5),
        log_every=1,
        **changes,
    )


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_schedules():
    o = OptimizerConfig(steps=10, warmup_steps=4)
    assert [lr_factor(s, o) for s in range(11)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    )
    m = MaskingConfig(warmup_steps=5000)
    assert masking_range(0, m) == (0.15, 0.15)
    assert masking_range(2500, m) == pytest.approx((0.5, 0.57))
    assert masking_range(99_999, m) == pytest.approx((0.85, 0.99))


@pytest.mark.parametrize("rows_per_pass", [1, 3, 6])
def test_loss_and_gradient_equal_a_slow_loop_however_the_batch_is_split(rows_per_pass):
    tokenizer = TextTokenizer.from_pretrained("tiny-english")
    rows = PackedRows([Document(" ".join(SENTENCES))] * 8, tokenizer, 12, seed=0)
    model = make_model(vocab_size=len(tokenizer), mask_token_id=6, spread=0.1).train()
    batch = step_batch(rows, 3, 6, MaskingConfig(0.2, 0.9, 0.2, 0.9, 0), seed=1)
    mean = accumulate_gradients(model, batch, rows_per_pass, "fp32")
    split = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    slow = -sum(
        joint_log_prob(model, batch.ids_BN[b : b + 1], Order.from_visible(batch.visible_BN[b : b + 1])).item()
        for b in range(6)
    )
    assert mean == pytest.approx(slow / int((~batch.visible_BN).sum()), rel=1e-5)
    model.zero_grad()
    accumulate_gradients(model, batch, 6, "fp32")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, split[name], atol=1e-6), name


def test_masking_rates_stay_in_range_and_differ_between_rows():
    tokenizer = TextTokenizer.from_pretrained("tiny-english")
    rows = PackedRows([Document(" ".join(SENTENCES))] * 30, tokenizer, 100, seed=0)
    masked_B = (~step_batch(rows, 0, 16, MaskingConfig(0.2, 0.4, 0.2, 0.4, 0), seed=1).visible_BN).sum(1)
    assert masked_B.min() >= 20 and masked_B.max() <= 40 and len(masked_B.unique()) > 5
    assert masked_B.tolist() == sorted(masked_B.tolist(), reverse=True)  # like with like


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


def train_in_two_parts(config: TrainConfig, monkeypatch) -> Path:
    """A run that is interrupted after eight steps and resumed; returns the final folder."""
    original = loop.accumulate_gradients
    out = Path(config.output_dir)

    def stop_at_eight(*arguments):
        if (out / "metrics.jsonl").exists() and len(losses(out)) == 8:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "accumulate_gradients", stop_at_eight)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(loop, "accumulate_gradients", original)
    return train(replace(config, resume="must"))


def test_resume_equals_an_uninterrupted_run_bit_for_bit(text_file, tmp_path, monkeypatch):
    """Dropout is on, so the random state has to come back as well."""
    whole = train(small_run(text_file, tmp_path / "whole"))
    parts = train_in_two_parts(small_run(text_file, tmp_path / "parts"), monkeypatch)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole"), "steps that were run again are logged once"


def test_a_killed_process_leaves_whole_checkpoints_and_goes_on(text_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "asarm",
        "train",
        "--output_dir",
        str(tmp_path / "run"),
        "--tokenizer",
        "tiny-english",
    ]
    command += ["--architecture", '{"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "dropout": 0.0}']
    command += [
        "--data.files",
        f"['{text_file}']",
        "--data.max_length",
        "16",
        "--checkpoint_every",
        "5",
        "--optimizer.steps",
        "400",
    ]
    command += ["--optimizer.rows_per_step", "2", "--optimizer.rows_per_pass", "2", "--num_threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while len(checkpoints(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    saved = checkpoints(folder)
    assert len(saved) >= 2
    for path in saved:
        assert torch.load(path / "state.pt", weights_only=True)["step"] == int(path.name.removeprefix("step-"))
    reached = int(saved[-1].name.removeprefix("step-"))
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["first_step"] >= reached
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert len(checkpoints(folder)) == 2, "old checkpoints are pruned"


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
        (lambda c: replace(c, data=replace(c.data, files=[])), ConfigError, "data.files"),
        (lambda c: replace(c, data=replace(c.data, files=["nowhere.txt"])), DataFileError, "nowhere.txt"),
        (lambda c: replace(c, output_dir="/proc/asarm"), OutputDirError, "/proc/asarm"),
        (
            lambda c: replace(c, optimizer=replace(c.optimizer, rows_per_pass=3)),
            ConfigError,
            "multiple of rows_per_pass",
        ),
        (lambda c: replace(c, masking=replace(c.masking, final_low=0.95)), ConfigError, "inside"),
        (lambda c: replace(c, architecture={"d_modle": 64}), ConfigError, "d_modle"),
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


def test_resuming_with_other_settings_names_them(text_file, tmp_path):
    train(small_run(text_file, tmp_path / "run", steps=5))
    with pytest.raises(ConfigError, match="optimizer"):
        train(small_run(text_file, tmp_path / "run", steps=9, resume="must"))


def train_command(text_file, out, *words) -> list[str]:
    """A small run as a process."""
    architecture = '{"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "dropout": 0.1}'
    command = ["--output_dir", str(out), "--tokenizer", "tiny-english", "--architecture", architecture]
    command += ["--data.files", f"['{text_file}']", "--data.max_length", "16", "--num_threads", "1"]
    command += ["--optimizer.rows_per_step", "2", "--optimizer.rows_per_pass", "2", *words]
    return [sys.executable, "-m", "asarm", "train", *command]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_and_asks_for_another_start(text_file, tmp_path, number):
    words = ("--optimizer.steps", "100000", "--checkpoint_every", "100000", "--log_every", "1", "--resume", "auto")
    process = subprocess.Popen(train_command(text_file, tmp_path / "run", *words), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED == 75, errors
    assert f"stopped by {number.name} after step" in errors and "Traceback" not in errors
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert torch.load(saved / "state.pt", weights_only=True)["step"] == len(losses(tmp_path / "run"))


def damage(checkpoint: Path, how: str) -> None:
    data = bytearray((checkpoint / "state.pt").read_bytes())
    if how == "cut short":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 255
    (checkpoint / "state.pt").write_bytes(data)


@pytest.mark.parametrize("how", ["cut short", "one byte changed"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(text_file, tmp_path, how):
    whole = small_run(text_file, tmp_path / "run")
    before = load_file(train(whole) / "model.safetensors")
    older, newer = checkpoints(tmp_path / "run" / "checkpoints")
    damage(newer, how)
    with pytest.warns(UserWarning, match=f"damaged checkpoint {newer}"):
        after = load_file(train(replace(whole, resume="auto")) / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before), "steps 11 and 12 were run again"
    for path in (older, newer):
        damage(path, how)
    with pytest.raises(OutputDirError, match="can be read"), pytest.warns(UserWarning, match="damaged"):
        train(replace(whole, resume="auto"))


def test_resume_auto_begins_where_there_is_nothing_and_must_refuses(text_file, tmp_path):
    with pytest.raises(OutputDirError, match="holds no checkpoint to go on from"):
        train(small_run(text_file, tmp_path / "run", steps=2, resume="must"))
    train(small_run(text_file, tmp_path / "run", steps=2, resume="auto"))
    assert len(losses(tmp_path / "run")) == 2
