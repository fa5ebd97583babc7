"""A task is one record: a toy one, registered from outside, goes through the whole evaluation."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from asarm.cli import main
from asarm.errors import ConfigError, DataFileError
from asarm.evals.nlp_items import GapItem
from asarm.evals.nlp_tasks import COST, NLP_TASKS, NlpTask, register, resolve
from asarm.runlog import read_lines

ROWS = [{"said": "Tom saw", "hidden": "a big dog"}, {"said": "She sang", "hidden": "to him"}, {"said": "no end"}]


def parse(index: int, row: dict) -> GapItem:
    if "hidden" not in row:
        raise DataFileError("nothing is hidden")
    return GapItem(index, str(index), (row["said"], " today."), (" " + row["hidden"],))


def shouted(item: GapItem, fills: list[str]) -> dict[str, float]:
    return {"capitals": float(sum(letter.isupper() for letter in "".join(fills)))}


@pytest.fixture
def toy() -> Iterator[NlpTask]:
    guessers = {"guess: loud": lambda items, seed: [item.references[0].upper() for item in items]}
    task = NlpTask("toy", "the end hidden", parse, {"capitals": "capitals"} | COST, shouted, guessers)
    register(task)
    yield task
    del NLP_TASKS["toy"]


def test_a_registered_task_is_evaluated(toy, small, small_gpt2, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["eval", "nlp-infill", "--task", "toy", "--model", small, "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "data_file must be given with the task toy, which has none of its own, got None" in capsys.readouterr().err
    assert main([*words, "--data_file", str(file), "--samplers", "sequential,assd", "--causal_lm", small_gpt2]) == 0
    table = capsys.readouterr().out
    assert "the end hidden" in table and "capitals" in table and "row 2: nothing is hidden" in table
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["samplers"]
    assert list(rows) == [f"causal {small_gpt2}", "sequential", "assd", "guess: loud"]
    assert rows["guess: loud"]["capitals"] == (7 + 5) / 2
    for record in read_lines(tmp_path / "out" / "records.jsonl"):
        assert record["capitals"] == sum(letter.isupper() for letter in record["completion"])


def test_a_name_is_registered_once(toy):
    with pytest.raises(ConfigError, match="a task 'toy' already"):
        register(replace(toy, protocol=""))


@pytest.mark.parametrize("task", NLP_TASKS.values(), ids=lambda task: task.name)
def test_every_function_of_a_record_is_there(task):
    functions = [task.parse, *task.guessers.values(), *([] if task.choices else [task.measure])]
    assert all(callable(resolve(function)) for function in functions)
