"""Training that is stopped: exact resume, a real process killed, stop signals, damaged checkpoints."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import losses, natively_bfloat16, small_run, stop_before, train_command

from asarm import AnySubsetLM
from asarm.errors import EXIT_STOPPED, ConfigError, DataFileError, OutputDirError
from asarm.train.checkpoint import checkpoints, load_checkpoint, newest_valid
from asarm.train.model import train


def assert_same(whole: Path, parts: Path) -> None:
    """Two finished runs have the same weights, bit for bit, and the same losses, each step's logged once."""
    first, second = (load_file(out / "final" / "model.safetensors") for out in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize("streaming", [False, True], ids=["in memory", "streamed"])
@pytest.mark.parametrize("stop_at", [2, 8])  # before the first checkpoint and after it
def test_resume_equals_an_uninterrupted_run_bit_for_bit(text_file, tmp_path, monkeypatch, stop_at, streaming):
    """Dropout is on, and weights are averaged; streamed text is read by other workers after the stop."""
    changes = {"optimizer": {"ema_decay": 0.8}, "streaming": streaming}
    train(small_run(text_file, tmp_path / "whole", **changes))
    config = small_run(text_file, tmp_path / "parts", resume="auto", **changes)
    stop_before(stop_at, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    train(replace(config, data=replace(config.data, num_workers=1)))
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_fine_tuning_resumes_as_well(text_file, tmp_path, monkeypatch):
    model = str(train(small_run(text_file, tmp_path / "pretrained", steps=1)))
    train(small_run(text_file, tmp_path / "whole", model=model, architecture={}))
    config = small_run(text_file, tmp_path / "parts", model=model, architecture={}, resume="auto")
    stop_before(8, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    train(config)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_text_that_breaks_off_loses_no_step(text_file, tmp_path):
    """The steps before a line that is no record are saved; when it is mended, the run goes on as if it had been."""
    changes = {"streaming": True, "steps": 40, "checkpoint_every": 100}
    lines = text_file.read_text().splitlines(keepends=True) * 3
    text_file.write_text("".join([*lines, "no record\n", *lines]))
    config = small_run(text_file, tmp_path / "parts", resume="auto", **changes)
    with pytest.raises(DataFileError, match=f"line {len(lines) + 1}: not JSON"):
        train(config)
    (saved,) = checkpoints(tmp_path / "parts" / "checkpoints")
    assert load_checkpoint(saved)["step"] == len(losses(tmp_path / "parts")) > 0
    text_file.write_text("".join([*lines, *lines[:1], *lines]))
    train(config)
    train(small_run(text_file, tmp_path / "whole", **changes))
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_the_final_folder_is_whole_or_absent(text_file, tmp_path, monkeypatch):
    config, save = small_run(text_file, tmp_path / "run", steps=2, resume="auto"), AnySubsetLM.save_pretrained

    def interrupted(model, folder):
        save(model, folder)
        (Path(folder) / "model.safetensors").write_bytes(b"cut short")
        raise KeyboardInterrupt

    monkeypatch.setattr(AnySubsetLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not (tmp_path / "run" / "final").exists()

    def signalled(model, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        save(model, folder)

    monkeypatch.setattr(AnySubsetLM, "save_pretrained", signalled)
    assert AnySubsetLM.from_pretrained(train(config)).config.d_model == 16
    assert sorted(p.name for p in (tmp_path / "run").glob("*final*")) == ["final"]


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
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert sorted(folder.iterdir()) == checkpoints(folder), "nothing half-written is left"


def test_resuming_with_other_settings_names_them(text_file, tmp_path):
    train(small_run(text_file, tmp_path / "run", steps=5))
    other = small_run(text_file, tmp_path / "run", steps=9, resume="auto", optimizer={"lr": 1.0})
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.003 there, 1.0 now, optimizer.steps: 5 there, 9 now\)"):
        train(other)
    train(small_run(text_file, tmp_path / "run", steps=5, resume="must", optimizer={"rows_per_pass": 4}))
    with pytest.raises(ConfigError, match=r"may_change names \['lr'\], which are no settings"):
        train(replace(other, may_change=["lr"]))
    with pytest.raises(ConfigError, match=r"other settings \(optimizer.steps: 5 there, 9 now\)"):
        train(replace(other, may_change=["optimizer.lr"]))
    changed = replace(other, may_change=["optimizer.lr", "optimizer.steps"])
    train(changed)
    assert len(losses(tmp_path / "run")) == 9
    train(replace(changed, may_change=[]))  # from here on these are its settings


def test_a_run_keeps_its_precision_on_another_device(text_file, tmp_path, monkeypatch):
    """With precision auto; begun with bfloat16 products, gone on with where there are none."""
    config = small_run(text_file, tmp_path / "run", resume="auto", optimizer={"precision": "auto"})
    natively_bfloat16(True, monkeypatch)
    stop_before(8, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    natively_bfloat16(False, monkeypatch)
    with pytest.warns(UserWarning, match="emulates bfloat16"):
        train(config)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optimizer"]["precision"] == "bf16"


@pytest.mark.slow
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


def test_a_full_disk_leaves_the_checkpoint_before(text_file, tmp_path, monkeypatch):
    original = torch.save

    def full(state, file):
        if state["step"] == 10:
            file.write(b"the beginning")
            raise OSError(28, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", full)
    config = small_run(text_file, tmp_path / "run", resume="auto")
    with pytest.raises(OutputDirError, match=r"step-0000010: .*No space left.*go on with --resume auto"):
        train(config)
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-0000005"]
    monkeypatch.setattr(torch, "save", original)
    train(config)
    train(small_run(text_file, tmp_path / "whole"))
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_what_is_no_checkpoint_is_named(text_file, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-0000007").mkdir(parents=True)
    config = small_run(text_file, tmp_path / "run", steps=2, resume="auto")
    with (
        pytest.raises(OutputDirError, match=r"no checkpoint in .* can be read"),
        pytest.warns(UserWarning, match="step-0000007"),
    ):
        train(config)
    torch.save({"step": 7}, folder / "step-0000007" / "state.pt")
    with pytest.raises(OutputDirError, match="step-0000007 is no checkpoint of a training run: it has no model"):
        train(config)


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
