"""A measure of nothing is an error, or left out, and never a number."""

import json

import pytest

from asarm.errors import TextError
from asarm.evals.causal import CausalLM
from asarm.evals.code_infill import costs_and_likeness
from asarm.evals.config import NlpInfillConfig
from asarm.evals.metrics import distinct, judge_nll_per_token, rouge, token_entropy
from asarm.evals.nlp_infill import evaluate


def test_a_measure_of_nothing_is_an_error():
    unread = {"sampler": "assd", "index": 3, "text": "", "judge_tokens": 0, "judge_nll": 0.0}
    for measure, message in (
        (lambda: token_entropy([]), "without a token has no entropy"),
        (lambda: distinct([], 1), r"0 token\(s\) has no 1-gram"),
        (lambda: distinct([1], 2), r"1 token\(s\) has no 2-gram"),
        (lambda: judge_nll_per_token(unread), "no token of assd, sequence 3, ''"),
        (lambda: rouge("...!", "anything"), "reference '...!' has no word"),
    ):
        with pytest.raises(TextError, match=message):
            measure()


def test_costs_per_token_are_means_over_gaps_that_have_a_token():
    costs = {"exact_match": 0.0, "edit_similarity": 0.0, "seconds": 1.0}
    records = [
        {**costs, "name": "a", "masked": 4, "nfe": 2, "log_prob": -8.0},
        {**costs, "name": "b", "masked": 0, "nfe": 0, "log_prob": 0.0},
    ]
    row = costs_and_likeness(records)
    assert (row["nfe_per_token"], row["log_prob_per_token"], row["gap_tokens"]) == (0.5, -2.0, 2.0)
    assert "nfe_per_token" not in costs_and_likeness(records[1:])


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("hellaswag", [{"ctx": "Tom ran", "endings": ["home.", last], "label": 0} for last in ("---", "away.")]),
        ("lambada", [{"context": "Tom saw the", "continuation": last} for last in ("---", "dog")]),
    ],
)
def test_a_text_whose_end_has_no_token_is_left_out(task, rows, small, small_gpt2, tmp_path, monkeypatch):
    """As a vocabulary makes of it that drops what it does not know."""
    encode = CausalLM._encode
    monkeypatch.setattr(CausalLM, "_encode", lambda model, text: [] if text == " ---" else encode(model, text))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": task, "data_file": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "out")}
    summary = evaluate(NlpInfillConfig(model=small, causal_lm=[small_gpt2], **settings))
    [skipped] = summary["models"][f"causal {small_gpt2}"]["skipped"]
    assert skipped == {"index": 0, "reason": f"' ---' has no token in the vocabulary of {small_gpt2}"}
    texts = {name: row["texts"] for name, row in summary["samplers"].items()}
    assert texts["joint" if task == "hellaswag" else "assd"] == 2 and texts[f"causal {small_gpt2}"] == 1
