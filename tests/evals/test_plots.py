"""Figures show what the records hold: the drawn data against numbers worked out by hand."""

import numpy as np
import pytest

from asarm.evals import plots
from asarm.evals.config import SpeculativeConfig
from asarm.evals.speculative import summarise


def record(sampler: str, index: int, k: int = 2, log_prob: float = -10.0, **other) -> dict:
    basis = {"sampler": sampler, "index": index, "k": k, "masked": 4, "nfe": 4, "aux_nfe": 0, "rounds": 4}
    basis |= {"seconds": 0.5, "entropy": 3.0, "distinct_1": 1.0, "distinct_2": 1.0, "lossless": True}
    counts = {"proposed_by_index": [0] * k, "accepted_by_index": [0] * k}
    return basis | counts | {"log_prob": log_prob + 0.1 * index, "text": "x"} | other


@pytest.fixture
def records() -> dict[str, list[dict]]:
    return {
        "sequential": [record("sequential", i) for i in range(3)],
        "assd": [record("assd", i, nfe=2, proposed_by_index=[0, 4], accepted_by_index=[0, i]) for i in range(3)],
        "assd:3": [
            record("assd:3", i, 3, nfe=1, proposed_by_index=[0, 2, 2], accepted_by_index=[0, 2, 1]) for i in range(3)
        ],
        "parallel": [record("parallel", i, log_prob=-20.0 - i % 2, lossless=False) for i in range(3)],
    }


def rows_of(records, **settings) -> dict[str, dict]:
    return summarise(records, SpeculativeConfig(**settings))


def drawn(axes) -> dict[str, list[list[float]]]:
    """Points of each labelled line."""
    lines = {line.get_label(): line for line in axes.get_lines()}
    bars = {c.get_label(): c.lines[0] for c in axes.containers if hasattr(c, "lines")}
    return {label: np.transpose(line.get_data()).tolist() for label, line in (lines | bars).items() if label[0] != "_"}


def test_acceptance_is_the_share_of_the_tested_drafts_by_index(records):
    [axes] = plots.acceptance(records).axes
    assert drawn(axes) == {"assd": [[2, 0.25]], "assd:3": [[2, 1.0], [3, 0.5]]}
    assert plots.acceptance({"sequential": records["sequential"]}) is None


def test_calls_against_k_join_the_samplers_of_one_form(records):
    calls, seconds = plots.calls_by_k(rows_of(records)).axes[:2]
    assert drawn(calls)["assd"] == [[2, 0.5], [3, 0.25]] and drawn(calls)["parallel"] == [[2, 1.0]]
    assert drawn(seconds)["assd"] == [[2, 0.5], [3, 0.5]]
    assert plots.calls_by_k(rows_of({"sequential": records["sequential"]})) is None


def test_quality_against_calls_with_the_margin_around_the_reference(records):
    rows = rows_of(records)
    [axes] = plots.quality_by_calls(rows, 0.1).axes
    assert drawn(axes)["sequential"][0] == pytest.approx([1, -9.9 / 4])
    [band] = axes.patches
    assert band.get_y() == pytest.approx(-9.9 / 4 - 0.1) and band.get_height() == pytest.approx(0.2)


def test_a_histogram_a_sampler_and_a_column_a_measure(records):
    assert len(plots.histograms(records).axes) == 4
    judged = {n: [r | {"judge_nll": 2.0 + r["index"], "judge_tokens": 2} for r in rs] for n, rs in records.items()}
    panels = plots.histograms(judged).axes
    assert len(panels) == 8
    [mean] = panels[1].get_lines()
    assert mean.get_xdata()[0] == pytest.approx(np.mean(np.exp([1, 1.5, 2])))
    rows = rows_of(judged, judge="some-judge")
    assert len(plots.quality_by_calls(rows, 0.1).axes) == 2 and len(plots.equivalence(rows, 0.1).axes) == 3


def test_verdicts_stand_beside_the_differences(records):
    axes = plots.equivalence(rows_of(records), 0.1).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["assd: equivalent", "assd:3: equivalent", "parallel: different"]
    assert plots.equivalence(rows_of({"assd": records["assd"]}), 0.1) is None


def test_a_baseline_has_files_of_its_own(records, tmp_path):
    both = records | {f"some/model@v1 {name}": of_sampler for name, of_sampler in records.items()}
    files = {path.name for path in plots.draw_plots(tmp_path, both, rows_of(both), 0.1)}
    assert len(files) == 10 and {"acceptance.png", "acceptance-some_model_v1.png"} <= files
    assert plots.model_of("some/model@v1 assd+one-pass:3") == "some/model@v1 " and plots.model_of("assd") == ""


def test_a_grid_has_a_column_of_panels_for_each_value_of_its_second_setting(records):
    grid = {"order": ["any-subset", "left-to-right"], "max_length": [64, 128]}
    rows = rows_of(records)
    cells = [
        {"settings": {"order": o, "max_length": n}, "samplers": rows} for o in grid["order"] for n in grid["max_length"]
    ]
    figure = plots.grid_figure(grid, cells)
    assert len(figure.axes) == 6 and figure.axes[0].get_title() == "max_length = 64"
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == grid["order"]
    assert drawn(figure.axes[0])["assd"] == [[0, 0.5], [1, 0.5]]


def test_a_line_of_a_grid_has_a_point_for_each_cell_that_ran_the_sampler(records):
    """A model without a draft head has no row for it; the legend names what any panel shows."""
    rows = rows_of(records)
    grid = {"model": ["a", "b", "c"], "order": ["any-subset", "left-to-right"]}
    ran = {"a": ["sequential"], "b": ["sequential", "assd"], "c": ["assd"]}
    cells = [
        {"settings": {"model": m, "order": o}, "samplers": {name: rows[name] for name in names}}
        for m, names in ran.items()
        for o in grid["order"]
    ]
    cells[0]["samplers"]["parallel"] = cells[0]["samplers"].pop("sequential")
    figure = plots.grid_figure(grid, cells)
    first, second = figure.axes[:2]
    assert drawn(first) == {"sequential": [[1, 1.0]], "assd": [[1, 0.5], [2, 0.5]], "parallel": [[0, 1.0]]}
    assert drawn(second) == {"sequential": [[0, 1.0], [1, 1.0]], "assd": [[1, 0.5], [2, 0.5]]}
    [legend] = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"sequential", "assd", "parallel"}


def test_one_sequence_has_figures_but_no_verdicts(records, tmp_path):
    one = {name: of_sampler[:1] for name, of_sampler in records.items() if name != "assd:3"}
    files = plots.draw_plots(tmp_path, one, rows_of(one), 0.1)
    assert {path.stem for path in files} == {"histograms", "acceptance", "calls_by_k", "quality_by_calls"}
