"""Whatever is wrong with any cell of a grid, or any model of a run, is known before the first token is drawn."""

import shutil

import pytest
import yaml

from asarm import memory
from asarm.errors import ConfigError, DataFileError, MemoryBudgetError, ModelNotFoundError, OutputDirError
from asarm.evals import speculative
from asarm.evals.config import SpeculativeConfig
from asarm.evals.grid import evaluate_grid
from asarm.evals.speculative import evaluate

SMALL = {
    "dataset": "samples",
    "max_length": 16,
    "num_sequences": 2,
    "samplers": ["sequential"],
    "model": "tiny-english",
}


def nothing_was_drawn(folder) -> bool:
    return not list(folder.rglob("records*.jsonl")) and not list(folder.rglob("judge*.jsonl"))


@pytest.mark.parametrize(
    ("grid", "settings", "error", "message"),
    [
        ({"judge": ["JUDGE", "no/judge"]}, {}, ModelNotFoundError, "no causal language model 'no/judge'"),
        ({"model": ["tiny-english", "no/model"]}, {}, ModelNotFoundError, "no model 'no/model'"),
        ({"model": ["tiny-english", "tiny-code"]}, {"samplers": ["assd-head"]}, ConfigError, "has no draft head"),
        ({"data_file": ["TEXT", "nowhere.txt"]}, {}, DataFileError, "no data file 'nowhere.txt'"),
        ({"max_length": [16, 4096]}, {"PAPER": True, "data_file": "TEXT"}, DataFileError, "no sequence of 4096 tokens"),
        ({"max_length": [16, 17]}, {}, OutputDirError, "k: 9 there, 5 now"),
        ({"max_length": [16, 128]}, {}, MemoryBudgetError, "of 128 tokens need about"),
        ({"k": [2, 128]}, {"samplers": ["assd+one-pass"]}, MemoryBudgetError, "of 16 tokens need about"),
    ],
    ids=["judge", "model", "head", "file", "text", "folder", "memory", "memory of rows"],
)
def test_a_bad_last_cell_fails_before_the_first_cell_draws(
    grid, settings, error, message, tmp_path, monkeypatch, small_gpt2
):
    (tmp_path / "text.txt").write_text("A small grey cat sat on the mat. " * 9)
    if error is OutputDirError:
        (tmp_path / "out" / "max_length=17").mkdir(parents=True)
        (tmp_path / "out" / "max_length=17" / "config.yaml").write_text(yaml.safe_dump({"k": 9}))
    if error is MemoryBudgetError:
        monkeypatch.setattr(memory, "free_bytes", lambda device: 2**27)
    if settings.pop("PAPER", False):
        settings |= {"protocol": "paper", "bonus_token": False, "judge": small_gpt2}
    places = {"JUDGE": small_gpt2, "TEXT": str(tmp_path / "text.txt")}
    grid = {key: [places.get(value, value) for value in values] for key, values in grid.items()}
    settings = SMALL | {key: places.get(str(value), value) for key, value in settings.items()}
    with pytest.raises(error, match=message):
        evaluate_grid(SpeculativeConfig(grid=grid, output_dir=str(tmp_path / "out"), **settings))
    assert nothing_was_drawn(tmp_path / "out")


def test_the_first_cell_alone_would_have_run(tmp_path, monkeypatch):
    """What the memory of the test above has room for."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**27)
    monkeypatch.setattr(speculative, "draw_plots", lambda *_: None)
    for samplers, k in ((["sequential"], 5), (["assd+one-pass"], 2)):
        settings = SMALL | {"samplers": samplers, "k": k, "output_dir": str(tmp_path / str(k))}
        assert evaluate(SpeculativeConfig(**settings))["complete"]


def test_a_bad_baseline_fails_before_the_model_draws(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no/baseline"):
        evaluate(SpeculativeConfig(output_dir=str(tmp_path), baselines=["no/baseline"], **SMALL))
    assert nothing_was_drawn(tmp_path)


def test_texts_that_another_judge_has_read_are_known_before_anything_is_drawn(tmp_path, monkeypatch, small_gpt2):
    monkeypatch.setattr(speculative, "draw_plots", lambda *_: None)
    copy = shutil.copytree(small_gpt2, tmp_path / "copy")
    evaluate(SpeculativeConfig(output_dir=str(tmp_path / "out"), judge=small_gpt2, **SMALL))
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "records.jsonl").write_text(lines[0])
    with pytest.raises(OutputDirError, match="judge_model: "):
        evaluate(SpeculativeConfig(output_dir=str(tmp_path / "out"), judge=str(copy), **SMALL))
    assert (tmp_path / "out" / "records.jsonl").read_text() == lines[0]
