"""A module in training: optimiser, average of the weights, and the loop over steps.

Models and draft heads are trained by the same :class:`Trainer`; what differs is how a step's gradients come about.

Dropout is keyed by (seed, step, process), and rows and orders by their index, so no generator has a state that a
checkpoint would have to keep, and nothing between two steps (validation) can disturb one.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..data.rows import TrainingRows
from ..errors import DataFileError, DivergedError, StoppedError, UserError
from ..rng import generator
from ..runlog import whole_folder
from .checkpoint import Checkpoints, load_checkpoint
from .config import OptimizerConfig
from .logs import TrainingLogs
from .schedule import lr_factor
from .stopping import StopSignals

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
    """A module (what has the parameters) in training; ``wrapped`` is the module to call, ``first_step`` the number of
    steps that were done before.

    Args:
        module: moved to the device, and into training mode.
        rows: the training text.
        settings: of the optimiser.
        seed: of dropout.
        accelerator: of this process.
        checkpoint: to go on from.
        layers: submodules that FSDP deals out one by one; without it every process holds the module whole.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        rows: TrainingRows,
        settings: OptimizerConfig,
        seed: int,
        accelerator: Accelerator,
        checkpoint: Path | None = None,
        layers: Iterable[torch.nn.Module] | None = None,
    ):
        self.rows, self.settings, self.seed, self.accelerator = rows, settings, seed, accelerator
        self.module = module.to(accelerator.device).train()
        if layers is not None:
            shard(self.module, layers)
        decay = settings.ema_decay
        self.average = None if decay is None else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.optimizer = build_optimizer(self.module, settings)
        self.first_step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        if checkpoint is not None:
            self._restore(load_checkpoint(checkpoint))
        distributed = accelerator.num_processes > 1 and layers is None
        self.wrapped = accelerator.prepare_model(self.module) if distributed else self.module

    def sum_over_processes(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes."""
        here = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(here, "sum").tolist()

    def accumulate(self, parts: Iterable, losses: Callable[..., dict[str, torch.Tensor]]) -> dict[str, float]:
        """Backpropagate this process's share of a step: the sum over its parts of ``losses(part)["loss"]``.

        The processes exchange gradients once, in the last part. Returns the sums over parts and processes.
        """
        parts, total, device = list(parts), {}, self.accelerator.device.type
        enabled = self.settings.precision == "bf16"
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

    def run(
        self,
        compute: Callable[[int, np.ndarray, list[int]], dict[str, float]],
        after: Callable[[int], None],
        logs: TrainingLogs,
        checkpoints: Checkpoints,
    ) -> None:
        """The steps that are left. ``compute(step, rows, their indices)`` leaves gradients behind and returns what is
        logged, "loss" among it; ``after(steps done)`` is called after each step.

        Raises :class:`StoppedError` after the step in which a stop signal came to any process, its checkpoint written,
        :class:`DivergedError` when too many gradients in a row were not finite, and what reading the text raises, a
        checkpoint written before it.
        """
        steps, rows_per_step = self.settings.steps, self.settings.rows_per_step
        main = self.accelerator.is_main_process
        batches = self.rows.batches(self.first_step, rows_per_step)
        bar = tqdm(total=steps, initial=self.first_step, unit="step", desc="train", smoothing=0.05, disable=not main)
        logs.start_clock(self.first_step)
        with StopSignals() as stop, bar:
            upcoming = next(batches) if self.first_step < steps else None
            for step in range(self.first_step, steps):
                rows_BN, indices, data_state = upcoming
                self._seed_dropout(step)
                measured = compute(step, rows_BN, indices)
                measured |= self._update(step, measured["loss"])
                done, last, unreadable = step + 1, step + 1 == steps, None
                if main and (done % logs.every == 0 or last):
                    logs.metrics(done, steps, rows_per_step * self.rows.max_length, measured)
                bar.update()
                bar.set_postfix(loss=f"{measured['loss']:.3f}", refresh=False)
                after(done)
                try:
                    upcoming = None if last else next(batches)
                except UserError as error:  # what was trained so far is not lost to a text that breaks off
                    unreadable = error
                stopped, broken = self.sum_over_processes(stop.received is not None, unreadable is not None)
                if checkpoints.due(done) or last or stopped or broken:
                    self._save(checkpoints, done, data_state)
                if broken:  # in every process, or the others would ask for another start
                    raise unreadable or DataFileError("another process cannot read its text; its message says why")
                if stopped and not last:
                    why = stop.received or "a signal to another process"
                    raise StoppedError(f"stopped by {why} after step {done}; go on with --resume auto")

    def _seed_dropout(self, step: int) -> None:
        stream = f"dropout {self.accelerator.process_index}"
        torch.manual_seed(int(generator(self.seed, stream, step).integers(2**63)))

    def _update(self, step: int, loss: float) -> dict[str, float]:
        """Clip the gradient and take the optimiser's step, unless something is not finite: then count it."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(step, settings)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), settings.grad_clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.module)
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            warnings.warn(f"step {step + 1} is skipped: loss {loss}, gradient norm {norm}", stacklevel=2)
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= settings.max_skipped_steps:
            raise DivergedError(
                f"the gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {step + 1}; go on "
                f"from the last checkpoint with a lower optimizer.lr than {settings.lr} (--resume auto --optimizer.lr "
                "LR --may_change optimizer.lr), or in the same way with optimizer.precision fp32"
            )
        return {"grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"], "skipped_steps": self.skipped}

    @property
    def result(self) -> torch.nn.Module:
        """The module that is measured and kept: the moving average where there is one."""
        return self.module if self.average is None else self.average.module

    def result_weights(self) -> dict[str, torch.Tensor]:
        """Its weights, whole, in the main process; every process has to ask."""
        if self.average is not None:
            return self.average.module.state_dict()
        return get_state_dict(self.module, [], options=WHOLE)[0]

    def _save(self, checkpoints: Checkpoints, done: int, data_state: dict) -> None:
        """A checkpoint of everything that the next step depends on."""
        model, optimizer = get_state_dict(self.module, self.optimizer, options=WHOLE)
        data = {}
        for of_a_process in gather_object([data_state]):
            data |= of_a_process
        if self.accelerator.is_main_process:
            state = {
                "step": done,
                "model": model,
                "optimizer": optimizer,
                "average": {} if self.average is None else self.average.state_dict(),
                "data": data,
                "skipped": (self.skipped, self.skipped_in_a_row),
            }
            checkpoints.save(state)
        self.accelerator.wait_for_everyone()

    def _restore(self, state: dict) -> None:
        weights = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.module, self.optimizer, **weights, options=StateDictOptions(full_state_dict=True))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.rows.load_state(state["data"])
        self.first_step, (self.skipped, self.skipped_in_a_row) = state["step"], state["skipped"]

    def finish(self, final: Path, write: Callable[[Path], None]) -> Path:
        """Let the main process ``write`` the run's last folder, which is there whole or not at all; a stop signal that
        comes meanwhile is no longer needed."""
        with StopSignals():
            if self.accelerator.is_main_process:
                with whole_folder(final) as folder:
                    write(folder)
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        return final
