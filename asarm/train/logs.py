"""What a training run tells while it goes on: logs in its folder, a record a line, and the same on wandb if asked."""

import hashlib
import json
import math
import time
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator

from ..errors import ConfigError, reason
from ..runlog import append_line, provenance, read_lines, write_atomic, write_json

METRICS, VALIDATION, HELD_OUT, GENERATIONS = (
    f"{name}.jsonl" for name in ("metrics", "validation", "held_out", "generations")
)
CONFIG = "config.yaml"


def settings_as_yaml(settings: dict) -> str:
    """The text of a run's ``config.yaml``."""
    return yaml.safe_dump(settings, sort_keys=False)


class TrainingLogs:
    """The logs of a run in ``folder`` that begins, or goes on, after ``first_step`` steps; one line of metrics every
    ``every`` steps; ``wandb`` names a project there. Only the main process writes."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        settings: dict,
        first_step: int,
        every: int,
        wandb: str | None = None,
    ):
        self.folder, self.accelerator, self.every = folder, accelerator, every
        if accelerator.is_main_process:
            write_atomic(folder / CONFIG, settings_as_yaml(settings))
            about = {"first_step": first_step, "processes": accelerator.num_processes}
            write_json(folder / "provenance.json", provenance() | about)
            for log in (folder / name for name in (METRICS, VALIDATION, HELD_OUT, GENERATIONS)):
                if log.exists():  # what was logged after the first step is done again
                    kept = (record for record in read_lines(log) if first_step and record["step"] <= first_step)
                    write_atomic(log, "".join(json.dumps(record) + "\n" for record in kept))
        if wandb is not None:
            self._begin_wandb(wandb, settings)
        self.start_clock(first_step)

    def _begin_wandb(self, project: str, settings: dict) -> None:
        """Log to a project of wandb as well, to the same run there after every start."""
        from wandb.errors import Error

        name = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        place = {"id": name, "name": self.folder.name, "dir": str(self.folder), "resume": "allow"}
        try:
            self.accelerator.init_trackers(project, settings, {"wandb": place})
        except Error as error:
            raise ConfigError(
                f"wandb {project!r}: {reason(error)}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def start_clock(self, done: int) -> None:
        self._clock, self._clock_step = time.perf_counter(), done

    def metrics(self, done: int, steps: int, tokens_per_step: int, measured: dict[str, float]) -> None:
        """A line of metrics.jsonl after ``done`` of ``steps`` steps."""
        seconds_per_step = (time.perf_counter() - self._clock) / (done - self._clock_step)
        self.start_clock(done)
        cuda = self.accelerator.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        record = finite(measured) | {
            "step": done,
            "tokens_per_second": tokens_per_step / seconds_per_step,
            "memory_gib": memory / 2**30,
            "seconds_left": (steps - done) * seconds_per_step,
        }
        append_line(self.folder / METRICS, record)
        self.accelerator.log(record, step=done)

    def record(self, name: str, done: int, measured: dict) -> None:
        """Append what was measured after ``done`` steps to another log."""
        append_line(self.folder / name, {"step": done} | finite(measured))
        numbers = {f"{Path(name).stem}/{key}": value for key, value in measured.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=done)

    def generations(self, done: int, rows: list[dict]) -> None:
        """Append texts with their measures to generations.jsonl, all with the same keys; on wandb they are a table."""
        for row in rows:
            append_line(self.folder / GENERATIONS, {"step": done} | row)
        if rows and self.accelerator.trackers:
            tracker = self.accelerator.get_tracker("wandb")
            tracker.log_table("generations", list(rows[0]), [list(row.values()) for row in rows], step=done)


def finite(measured: dict) -> dict:
    """Numbers that JSON has; None for the others."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in measured.items()}
