"""Ablations: one comparison of samplers a cell of a grid of settings, and what they show side by side.

All cells are checked before the first one runs. Every process of a Slurm array, or of ``accelerate launch``, does its
share of the sequences of every cell; the last one finds all cells finished and writes the table and the figure.
"""

import json
from dataclasses import asdict
from functools import lru_cache

from ..loading import load
from ..runlog import prepare_output_dir, provenance, write_json
from .config import SpeculativeConfig
from .plots import grid_figure
from .records import check_same
from .speculative import Comparison
from .stats import aligned, with_interval

COLUMNS = {
    "nfe_per_token": "NFE/token",
    "seconds_per_sequence": "s/sequence",
    "log_prob_per_token": "log-prob/token",
    "entropy": "entropy (bits)",
}


def evaluate_grid(config: SpeculativeConfig) -> dict:
    """Run, or go on with, every cell; returns what ``grid.json`` holds if all are complete."""
    folder, cells = prepare_output_dir(config.output_dir), config.cells()
    load_once = lru_cache(maxsize=1)(load)  # for as many cells on end as have the same model
    for cell in cells:  # the last one's mistake must not show when the others are done
        if finished(cell) is None:
            Comparison(cell).check(load_once)
    summaries = [finished(cell) or Comparison(cell).run(load_once) for cell in cells]
    # another process may have finished a cell since this one left it
    summaries = [finished(cell) or summary for cell, summary in zip(cells, summaries, strict=True)]
    counts = {key: sum(summary[key] for summary in summaries) for key in ("recorded", "expected")}
    state = {"complete": all(summary["complete"] for summary in summaries)} | counts
    if not state["complete"]:
        return state
    rows = [
        {"settings": {key: getattr(cell, key) for key in config.grid}, "samplers": summary["samplers"]}
        for cell, summary in zip(cells, summaries, strict=True)
    ]
    origin = {"grid": config.grid, "config": asdict(config), "provenance": provenance()}
    result = state | {"cells": rows} | origin
    write_json(folder / "grid.json", result)
    grid_figure(config.grid, rows).savefig(folder / "grid.png", dpi=150)
    return result


def finished(cell: SpeculativeConfig) -> dict | None:
    """The summary of a cell that is complete, its judge's reading included; an error if it is of another run."""
    folder = prepare_output_dir(cell.output_dir)
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text(encoding="utf-8"))
    check_same(folder, asdict(type(cell)()) | summary["config"], asdict(cell))
    return summary if summary["config"]["judge"] == cell.judge else None


def grid_report(result: dict) -> str:
    """A line for every cell and sampler."""
    grid = result["grid"]
    lines = [[*grid, "sampler", *COLUMNS.values(), "log-prob/token as sequential"]]
    for cell in result["cells"]:
        for name, row in cell["samplers"].items():
            verdict = row["versus_sequential"].get("log_prob_per_token", {}).get("verdict", "")
            values = [with_interval(row, key) for key in COLUMNS]
            lines.append([*map(str, cell["settings"].values()), name, *values, verdict])
    return aligned(lines)
