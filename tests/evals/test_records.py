"""What a record keeps of its sequence, in every evaluation; folders from before it did."""

import json
import random
from itertools import pairwise

import pytest
import yaml

from asarm.evals import speculative
from asarm.evals.code_config import CodeInfillConfig
from asarm.evals.code_infill import evaluate as evaluate_code
from asarm.evals.config import NlpInfillConfig, SpeculativeConfig
from asarm.evals.nlp_infill import evaluate as evaluate_nlp
from asarm.evals.records import prompt_spans, visible_of
from asarm.evals.speculative import evaluate, replot
from asarm.runlog import read_lines
from asarm.tokenizer import TextTokenizer

SMALL = {"dataset": "samples", "num_sequences": 3, "max_length": 24, "samplers": ["sequential", "assd"]}


def test_spans_say_which_positions_were_given_and_are_as_few_as_can_be():
    rng = random.Random(0)
    for length in [1, 2, 3, 7] * 50:
        visible = [rng.random() < 0.5 for _ in range(length)]
        prompt = prompt_spans(visible)
        assert visible_of({"prompt": prompt, "ids": [0] * length}) == visible
        changes = sum(a != b for a, b in pairwise(visible))
        assert len(next(iter(prompt.values()))) == (changes + 1) // 2, "half of the runs, rounded down"
    assert prompt_spans([True, True, False, True]) == {"masked": [[2, 3]]}
    assert prompt_spans([False, True, True, False]) == {"given": [[1, 3]]}


def drawn(record: dict) -> list[int]:
    return [i for i, given in zip(record["ids"], visible_of(record), strict=True) if not given]


def test_a_comparison_keeps_prompt_and_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(speculative, "draw_plots", lambda *_: None)
    evaluate(SpeculativeConfig(output_dir=str(tmp_path), visible_fraction=0.3, **SMALL))
    found = read_lines(tmp_path / "records.jsonl")
    by_index = {}
    for record in found:
        assert len(record["ids"]) == record["tokens"] == 24 and len(drawn(record)) == record["masked"] == 17
        by_index.setdefault(record["index"], []).append(record)
    for one, other in by_index.values():
        assert one["prompt"] == other["prompt"], "every sampler fills in the same"
        given = [[(n, i) for n, i in enumerate(r["ids"]) if visible_of(r)[n]] for r in (one, other)]
        assert given[0] == given[1] and drawn(one) != drawn(other)


def test_infilling_keeps_prompt_and_tokens(tmp_path):
    tokenizer, file = TextTokenizer.from_pretrained("tiny-english"), tmp_path / "texts.jsonl"
    file.write_text('{"text": "Tom lost <mask:2>. He looked <mask:3> the bed."}\n')
    evaluate_nlp(NlpInfillConfig(task="infill-file", data_file=str(file), output_dir=str(tmp_path / "out")))
    [record] = read_lines(tmp_path / "out" / "records.jsonl")
    assert len(drawn(record)) == 5 and [stop - start for start, stop in record["prompt"]["masked"]] == [2, 3]
    assert tokenizer.decode(record["ids"]) == record["filled"]


def test_code_infilling_keeps_prompt_and_tokens(tmp_path):
    tokenizer, file = TextTokenizer.from_pretrained("tiny-code"), tmp_path / "problems.jsonl"
    parts = {"prompt": "def f(x):\n", "canonical_solution": "    y = 2 * x\n", "suffix": "    return y\n"}
    file.write_text(json.dumps({"task_id": "T/0", **parts, "test": "def check(f): pass", "entry_point": "f"}) + "\n")
    evaluate_code(CodeInfillConfig(data_file=str(file), output_dir=str(tmp_path / "out")))
    [record] = [r for r in read_lines(tmp_path / "out" / "records.jsonl") if r["sampler"] == "assd"]
    assert tokenizer.decode(drawn(record)) == record["completion"]
    assert tokenizer.decode(record["ids"]) == parts["prompt"] + record["completion"] + parts["suffix"]


def test_a_folder_from_before_records_kept_it_goes_on_and_is_drawn(tmp_path, monkeypatch, small_gpt2):
    """Its settings lack those that came later, which had their defaults then; another value is another run."""
    draw = speculative.draw_plots
    monkeypatch.setattr(speculative, "draw_plots", lambda *_: None)
    config = SpeculativeConfig(output_dir=str(tmp_path), **SMALL)
    before = evaluate(config)
    lines = [{k: v for k, v in r.items() if k not in ("prompt", "ids")} for r in read_lines(tmp_path / "records.jsonl")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    old = {key: value for key, value in settings.items() if key not in ("protocol", "document_end")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    (tmp_path / "summary.json").unlink()
    again = evaluate(config)
    assert again["complete"]
    assert again["samplers"]["assd"]["nfe_per_token"] == before["samplers"]["assd"]["nfe_per_token"]
    assert [("ids" in r) for r in read_lines(tmp_path / "records.jsonl")] == [False] * 4 + [True] * 2
    with monkeypatch.context() as patch:
        patch.setattr(speculative, "draw_plots", draw)
        assert len(replot(tmp_path)) == 5
    judged = evaluate(SpeculativeConfig(output_dir=str(tmp_path), judge=small_gpt2, **SMALL))
    assert judged["samplers"]["assd"]["judge_ppl"] > 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    paper = {"protocol": "paper", "bonus_token": False, "judge": small_gpt2}
    with pytest.raises(ValueError, match="protocol: 'default' there, 'paper' now"):
        evaluate(SpeculativeConfig(output_dir=str(tmp_path), **SMALL, **paper))
