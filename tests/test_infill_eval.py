"""The code infilling evaluation: problems read to the byte, scores against hand-worked cases, the real files."""

import gzip
import json

import pytest

from asarm.errors import DataFileError
from asarm.evals.config import CodeInfillConfig
from asarm.evals.infill_eval import evaluate, report
from asarm.evals.metrics import code_similarity
from asarm.evals.tasks import read_code_gaps
from asarm.runlog import read_lines

PROBLEM = {
    "task_id": "SingleLineInfilling/T/0",
    "prompt": "def f(x):\n",
    "canonical_solution": "    return x\n",
    "suffix": "\n\n# end\n",
}


def test_code_problems_and_their_errors(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(PROBLEM) + "\n")
    _, (gap,) = read_code_gaps(CodeInfillConfig(data_file=str(path)))
    assert gap.prefix + gap.reference + gap.suffix == "def f(x):\n    return x\n\n\n# end\n"
    plain = tmp_path / "q.jsonl"
    plain.write_text(json.dumps({k: v for k, v in PROBLEM.items() if k != "suffix"}) + "\n")
    with pytest.raises(DataFileError, match=r"line 1 lacks \['suffix'\]"):
        read_code_gaps(CodeInfillConfig(data_file=str(plain)))


def test_scores_against_hand_worked_cases():
    assert code_similarity("return x\n", "return x\n") == {"exact_match": 100.0, "edit_similarity": 100.0}
    assert code_similarity("abcd", "abxd") == {"exact_match": 0.0, "edit_similarity": 75.0}


def test_code_is_infilled_and_written_for_the_published_evaluator(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    summary = evaluate(CodeInfillConfig(data_file=str(tmp_path / "p.jsonl"), output_dir=str(tmp_path / "out")))
    (sample,) = read_lines(tmp_path / "out" / "samples-assd.jsonl")
    (record,) = read_lines(tmp_path / "out" / "records.jsonl")
    assert sample == {"task_id": PROBLEM["task_id"], "completion": record["completion"]}
    assert 0 <= summary["samplers"]["assd"]["edit_similarity"] <= 100
    assert "exact match" in report(summary)


@pytest.mark.parametrize(("benchmark", "count"), [("single-line", 1033), ("multi-line", 5815)])
def test_the_real_code_problems_are_read_whole(data_dir, benchmark, count):
    _, gaps = read_code_gaps(CodeInfillConfig(benchmark=benchmark))
    assert len(gaps) == count
