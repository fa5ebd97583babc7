"""Checkpoints that are either whole or absent, and finding the newest."""

import os
import re
import shutil
import warnings
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch

from ..errors import OutputDirError, reason

STEP_DIR = re.compile(r"step-(\d+)$")
KEPT = 2  # newest checkpoints that are not pruned


def save_checkpoint(
    folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict
) -> Path:
    """Write ``folder/step-NNNNNNN`` under another name and rename it when it is complete; prune the oldest."""
    final = folder / f"step-{step:07d}"
    partial = folder / f".partial-{step:07d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "config": config,
    }
    with open(partial / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if STEP_DIR.search(path.name))


def load_newest(folder: Path) -> dict | None:
    """The state saved last that can be read, or None where nothing was saved.

    A damaged one is skipped with a warning; raises :class:`OutputDirError` where all are.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return _load_whole(path / "state.pt")
        except (OSError, BadZipFile) as error:
            warnings.warn(f"skipping the damaged checkpoint {path}: {reason(error)}", stacklevel=2)
    if found:
        raise OutputDirError(f"no checkpoint in {folder} can be read; remove the folder to begin afresh")
    return None


def _load_whole(path: Path) -> dict:
    """A state file whose checksums are right; raises ``BadZipFile`` for another (``torch.load`` does not look)."""
    with ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise BadZipFile(f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)
