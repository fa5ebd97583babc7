"""Checkpoints that are either whole or absent, and finding the newest."""

import os
import re
import shutil
from pathlib import Path

import torch

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
    """The state saved last, or None where there is none."""
    found = checkpoints(folder)
    return torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True) if found else None
