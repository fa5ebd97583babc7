"""What a training process does first: its place among the others, the run's folder, the checkpoint to go on from.

What can be refused without a model and without text is refused here.
"""

from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

from ..engine import multiplies_bfloat16, warn_if_emulated
from ..errors import OutputDirError
from ..runlog import prepare_output_dir
from .checkpoint import checkpoints, load_checkpoint, newest_valid, require_disk_space, require_same_settings
from .config import TrainConfig
from .head_config import TrainHeadConfig

WAIT = timedelta(hours=4)  # while the main process validates
CHECKPOINTS, BEST, FINAL = "checkpoints", "best", "final"  # folders of a run


@dataclass(frozen=True)
class Run:
    """A training run as one of its processes sees it: the settings, with a precision that is no longer auto, and the
    checkpoint to go on from, if there is one."""

    config: TrainConfig | TrainHeadConfig
    accelerator: Accelerator
    folder: Path
    checkpoint: Path | None

    @property
    def settings(self) -> dict:
        """The settings as plain values."""
        return asdict(self.config)


def start(config: TrainConfig | TrainHeadConfig) -> Run:
    """Join the run's processes; raises for a folder that holds another run, or this one unless it is resumed."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    # unless it is told so, accelerate takes processes without GPUs for separate runs
    cpu, log_with = not torch.cuda.is_available(), "wandb" if config.wandb else None
    accelerator = Accelerator(cpu=cpu, log_with=log_with, kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)])
    config.optimizer.require_divides(accelerator.num_processes)
    out = prepare_output_dir(config.output_dir)
    if config.resume == "never" and holds_a_run(out):
        raise OutputDirError(f"{out} already holds a run; go on with it with --resume, or choose another --output_dir")
    accelerator.wait_for_everyone()  # before the main process writes there
    checkpoint = None if config.resume == "never" else _newest(out, accelerator, must=config.resume == "must")
    saved = {} if checkpoint is None else load_checkpoint(checkpoint, mmap=True)["config"]
    precision = config.optimizer.precision
    if saved and precision == "auto":  # whatever it goes on on
        precision = saved["optimizer"]["precision"]
    precision = precision_on(accelerator.device, precision)
    config = replace(config, optimizer=replace(config.optimizer, precision=precision))
    if saved:
        require_same_settings(out, saved, asdict(config), config.may_change)
    return Run(config, accelerator, out, checkpoint)


def holds_a_run(folder: Path) -> bool:
    return bool(checkpoints(folder / CHECKPOINTS)) or any((folder / name).exists() for name in (BEST, FINAL))


def _newest(out: Path, accelerator: Accelerator, must: bool) -> Path | None:
    """The checkpoint to go on from, the same in every process."""
    found = [newest_valid(out / CHECKPOINTS) if accelerator.is_main_process else None]
    (path,) = broadcast_object_list(found)
    if path is None and must:
        raise OutputDirError(
            f"{out} holds no checkpoint to go on from; use --resume auto, or name the run's folder with --output_dir"
        )
    return path


def precision_on(device: torch.device, precision: str) -> str:
    """bf16 or fp32; warns of bf16 on a device that has to emulate it."""
    if precision == "auto":
        return "bf16" if multiplies_bfloat16(device) else "fp32"
    if precision == "bf16":
        warn_if_emulated(device, torch.bfloat16, "optimizer.precision fp32")
    return precision


def require_room(folder: Path, module: torch.nn.Module, averaged: bool, keep: int) -> None:
    """Raise :class:`~asarm.errors.DiskSpaceError` where ``keep`` checkpoints of a run in ``folder`` that trains
    ``module``, and keeps an average if it is ``averaged``, would not fit."""
    copies = 4 if averaged else 3  # the weights, two moments, the average
    n_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    require_disk_space(folder / CHECKPOINTS, n_bytes * copies, keep)
