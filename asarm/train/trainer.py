"""A module in training: optimiser, checkpoints, logs, and the loop over steps.

Models and draft heads are trained by the same :class:`Trainer`; what differs is how a step's gradients come about.

Dropout is keyed by (seed, step, process), and rows and orders by their index, so no generator has a state that a
checkpoint would have to keep, and nothing between two steps (validation) can disturb one.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
import yaml
from accelerate.utils import gather_object
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..data.rows import TrainingRows
from ..errors import ConfigError, DataFileError, DivergedError, StoppedError, UserError, reason
from ..rng import generator
from ..runlog import append_line, provenance, read_lines, write_atomic, write_json
from .checkpoint import load_checkpoint, save_checkpoint, whole_folder
from .config import OptimizerConfig
from .schedule import lr_factor, masking_range
from .start import Run
from .stopping import StopSignals

METRICS, VALIDATION, HELD_OUT = "metrics.jsonl", "validation.jsonl", "held_out.jsonl"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build_optimizer(module: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def shard(module: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> None:
    """Deal the parameters out to the processes: those of each layer, and the rest."""
    for layer in layers:
        fully_shard(layer)
    fully_shard(module)


class Trainer:
    """A module (what has the parameters) in training; ``wrapped`` is the module to call, ``start`` the next step.

    Args:
        layers: submodules that FSDP deals out one by one; without it every process holds the module whole.
    """

    def __init__(
        self, run: Run, module: torch.nn.Module, rows: TrainingRows, layers: Iterable[torch.nn.Module] | None = None
    ):
        config, accelerator, out = run.config, run.accelerator, run.out
        self.config, self.accelerator, self.out, self.rows = config, accelerator, out, rows
        decay = config.optimizer.ema_decay
        self.module = module.to(accelerator.device).train()
        if layers is not None:
            shard(self.module, layers)
        self.average = None if decay is None else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.optimizer = build_optimizer(self.module, config.optimizer)
        self.start, self.skipped, self.in_a_row = 0, 0, 0
        if run.checkpoint is not None:
            self._restore(load_checkpoint(run.checkpoint))
        distributed = accelerator.num_processes > 1 and layers is None
        self.wrapped = accelerator.prepare_model(self.module) if distributed else self.module
        if accelerator.is_main_process:
            self._begin_records()
        if config.wandb:
            self._begin_wandb(config.wandb)

    def _begin_wandb(self, project: str) -> None:
        from wandb.errors import Error

        name = hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:16]
        settings = {"id": name, "name": self.out.name, "dir": str(self.out), "resume": "allow"}
        try:
            self.accelerator.init_trackers(project, asdict(self.config), {"wandb": settings})
        except Error as error:
            raise ConfigError(
                f"wandb {project!r}: {reason(error)}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def accumulate(self, parts: Iterable, losses: Callable[..., dict[str, torch.Tensor]]) -> dict[str, float]:
        """Backpropagate this process's share of a step: the sum over its parts of ``losses(part)["loss"]``.

        The processes exchange gradients once, in the last part. Returns the sums over parts and processes.
        """
        parts, total, device = list(parts), {}, self.accelerator.device.type
        enabled = self.config.optimizer.precision == "bf16"
        # weights are cast once a step, not once a part (FSDP gathers them anew each time)
        cache = not isinstance(self.module, FSDPModule)
        with torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=cache):
            for i, part in enumerate(parts):
                with self._exchange(i == len(parts) - 1):
                    measured = losses(part)
                    with torch.autocast(device, enabled=False):
                        # both wrappers average over the processes
                        (measured["loss"] * self.accelerator.num_processes).backward()
                for key, value in measured.items():
                    total[key] = total.get(key, 0) + value.detach()
        sums = self.accelerator.reduce(torch.stack(list(total.values())).float(), "sum")
        return dict(zip(total, sums.tolist(), strict=True))

    def _exchange(self, last: bool):
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def run(self, compute: Callable[[int, tuple], dict[str, float]], after: Callable[[int], None]) -> None:
        """The steps that are left. ``compute(step, (rows, indices))`` leaves gradients behind and returns what is
        logged, "loss" among it; ``after(steps done)`` is called after each step.

        Raises :class:`StoppedError` after the step in which a stop signal came to any process, its checkpoint written,
        :class:`DivergedError` when too many gradients in a row were not finite, and what reading the text raises, a
        checkpoint written before it.
        """
        o, rank = self.config.optimizer, self.accelerator.process_index
        main = self.accelerator.is_main_process
        batches = self.rows.batches(self.start, o.rows_per_step)
        bar = tqdm(total=o.steps, initial=self.start, unit="step", desc="train", smoothing=0.05, disable=not main)
        self._clock, self._clock_step = time.perf_counter(), self.start
        with StopSignals() as stop, bar:
            upcoming = next(batches) if self.start < o.steps else None
            for step in range(self.start, o.steps):
                rows_BN, indices, data_state = upcoming
                torch.manual_seed(int(generator(self.config.seed, f"dropout {rank}", step).integers(2**63)))
                measured = compute(step, (rows_BN, indices))
                measured |= self._update(step, measured["loss"])
                done, last, unreadable = step + 1, step + 1 == o.steps, None
                if main and (done % self.config.log_every == 0 or last):
                    self._log(done, measured)
                bar.update()
                bar.set_postfix(loss=f"{measured['loss']:.3f}", refresh=False)
                after(done)
                try:
                    upcoming = None if last else next(batches)
                except UserError as error:  # what was trained so far is not lost to a text that breaks off
                    unreadable = error
                stopped, broken = self._any_process(stop.received is not None, unreadable is not None)
                if done % self.config.checkpoint_every == 0 or last or stopped or broken:
                    self.save(done, data_state)
                if broken:  # in every process, or the others would ask for another start
                    raise unreadable or DataFileError("another process cannot read its text; its message says why")
                if stopped and not last:
                    why = stop.received or "a signal to another process"
                    raise StoppedError(f"stopped by {why} after step {done}; go on with --resume auto")

    def _update(self, step: int, loss: float) -> dict[str, float]:
        """Clip the gradient and take the optimiser's step, unless something is not finite: then count it."""
        o = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * lr_factor(step, o)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), o.grad_clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.module)
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            warnings.warn(f"step {step + 1} is skipped: loss {loss}, gradient norm {norm}", stacklevel=2)
        self.optimizer.zero_grad(set_to_none=True)
        if self.in_a_row >= o.max_skipped_steps:
            raise DivergedError(
                f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {step + 1}; go on from the "
                f"last checkpoint with a lower optimizer.lr than {o.lr} (--resume auto --optimizer.lr LR --may_change "
                "optimizer.lr), or in the same way with optimizer.precision fp32"
            )
        return {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}

    def _any_process(self, *flags: bool) -> list[bool]:
        """Whether each of the flags is up in any process."""
        here = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return (self.accelerator.reduce(here, "sum") > 0).tolist()

    def _log(self, done: int, measured: dict[str, float]) -> None:
        o, now = self.config.optimizer, time.perf_counter()
        seconds_per_step = (now - self._clock) / (done - self._clock_step)
        self._clock, self._clock_step = now, done
        low, high = masking_range(done - 1, self.config.masking)
        cuda = self.accelerator.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        record = {key: value if math.isfinite(value) else None for key, value in measured.items()} | {
            "step": done,
            "masking_low": low,
            "masking_high": high,
            "skipped_steps": self.skipped,
            "tokens_per_second": o.rows_per_step * self.config.data.max_length / seconds_per_step,
            "memory_gib": memory / 2**30,
            "seconds_left": (o.steps - done) * seconds_per_step,
        }
        append_line(self.out / METRICS, record)
        self.accelerator.log(record, step=done)

    def record(self, name: str, done: int, measured: dict) -> None:
        """Append what was measured after ``done`` steps to another log."""
        append_line(self.out / name, {"step": done} | measured)
        numbers = {f"{Path(name).stem}/{key}": value for key, value in measured.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=done)

    @property
    def trained(self) -> torch.nn.Module:
        """The module whose weights count: the moving average where there is one."""
        return self.module if self.average is None else self.average.module

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that count, whole, in the main process; every process has to ask."""
        if self.average is not None:
            return self.average.module.state_dict()
        return get_state_dict(self.module, [], options=WHOLE)[0]

    def save(self, step: int, data_state: dict) -> None:
        """A checkpoint of everything that the next step depends on."""
        model, optimizer = get_state_dict(self.module, self.optimizer, options=WHOLE)
        data = {}
        for of_a_process in gather_object([data_state]):
            data |= of_a_process
        if self.accelerator.is_main_process:
            state = {
                "step": step,
                "model": model,
                "optimizer": optimizer,
                "average": {} if self.average is None else self.average.state_dict(),
                "data": data,
                "skipped": (self.skipped, self.in_a_row),
                "config": asdict(self.config),
            }
            save_checkpoint(self.out / "checkpoints", state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def finish(self, write: Callable[[Path], None]) -> Path:
        """Let the main process ``write`` the run's last folder, final/, which is there whole or not at all; a stop
        signal that comes meanwhile is no longer needed."""
        final = self.out / "final"
        with StopSignals():
            if self.accelerator.is_main_process:
                with whole_folder(final) as folder:
                    write(folder)
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        return final

    def _restore(self, state: dict) -> None:
        weights = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.module, self.optimizer, **weights, options=StateDictOptions(full_state_dict=True))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.rows.load_state(state["data"])
        self.start, (self.skipped, self.in_a_row) = state["step"], state["skipped"]

    def _begin_records(self) -> None:
        """Write the settings and the provenance; drop what was logged after ``start``: it is done again."""
        write_atomic(self.out / "config.yaml", yaml.safe_dump(asdict(self.config), sort_keys=False))
        about = {"first_step": self.start, "processes": self.accelerator.num_processes}
        write_json(self.out / "provenance.json", provenance() | about)
        for log in (self.out / name for name in (METRICS, VALIDATION, HELD_OUT)):
            if log.exists():
                kept = (record for record in read_lines(log) if self.start and record["step"] <= self.start)
                write_atomic(log, "".join(json.dumps(record) + "\n" for record in kept))
