"""Training that is stopped: exact resume, a real process killed, stop signals, damaged checkpoints."""

import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import losses, small_run, stop_before, train_command

from asarm.errors import EXIT_STOPPED, ConfigError, OutputDirError
from asarm.train.checkpoint import checkpoints, load_checkpoint, newest_valid
from asarm.train.loop import train


@pytest.mark.parametrize("stop_at", [2, 8])  # before the first checkpoint and after it
def test_resume_equals_an_uninterrupted_run_bit_for_bit(text_file, tmp_path, monkeypatch, stop_at):
    """Dropout is on, and weights are averaged."""
    changes = {"optimizer": {"ema_decay": 0.8}}
    whole = train(small_run(text_file, tmp_path / "whole", **changes))
    config = small_run(text_file, tmp_path / "parts", resume="auto", **changes)
    stop_before(stop_at, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    parts = train(config)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole"), "steps that were run again are logged once"


@pytest.mark.slow
def test_five_kills_in_one_run_leave_whole_checkpoints_and_the_same_weights(text_file, tmp_path):
    words = ("--optimizer.steps", "120", "--checkpoint_every", "2", "--log_every", "1", "--resume", "auto")
    assert subprocess.run(train_command(text_file, tmp_path / "whole", *words), check=False).returncode == 0
    command, folder = train_command(text_file, tmp_path / "run", *words), tmp_path / "run" / "checkpoints"
    rng, log = np.random.default_rng(0), tmp_path / "run" / "metrics.jsonl"
    for kill in range(5):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        target = kill * 20 + int(rng.integers(5, 20))
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= target):
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for path in checkpoints(folder):
            assert newest_valid(folder) == checkpoints(folder)[-1], "no warning: none is damaged"
            assert load_checkpoint(path)["step"] == int(path.name.removeprefix("step-"))
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    first, second = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert sorted(folder.iterdir()) == checkpoints(folder), "nothing half-written is left"


def test_resuming_with_other_settings_names_them(text_file, tmp_path):
    train(small_run(text_file, tmp_path / "run", steps=5))
    other = small_run(text_file, tmp_path / "run", steps=9, resume="auto", optimizer={"lr": 1.0})
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.003 there, 1.0 now, optimizer.steps: 5 there, 9 now\)"):
        train(other)
    train(small_run(text_file, tmp_path / "run", steps=5, resume="must", optimizer={"rows_per_pass": 4}))


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
