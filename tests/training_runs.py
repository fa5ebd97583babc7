"""Small training runs, in this process and in one of their own."""

import json
import sys
from pathlib import Path

from asarm import engine
from asarm.config import DataConfig
from asarm.train import model as model_training
from asarm.train import start
from asarm.train.config import MaskingConfig, OptimizerConfig, TrainConfig

NO_DROPOUT = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "dropout": 0.0}
SENTENCES = ["The cat sat on the mat.", "A dog ran to the park.", "The sun was warm.", "She gave him a red apple."]


def write_text(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": " ".join(SENTENCES[i % 4 :])}) + "\n" for i in range(40)))
    return path


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
        architecture=changes.pop("architecture", NO_DROPOUT | {"dropout": 0.1}),
        data=DataConfig(
            files=[str(text_file)],
            max_length=16,
            streaming=changes.pop("streaming", False),
            streams=2,
            shuffle_buffer=4,
            num_workers=0,
        ),
        masking=MaskingConfig(0.15, 0.15, 0.3, 0.9, warmup_steps=4),
        optimizer=OptimizerConfig(**optimizer | changes.pop("optimizer", {})),
        checkpoint_every=changes.pop("checkpoint_every", 5),
        log_every=1,
        **changes,
    )


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def stop_before(step: int, monkeypatch) -> None:
    """Let the next run end as if it were interrupted when a step begins."""
    original = model_training.make_batch

    def interrupted(rows_BN, indices, now, *arguments):
        if now == step:
            monkeypatch.setattr(model_training, "make_batch", original)
            raise KeyboardInterrupt
        return original(rows_BN, indices, now, *arguments)

    monkeypatch.setattr(model_training, "make_batch", interrupted)


def train_command(text_file, out, *words) -> list[str]:
    """A small run as a process."""
    architecture = '{"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "dropout": 0.1}'
    command = ["--output_dir", str(out), "--tokenizer", "tiny-english", "--architecture", architecture]
    command += ["--data.files", f"['{text_file}']", "--data.max_length", "16", "--num_threads", "1"]
    command += ["--optimizer.rows_per_step", "2", "--optimizer.rows_per_pass", "2", *words]
    return [sys.executable, "-m", "asarm", "train", *command]


def natively_bfloat16(native: bool, monkeypatch) -> None:
    for module in (engine, start):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: native)
