"""The comparison over a grid of settings: a run a cell, what they show side by side, and what is no grid."""

import json

import pytest

from asarm.errors import ConfigError, OutputDirError
from asarm.evals import run as run_module
from asarm.evals.config import SpeculativeConfig
from asarm.evals.grid import evaluate_grid, grid_report
from asarm.samplers import SAMPLERS

SMALL = {"dataset": "samples", "max_length": 16, "batch_size": 3}


def test_a_grid_is_a_run_a_cell_and_finished_cells_are_not_run_again(tmp_path, without_figures, monkeypatch):
    grid = {"k": [2], "order": ["any-subset", "left-to-right"]}
    small = SMALL | {"num_sequences": 3, "samplers": ["sequential", "assd"], "grid": grid}
    one = evaluate_grid(SpeculativeConfig(output_dir=str(tmp_path / "one"), **small))
    assert one["complete"] and [c["settings"] for c in one["cells"]] == [{"k": 2, "order": o} for o in grid["order"]]
    cell = json.loads((tmp_path / "one" / "k=2,order=left-to-right" / "summary.json").read_text())
    assert cell["config"]["k"] == 2 and cell["samplers"] == one["cells"][1]["samplers"]
    assert len(grid_report(one).splitlines()) == 1 + 2 * 2 and (tmp_path / "one" / "grid.png").stat().st_size > 10_000

    first = evaluate_grid(SpeculativeConfig(output_dir=str(tmp_path / "two"), shard="0/2", **small))
    assert not first["complete"] and (first["recorded"], first["expected"]) == (8, 12)
    assert not (tmp_path / "two" / "grid.json").exists()
    second = evaluate_grid(SpeculativeConfig(output_dir=str(tmp_path / "two"), shard="1/2", **small))
    for cell, same in zip(one["cells"], second["cells"], strict=True):
        for name, row in cell["samplers"].items():
            assert same["samplers"][name]["nfe_per_token"] == row["nfe_per_token"]

    monkeypatch.setattr(run_module, "load", None)  # nothing is left that needs a model
    assert evaluate_grid(SpeculativeConfig(output_dir=str(tmp_path / "one"), **small))["cells"] == one["cells"]
    with pytest.raises(OutputDirError, match="num_sequences: 3 there, 4 now"):
        evaluate_grid(SpeculativeConfig(output_dir=str(tmp_path / "one"), **small | {"num_sequences": 4}))


@pytest.mark.slow
def test_a_grid_over_models_and_samplers(tmp_path, without_figures):
    """One of the models has no draft head; the samplers are a setting and what the results are filed under."""
    grid = {"model": ["tiny-english", "tiny-code"], "samplers": [[], ["parallel", "parallel:2"]]}
    small = SMALL | {"num_sequences": 2, "grid": grid, "output_dir": str(tmp_path)}
    result = evaluate_grid(SpeculativeConfig(**small))
    assert [cell["settings"]["samplers"] for cell in result["cells"]] == 2 * grid["samplers"]
    pair, headless = grid["samplers"][1], [name for name in SAMPLERS if "head" not in name]
    assert [list(cell["samplers"]) for cell in result["cells"]] == [[*SAMPLERS], pair, headless, pair]
    assert json.loads((tmp_path / "grid.json").read_text()) == result
    assert (tmp_path / "grid.png").stat().st_size > 10_000
    lines = [line.split() for line in grid_report(result).splitlines()]
    assert lines[8][:4] == ["tiny-english", "['parallel',", "'parallel:2']", "parallel"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"kk": [1]}, "grid must be made of settings .* got 'kk'"),
        ({"k": 3}, "grid.k must be a list of values of type int, got 3"),
        ({"k": ["a"]}, "grid.k must be a list"),
        ({"limit": [2, "x"]}, r"grid.limit must be a list of values of type int \| None, got \[2, 'x'\]"),
        ({"top_p": ["x"]}, r"grid.top_p must be a list of values of type float \| None"),
        ({"samplers": ["assd"]}, r"grid.samplers must be a list of values of type list\[str\], got \['assd'\]"),
        ({"samplers": [[1]]}, "grid.samplers must be"),
        ({"k": []}, "grid.k"),
        ({"k": [0]}, "k must be at least 1, got 0"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_at_once(grid, message):
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig(grid=grid)
