"""Several processes on the CPU (gloo): the same training as one process with the same batch."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import NO_DROPOUT, losses, small_run

from asarm.errors import EXIT_STOPPED, ConfigError
from asarm.runlog import read_lines
from asarm.train.checkpoint import checkpoints, load_checkpoint
from asarm.train.config import ObjectiveConfig, OptimizerConfig, ValidationConfig
from asarm.train.model import train

PER_ROW_MEAN = ObjectiveConfig(loss_average="per_row_mean")


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def start(config, folder, n_processes=2) -> list[subprocess.Popen]:
    """A run as so many processes, started as a batch system starts them."""
    file = folder / f"{len(list(folder.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(asdict(config)))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(n_processes)}
    command = [sys.executable, "-m", "asarm", "train", "--config", str(file)]
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n_processes)
    ]


def finish(processes) -> list[str]:
    """Wait for all; what each wrote to standard error."""
    return [process.communicate(timeout=300)[1] for process in processes]


def run(config, folder, n_processes=2) -> None:
    processes = start(config, folder, n_processes)
    errors = finish(processes)
    assert [p.returncode for p in processes] == [0] * n_processes, "\n".join(errors)


def assert_same_training(ours, theirs, tolerance=1e-5):
    assert losses(ours) == pytest.approx(losses(theirs), abs=tolerance)
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (ours, theirs))
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


def test_two_processes_and_one_with_twice_the_batch_have_the_same_loss_curve(text_file, tmp_path):
    config = small_run(text_file, tmp_path / "one", steps=50, architecture=NO_DROPOUT, optimizer={"rows_per_step": 8})
    train(replace(config, optimizer=replace(config.optimizer, rows_per_pass=4)))
    run(replace(config, output_dir=str(tmp_path / "two")), tmp_path)
    assert len(losses(tmp_path / "two")) == 50
    assert_same_training(tmp_path / "two", tmp_path / "one")
    about = yaml.safe_load((tmp_path / "two" / "provenance.json").read_text())
    assert about["processes"] == 2


def test_two_processes_fine_tune_as_one_does(text_file, tmp_path):
    model = str(train(small_run(text_file, tmp_path / "pretrained", steps=1, architecture=NO_DROPOUT)))
    config = small_run(text_file, tmp_path / "one", steps=5, model=model, architecture={}, objective=PER_ROW_MEAN)
    config = replace(config, optimizer=replace(config.optimizer, rows_per_pass=1))
    run(replace(config, output_dir=str(tmp_path / "two")), tmp_path)
    train(config)
    assert_same_training(tmp_path / "two", tmp_path / "one")


def test_sharded_training_is_the_same_and_its_checkpoints_are_whole(text_file, tmp_path):
    """FSDP with validation on the way; one process goes on from what two have saved."""
    validation = ValidationConfig(file=str(text_file), rows=4, generations=2, every=6)
    config = small_run(text_file, tmp_path / "one", steps=10, architecture=NO_DROPOUT, validation=validation)
    config = replace(config, gradient_checkpointing=True, objective=PER_ROW_MEAN)
    train(config)
    sharded = replace(config, output_dir=str(tmp_path / "two"), fsdp=True)
    run(sharded, tmp_path)
    assert_same_training(tmp_path / "two", tmp_path / "one")
    one, two = (read_lines(tmp_path / name / "validation.jsonl") for name in ("one", "two"))
    assert [record["step"] for record in one] == [6, 10]
    assert two == [pytest.approx(record, abs=1e-4) for record in one]
    for path in checkpoints(tmp_path / "two" / "checkpoints"):
        state = load_checkpoint(path)
        assert state["model"]["model.transformer.layer.0.rel_attn.q"].shape == (16, 2, 8)
    (tmp_path / "two" / "checkpoints" / "step-0000010").rename(tmp_path / "gone")
    train(replace(sharded, fsdp=False, resume="must"))
    assert_same_training(tmp_path / "two", tmp_path / "one")


def test_one_process_has_nobody_to_deal_its_weights_out_to(text_file, tmp_path):
    config = small_run(text_file, tmp_path / "plain", steps=3)
    train(config)
    train(replace(config, output_dir=str(tmp_path / "fsdp"), fsdp=True))
    assert losses(tmp_path / "fsdp") == losses(tmp_path / "plain")


def test_a_signal_to_one_process_stops_all_after_the_same_step(text_file, tmp_path):
    config = small_run(text_file, tmp_path / "run", steps=100_000, checkpoint_every=100_000, architecture=NO_DROPOUT)
    processes = start(config, tmp_path)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and all(p.poll() is None for p in processes):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGUSR1)
    errors = finish(processes)
    assert [p.returncode for p in processes] == [EXIT_STOPPED] * 2, "\n".join(errors)
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    done = load_checkpoint(saved)["step"]
    assert done == len(losses(tmp_path / "run"))
    assert f"stopped by SIGUSR1 after step {done}" in errors[1]
    assert f"stopped by a signal to another process after step {done}" in errors[0]


def test_text_that_breaks_off_in_one_process_fails_both_with_their_steps_saved(text_file, tmp_path):
    """A file for each; were the other one's status that of a stop, the launcher would start them again for ever."""
    lines = text_file.read_text().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_text("".join([*lines * 3, "no record\n"]))
    text_file.write_text("".join(lines * 20))
    config = small_run(tmp_path / "*.jsonl", tmp_path / "run", steps=200, streaming=True, checkpoint_every=1000)
    processes = start(config, tmp_path)
    errors = finish(processes)
    assert [p.returncode for p in processes] == [2, 2], "\n".join(errors)
    assert sorted("another process cannot read its text" in error for error in errors) == [False, True]
    assert sorted("bad.jsonl, line 121: not JSON" in error for error in errors) == [False, True]
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(saved)["step"] == len(losses(tmp_path / "run")) > 0


def test_a_batch_that_does_not_divide_is_named():
    config = OptimizerConfig(rows_per_step=12, rows_per_pass=2)
    config.require_divides(3)
    with pytest.raises(ConfigError, match=r"rows_per_pass \(2\) times the number of processes \(4\), got 12"):
        config.require_divides(4)
