"""Checkpoints that are either whole or absent, and finding the newest."""

import os
import re
import shutil
import warnings
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch

from ..errors import ConfigError, DiskSpaceError, OutputDirError, reason

STEP_DIR = re.compile(r"step-(\d+)$")
# settings that may differ when a run goes on: they change what is written, or how fast, not what is computed
FREE_KEYS = (
    *("output_dir", "resume", "num_threads", "checkpoint_every", "keep_checkpoints", "log_every", "wandb"),
    *("validation", "held_out", "fsdp", "compile", "gradient_checkpointing"),
    *("optimizer.rows_per_pass", "optimizer.max_skipped_steps", "data.num_workers"),
)


def save_checkpoint(folder: Path, state: dict, keep: int) -> Path:
    """Write ``folder/step-NNNNNNN`` under another name and rename it when it is complete; all but the ``keep`` newest
    are removed."""
    name = f"step-{state['step']:07d}"
    final, partial = folder / name, folder / f".partial-{name}"
    for unfinished in folder.glob(".*-step-*"):  # as a kill leaves it
        shutil.rmtree(unfinished)
    partial.mkdir(parents=True)
    with open(partial / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        _remove(final)
    os.replace(partial, final)
    for old in checkpoints(folder)[:-keep]:
        _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which has no longer its name while only a part of it is there."""
    removed = checkpoint.with_name(f".removed-{checkpoint.name}")
    os.replace(checkpoint, removed)
    shutil.rmtree(removed)


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
            with ZipFile(path / "state.pt") as archive:  # torch.load does not look at the checksums
                if damaged := archive.testzip():
                    raise BadZipFile(f"wrong checksum of {damaged}")
            return path
        except (OSError, BadZipFile) as error:
            warnings.warn(f"skipping the damaged checkpoint {path}: {reason(error)}", stacklevel=2)
    if found:
        raise OutputDirError(f"no checkpoint in {folder} can be read; remove the folder to begin afresh")
    return None


def load_checkpoint(path: Path) -> dict:
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def require_disk_space(folder: Path, state_bytes: int, keep: int) -> None:
    """Raise :class:`DiskSpaceError` where ``keep`` checkpoints and the one being written would not fit."""
    present = sum((path / "state.pt").stat().st_size for path in checkpoints(folder))
    need, free = (keep + 1) * state_bytes - present, shutil.disk_usage(folder.parent).free
    if need > free:
        raise DiskSpaceError(
            f"the checkpoints in {folder} need about {need / 2**30:.3g} GiB more and {free / 2**30:.3g} GiB is free; "
            "make room, choose another --output_dir, or keep fewer with --keep_checkpoints"
        )


def require_same_settings(out: Path, there: dict, now: dict) -> None:
    """Raise :class:`ConfigError` that names each setting that a run cannot change."""
    there, now = _flat(there), _flat(now)
    keys = [k for k in sorted({*there, *now}) if not any(k == free or k.startswith(f"{free}.") for free in FREE_KEYS)]
    changed = [f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys if there.get(k) != now.get(k)]
    if changed:
        raise ConfigError(
            f"{out} was trained with other settings ({', '.join(changed)}); restore them, or choose another "
            "--output_dir"
        )


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings by dotted names."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
