"""Checkpoints that are either whole or absent, and finding the newest."""

import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch

from ..errors import ConfigError, DiskSpaceError, OutputDirError, reason
from ..pretrained import STATE
from ..runlog import remove_folder, whole_folder

STEP_DIR = re.compile(r"step-(\d+)$")
# Settings that may differ when a run goes on: they change what is written, how fast, or the rounding, but not the task
# (rows_per_pass also changes which numbers dropout draws)
FREE_KEYS = (
    *("output_dir", "resume", "num_threads", "checkpoint_every", "keep_checkpoints", "log_every", "wandb"),
    *("validation", "held_out", "fsdp", "compile", "gradient_checkpointing", "may_change"),
    *("optimizer.rows_per_pass", "optimizer.max_skipped_steps", "data.num_workers"),
)


PARTS = ("step", "model", "optimizer", "average", "data", "skipped", "config")  # of a checkpoint's state


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints ``step-NNNNNNN`` of a run in ``folder``, one every ``every`` steps, of which the ``keep`` newest
    stay. A state holds the run's ``settings``; with the files that ``describe`` writes beside it, a checkpoint is a
    model like any other."""

    folder: Path
    every: int
    keep: int
    settings: dict
    describe: Callable[[Path], None]

    def due(self, done: int) -> bool:
        return done % self.every == 0

    def save(self, state: dict) -> Path:
        """Write the checkpoint of a state (``PARTS`` but for the settings), and remove those that are too old.

        Raises :class:`OutputDirError` where it cannot be written; those before it are still there.
        """
        final = self.folder / f"step-{state['step']:07d}"
        for unfinished in self.folder.glob(".*-step-*"):  # as a kill leaves it
            shutil.rmtree(unfinished)
        try:
            with whole_folder(final) as partial:
                self.describe(partial)
                with open(partial / STATE, "wb") as file:
                    torch.save(state | {"config": self.settings}, file)
        except (OSError, RuntimeError) as error:  # torch's own, where the disk is full
            raise OutputDirError(
                f"cannot write the checkpoint {final}: {reason(error)}; make room and go on with --resume auto"
            ) from error
        for old in checkpoints(self.folder)[: -self.keep]:
            remove_folder(old)
        return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if STEP_DIR.search(path.name))


def newest_valid(folder: Path) -> Path | None:
    """The checkpoint saved last that is not damaged, or None where nothing was saved.

    A damaged one is skipped with a warning; raises :class:`OutputDirError` where all are.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            with ZipFile(path / STATE) as archive:  # torch.load does not look at the checksums
                if damaged := archive.testzip():
                    raise BadZipFile(f"wrong checksum of {damaged}")
            return path
        except (OSError, BadZipFile) as error:
            warnings.warn(f"skipping the damaged checkpoint {path}: {reason(error)}", stacklevel=2)
    if found:
        raise OutputDirError(f"no checkpoint in {folder} can be read; remove the folder to begin afresh")
    return None


def load_checkpoint(path: Path, mmap: bool = False) -> dict:
    """Its state; with ``mmap`` tensors are read from the disk only where they are looked at."""
    state = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=mmap)
    if missing := [part for part in PARTS if part not in state]:
        raise OutputDirError(f"{path} is no checkpoint of a training run: it has no {', '.join(missing)}")
    return state


def require_disk_space(folder: Path, state_bytes: int, keep: int) -> None:
    """Raise :class:`DiskSpaceError` where ``keep`` checkpoints and the one being written would not fit."""
    present = sum(file.stat().st_size for path in checkpoints(folder) for file in path.glob(STATE))
    need, free = (keep + 1) * state_bytes - present, shutil.disk_usage(folder.parent).free
    if need > free:
        raise DiskSpaceError(
            f"the checkpoints in {folder} need about {need / 2**30:.3g} GiB more and {free / 2**30:.3g} GiB is free; "
            "make room, choose another --output_dir, or keep fewer with --keep_checkpoints"
        )


def require_same_settings(out: Path, there: dict, now: dict, may_change: Sequence[str] = ()) -> None:
    """Raise :class:`ConfigError` that names each setting that a run cannot change, unless it ``may_change``."""
    there, now = _flat(there), _flat(now)
    if unknown := sorted(set(may_change) - {*there, *now}):
        raise ConfigError(f"may_change names {unknown}, which are no settings; name them as in optimizer.lr")
    free_keys = (*FREE_KEYS, *may_change)
    keys = [k for k in sorted({*there, *now}) if not any(k == free or k.startswith(f"{free}.") for free in free_keys)]
    changed = [f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys if there.get(k) != now.get(k)]
    if changed:
        raise ConfigError(
            f"{out} was trained with other settings ({', '.join(changed)}); restore them, choose another --output_dir, "
            "or say with --may_change which of them the run may change from here on"
        )


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings by dotted names."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
