"""Figures of the comparison of samplers, from its records and their summary alone.

Each form of sampler has the colour and the marker of its record in every figure.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..samplers import REFERENCE, find_sampler, form_of
from .metrics import judge_nll_per_token

DASHES = ("-", "--", ":", "-.")
Rows = dict[str, dict]  # a summary's row by sampler
Records = dict[str, list[dict]]


def draw_plots(folder: Path, records: Records, rows: Rows, margin: float) -> list[Path]:
    """Every figure that the records have the matter for, for each model of the run; returns the files.

    A figure of a baseline has its name in the file's.
    """
    written = []
    for model in dict.fromkeys(model_of(name) for name in rows):
        mine = {name.removeprefix(model): row for name, row in rows.items() if model_of(name) == model}
        own_records = {name: records[model + name] for name in mine}
        figures = {
            "histograms": histograms(own_records),
            "acceptance": acceptance(own_records),
            "calls_by_k": calls_by_k(mine),
            "quality_by_calls": quality_by_calls(mine, margin),
            "equivalence": equivalence(mine, margin),
        }
        suffix = re.sub(r"[^A-Za-z0-9.-]+", "_", f"-{model}").strip("_-")
        for name, figure in figures.items():
            if figure is not None:
                path = folder / (f"{name}-{suffix}.png" if suffix else f"{name}.png")
                figure.savefig(path, dpi=150)
                written.append(path)
    return written


def model_of(system: str) -> str:
    """The part of a system's name before its sampler: empty for the run's own model, else a baseline and a space."""
    return system[: system.rfind(" ") + 1]


def _style(sampler: str) -> dict:
    record = find_sampler(sampler)
    return {"color": record.colour, "marker": record.marker}


def _lines(rows: Rows) -> dict[str, list[dict]]:
    """Rows by form of sampler, in order of k."""
    lines = {}
    for name, row in rows.items():
        lines.setdefault(form_of(name), []).append(row)
    return {form: sorted(line, key=lambda row: row["k"]) for form, line in lines.items()}


def histograms(records: Records) -> Figure:
    """Log-probability, and the judge's perplexity where there is one: a line of panels a sampler, the reference behind
    each."""
    measures: dict[str, Callable[[dict], float]] = {
        "log-probability per token (nats)": lambda r: r["log_prob"] / r["masked"]
    }
    if all("judge_nll" in r for of_sampler in records.values() for r in of_sampler):
        measures["judge's perplexity"] = lambda r: math.exp(judge_nll_per_token(r))
    names = list(records)
    figure = Figure(figsize=(1 + 4 * len(measures), 0.8 + 0.85 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(measures), sharex="col", sharey="col", squeeze=False)
    for column, (label, value) in enumerate(measures.items()):
        values = {name: np.array([value(r) for r in records[name]]) for name in names}
        logarithmic = "perplexity" in label
        every = np.concatenate(list(values.values()))
        low, high = np.quantile(every, [0.002, 0.998])
        bins = np.geomspace(low, high, 41) if logarithmic else np.linspace(low, high, 41)
        for panel, name in zip(panels[:, column], names, strict=True):
            _histogram(panel, values, name, bins)
            if logarithmic:
                panel.set_xscale("log")
        panels[-1, column].set_xlabel(label)
    for panel, name in zip(panels[:, 0], names, strict=True):
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"share of the sequences; grey: {REFERENCE}, dashed: mean", fontsize=9)
    return figure


def _histogram(panel: Axes, values: dict[str, np.ndarray], name: str, bins: np.ndarray) -> None:
    def share(v: np.ndarray) -> np.ndarray:
        return np.full(len(v), 1 / len(v))

    colour = find_sampler(name).colour
    if REFERENCE in values:
        reference = np.clip(values[REFERENCE], bins[0], bins[-1])
        panel.hist(reference, bins, weights=share(reference), color="#BBBBBB")
    if name != REFERENCE:
        own = np.clip(values[name], bins[0], bins[-1])
        panel.hist(own, bins, weights=share(own), histtype="step", color=colour, linewidth=1.4)
    panel.axvline(values[name].mean(), color=colour, linestyle="--", linewidth=1)
    panel.set_yticks([])
    panel.spines[["left", "right", "top"]].set_visible(False)


def acceptance(records: Records) -> Figure | None:
    """Share of the tested drafts that were kept, by draft index."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = Counter()
    for name, of_sampler in records.items():
        proposed, accepted = (
            np.sum([record[key] for record in of_sampler], axis=0) for key in ("proposed_by_index", "accepted_by_index")
        )
        index = np.flatnonzero(proposed)
        if len(index):
            dashes = DASHES[lines[form_of(name)] % len(DASHES)]  # the same form with another k
            lines[form_of(name)] += 1
            share = accepted[index] / proposed[index]
            axes.plot(index + 1, share, dashes, **_style(name), label=name, markersize=5, alpha=0.8)
    if not lines:
        return None
    axes.set(xlabel="draft index in the round", ylabel="share of the drafts kept", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("a draft is kept only if all before it are; the first of a two-pass round is exact", fontsize=9)
    _finish(figure, axes)
    return figure


def calls_by_k(rows: Rows) -> Figure | None:
    """Network calls and seconds against k; the reference is dotted."""
    forms = {form: line for form, line in _lines(rows).items() if form != REFERENCE}
    if not forms:
        return None
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"nfe_per_token": "network calls per token", "seconds_per_sequence": "seconds per sequence"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for form, line in forms.items():
            _with_intervals(axes, form, [row["k"] for row in line], line, key)
        if REFERENCE in rows:
            axes.axhline(rows[REFERENCE][key], color="black", linestyle=":", label=REFERENCE)
        axes.set(xlabel="k (tokens drafted a round)", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, *panels)
    return figure


def quality_by_calls(rows: Rows, margin: float) -> Figure:
    """Likelihood, and the judge's where there is one, against network calls: exact samplers stay at the reference's
    height, ``parallel`` does not."""
    keys = {"log_prob_per_token": "log-probability per token (nats)"}
    if all("judge_nll_per_token" in row for row in rows.values()):
        keys["judge_nll_per_token"] = "judge's negative log-likelihood per token (nats)"
    figure = Figure(figsize=(1 + 5.2 * len(keys), 4.2), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, (key, label) in zip(panels, keys.items(), strict=True):
        if REFERENCE in rows:
            level = rows[REFERENCE][key]
            axes.axhspan(level - margin, level + margin, color="#DDDDDD", label=f"{REFERENCE} ± {margin:g}")
        for form, line in _lines(rows).items():
            _with_intervals(axes, form, [row["nfe_per_token"] for row in line], line, key)
        axes.set(xlabel="network calls per token", ylabel=label, xlim=(0, 1.05))
        if key == "judge_nll_per_token":
            axes.invert_yaxis()  # better is higher, as beside it
    _finish(figure, *panels)
    return figure


def equivalence(rows: Rows, margin: float) -> Figure | None:
    """Difference from the reference with its 95 % interval, the margin shaded."""
    found = {name: row["versus_sequential"] for name, row in rows.items() if row.get("versus_sequential")}
    if not found:
        return None
    titles = {"log_prob_per_token": "log-probability (nats/token)", "entropy": "entropy (bits)"}
    titles |= {"judge_nll_per_token": "judge's NLL (nats/token)"}
    keys = [key for key in titles if all(key in row for row in found.values())]
    figure = Figure(figsize=(2 + 3.4 * len(keys), 1.2 + 0.32 * len(found)), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        axes.axvspan(-margin, margin, color="#DDDDDD")
        axes.axvline(0, color="black", linewidth=0.8)
        for y, (name, row) in enumerate(found.items()):
            x, low, high = (row[key][f"difference{end}"] for end in ("", "_low", "_high"))
            axes.plot([low, high], [y, y], marker="|", color=_style(name)["color"])
            axes.plot(x, y, markersize=6, **_style(name))
        axes.set_title(titles[key], fontsize=9)
        axes.set_xscale("symlog", linthresh=2 * margin)  # the margin and a biased sampler in one picture
        axes.set_xticks([-1, -margin, 0, margin, 1], [f"{x:g}" for x in (-1, -margin, 0, margin, 1)])
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(found)), [f"{name}: {row[keys[0]]['verdict']}" for name, row in found.items()])
    panels[0].invert_yaxis()
    figure.get_layout_engine().set(wspace=0.06)
    figure.supxlabel(f"difference from {REFERENCE}, 95 % interval; margin ± {margin:g} shaded", fontsize=9)
    return figure


def grid_figure(grid: dict[str, list], cells: list[dict]) -> Figure:
    """Measures of every sampler against the grid's first setting, a column of panels for each value of the others.

    A cell holds its ``settings`` and, under ``samplers``, the rows of its summary; a sampler's line has a point for
    each cell that ran it. Baselines are left to the table.
    """
    labels = {
        "nfe_per_token": "calls/token",
        "seconds_per_sequence": "s/sequence",
        "log_prob_per_token": "log-prob/token",
    }
    first, *others = grid
    columns = list(product(*(grid[key] for key in others)))
    figure = Figure(figsize=(2.2 + 3.4 * len(columns), 1 + 2.3 * len(labels)), layout="constrained")
    panels = figure.subplots(len(labels), len(columns), sharex=True, sharey="row", squeeze=False)
    numeric = all(isinstance(value, int | float) for value in grid[first])
    for column, values in enumerate(columns):
        point = dict(zip(others, values, strict=True))
        mine = [cell for cell in cells if all(cell["settings"][key] == value for key, value in point.items())]
        places = grid[first] if numeric else range(len(grid[first]))
        x = [places[grid[first].index(cell["settings"][first])] for cell in mine]
        for name in dict.fromkeys(name for cell in mine for name in cell["samplers"] if not model_of(name)):
            having = [number for number, cell in enumerate(mine) if name in cell["samplers"]]
            line = [mine[number]["samplers"][name] for number in having]
            for axes, key in zip(panels[:, column], labels, strict=True):
                _with_intervals(axes, name, [x[number] for number in having], line, key)
        panels[0, column].set_title(", ".join(f"{key} = {value}" for key, value in point.items()), fontsize=9)
        panels[-1, column].set_xlabel(first)
        panels[-1, column].set_xticks(x, [str(cell["settings"][first]) for cell in mine])
    for axes, label in zip(panels[:, 0], labels.values(), strict=True):
        axes.set_ylabel(label)
    _finish(figure, *panels.flat)
    return figure


def _with_intervals(axes: Axes, label: str, x: list[float], line: list[dict], key: str) -> None:
    y = np.array([row[key] for row in line])
    error = [y - [row[f"{key}_low"] for row in line], [row[f"{key}_high"] for row in line] - y]
    axes.errorbar(x, y, yerr=np.maximum(error, 0), capsize=2, markersize=6, linewidth=1.2, label=label, **_style(label))


def _finish(figure: Figure, *panels: Axes) -> None:
    """Grid lines, and one legend beside all panels."""
    for axes in panels:
        axes.grid(alpha=0.3)
    shown = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize=8, frameon=False)
