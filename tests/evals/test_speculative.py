"""The main job: records, summary, verdicts, figures, resuming after a kill.

Verdicts are on fixed seeds; by the power of the tests, the sampler without a bug would miss its verdict less than once
in 10^4 seeds, and a bug would pass less often than that.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_model, valid_of, with_random_head

from asarm.config import SamplerConfig
from asarm.errors import OutputDirError
from asarm.evals.config import SpeculativeConfig
from asarm.evals.decode import decode
from asarm.evals.metrics import distinct, token_entropy
from asarm.evals.records import RecordLog
from asarm.evals.shards import Shard
from asarm.evals.speculative import evaluate, masked_sequences, plain_text, replot, report, summarise
from asarm.evals.stats import mean_and_se
from asarm.infilling import InfillTask
from asarm.runlog import read_lines
from asarm.sampling import assd
from asarm.tokenizer import TextTokenizer

SAMPLERS = ["sequential", "assd", "assd+one-pass", "assd-head", "assd-head+one-pass", "assd-ngram", "parallel"]
ROOT = Path(__file__).parents[2]
SMALL = {"dataset": "samples", "num_sequences": 6, "max_length": 32, "batch_size": 6}


def records(folder) -> list[dict]:
    return read_lines(folder / "records.jsonl")


def without_seconds(items) -> dict:
    return {(r["sampler"], r["index"]): {k: v for k, v in r.items() if k not in ("seconds", "log_prob")} for r in items}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculative")
    return folder, evaluate(SpeculativeConfig(output_dir=str(folder), **SMALL))


def test_every_sequence_of_every_sampler_is_recorded(finished):
    folder, summary = finished
    found = records(folder)
    assert len(found) == len(SAMPLERS) * 6 == len(without_seconds(found))
    for r in found:
        assert r["masked"] == 30 and r["tokens"] == 32  # 5 % of 32 are given
        assert r["nfe"] <= r["masked"] and r["log_prob"] < 0 < r["seconds"]
        assert sum(r["proposed_by_index"]) == r["proposed"] and sum(r["accepted_by_index"]) == r["accepted"]
        assert len(r["accepted_by_index"]) == r["k"] == 5 and 0 < r["distinct_1"] <= r["distinct_2"] <= 1
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_summary_holds_plain_numbers_with_standard_errors(finished):
    folder, summary = finished
    assert list(summary["samplers"]) == SAMPLERS
    for name, row in summary["samplers"].items():
        mine = [r for r in records(folder) if r["sampler"] == name]
        mean, se = mean_and_se([r["nfe"] / r["masked"] for r in mine])
        assert row["nfe_per_token"] == mean and row["nfe_per_token_se"] == se
        assert row["sequences"] == 6 and row["judge_ppl"] is None
        for key in ("aux_nfe_per_token", "seconds_per_sequence", "log_prob_per_token", "entropy", "tokens_per_round"):
            assert isinstance(row[key], float) and isinstance(row[f"{key}_se"], float)
    assert summary["samplers"]["sequential"]["nfe_per_token"] == 1
    assert summary["samplers"]["assd"]["nfe_per_token"] < 1
    assert summary["samplers"]["assd-ngram"]["aux_nfe_per_token"] == summary["samplers"]["assd-ngram"]["nfe_per_token"]
    assert {"commit", "torch", "device", "time"} <= set(summary["provenance"])
    lines = report(summary).splitlines()
    assert "95% masked" in lines[0] and [line.split()[0] for line in lines[2:9]] == SAMPLERS
    verdicts = [line.split()[0] for line in lines if {"undecided", "different", "equivalent"} & {*line.split()[1:2]}]
    assert verdicts == 2 * SAMPLERS[1:]  # in log-probability and in entropy


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures")
def test_records_do_not_depend_on_the_batch_size(finished, tmp_path):
    evaluate(SpeculativeConfig(output_dir=str(tmp_path), **SMALL | {"batch_size": 5}))
    assert without_seconds(records(tmp_path)) == without_seconds(records(finished[0]))


@pytest.mark.usefixtures("without_figures")
def test_the_same_settings_over_another_text_are_another_run(tmp_path):
    """``auto`` and file names say where the text comes from, not what it is."""
    text = tmp_path / "text.txt"
    config = SpeculativeConfig(
        data_file=str(text), num_sequences=2, max_length=16, samplers=["parallel"], output_dir=str(tmp_path / "out")
    )
    text.write_text("A small grey cat sat on the mat. " * 9)
    evaluate(config)
    evaluate(config)  # nothing changed: goes on, with nothing left to do
    text.write_text("The old dog ran to the park. " * 9)
    with pytest.raises(OutputDirError, match="items: '"):
        evaluate(config)


@pytest.mark.usefixtures("without_figures")
def test_greedy_decoding_is_scored_under_the_model(tmp_path):
    settings = SMALL | {"num_sequences": 2, "max_length": 16}
    summary = evaluate(SpeculativeConfig(output_dir=str(tmp_path), greedy=True, **settings))
    rows = summary["samplers"]
    assert rows["sequential"]["log_prob_per_token"] < -0.1
    assert rows["assd"]["log_prob_per_token"] == pytest.approx(rows["sequential"]["log_prob_per_token"], abs=1e-6)
    assert json.loads((tmp_path / "summary.json").read_text())["samplers"]["parallel"]["log_prob_per_token"] < 0


def test_verification_reaches_every_sampler_that_drafts():
    by_default, block, token = (SpeculativeConfig(verification=value) for value in (None, "block", "token"))
    drafting = ["assd", "assd-head+one-pass:3", "assd-ngram"]
    assert [by_default.sampler_config(name).verifies_blocks for name in drafting] == [False, True, False]
    assert all(block.sampler_config(name).verifies_blocks for name in drafting)
    assert not any(token.sampler_config(name).verifies_blocks for name in drafting)
    assert not any(block.sampler_config(name).verifies_blocks for name in ("sequential", "parallel"))


@pytest.mark.usefixtures("without_figures")
def test_lossy_samplers_are_marked_in_every_record(tmp_path):
    config = SpeculativeConfig(
        output_dir=str(tmp_path), accept_slack=0.1, **SMALL | {"num_sequences": 2, "max_length": 16}
    )
    summary = evaluate(config)
    lossless = {name: row["lossless"] for name, row in summary["samplers"].items()}
    assert lossless == {name: name == "sequential" for name in lossless}
    assert all(record["lossless"] == (record["sampler"] == "sequential") for record in records(tmp_path))
    assert "assd (lossy)" in report(summary) and "sequential (lossy)" not in report(summary)


@pytest.mark.usefixtures("without_figures")
def test_bfloat16_runs_every_sampler(tmp_path):
    summary = evaluate(
        SpeculativeConfig(output_dir=str(tmp_path), dtype="bfloat16", **SMALL | {"num_sequences": 2, "max_length": 16})
    )
    assert all(row["sequences"] == 2 and row["nfe_per_token"] <= 1 for row in summary["samplers"].values())


def test_records_with_any_character_are_read_back(tmp_path):
    log = RecordLog(tmp_path, {}, Shard())
    odd = {"sampler": "assd", "index": 0, "text": "line\u2028separator\u0085next\x1c end"}
    log.add(odd)
    with open(tmp_path / "records.jsonl", "ab") as file:
        file.write('{"text": "caf\u00e9'.encode()[:-1])  # torn inside a character
    assert RecordLog(tmp_path, {}, Shard()).records == {("assd", 0): odd}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(finished, tmp_path):
    command = [sys.executable, "-m", "asarm", "eval", "speculative", "--output_dir", str(tmp_path)]
    command += [word for key, value in (SMALL | {"batch_size": 1}).items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (
        not (tmp_path / "records.jsonl").exists() or len(records_so_far(tmp_path)) < 3
    ):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = records_so_far(tmp_path)
    assert 3 <= len(before) < 6 * len(SAMPLERS)
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write('{"sampler": "assd", "ind')  # what a kill in the middle of a write leaves
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = records(tmp_path)
    assert after[: len(before)] == before, "finished sequences are not computed again"
    assert without_seconds(after) == without_seconds(records(finished[0]))


def records_so_far(folder) -> list[dict]:
    text = (folder / "records.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_a_folder_of_another_run_is_refused(finished):
    with pytest.raises(OutputDirError, match="k: 5 there, 4 now"):
        evaluate(SpeculativeConfig(output_dir=str(finished[0]), **SMALL, k=4))


def test_record_log_cuts_a_torn_line(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"sampler": "assd", "index": 0}\n{"samp')
    log = RecordLog(tmp_path, {}, Shard())
    assert list(log.records) == [("assd", 0)]
    log.add({"sampler": "assd", "index": 1})
    assert (tmp_path / "records.jsonl").read_text().count("\n") == 2


def test_measures_against_hand_worked_cases():
    assert token_entropy([1, 1, 2, 2]) == 1.0 and token_entropy([5] * 9) == 0.0
    assert token_entropy(range(8)) == pytest.approx(3.0)
    assert mean_and_se([2.0]) == (2.0, 0.0)
    assert mean_and_se([1.0, 3.0]) == (2.0, 1.0)
    assert distinct([1, 1, 2, 1, 1], 1) == 0.4 and distinct([1, 1, 2, 1, 1], 2) == 0.75


def test_separators_of_documents_are_line_breaks_to_a_reader():
    tokenizer = TextTokenizer.from_pretrained("tiny-english")
    ids = [*tokenizer.encode("The end."), *tokenizer.document_end, *tokenizer.encode("Once upon")]
    assert plain_text(tokenizer, ids) == "The end.\nOnce upon"
    assert plain_text(tokenizer, list(tokenizer.document_end)) == ""


def test_the_order_decides_what_is_given_and_the_limit_how_many():
    rows = [np.arange(20) for _ in range(4)]
    settings = {"num_sequences": 4, "max_length": 20, "visible_fraction": 0.3}
    random = masked_sequences(SpeculativeConfig(**settings), rows)
    left = masked_sequences(SpeculativeConfig(**settings, order="left-to-right", limit=3), rows)
    assert [sum(task.visible) for task in random] == [6] * 4 and len({tuple(task.visible) for task in random}) > 1
    assert [task.visible for task in left] == [[True] * 6 + [False] * 14] * 3


def records_of_small_model(samplers: dict[str, SamplerConfig], n: int = 1000) -> dict[str, list[dict]]:
    """All samplers on the same prompts, by a random model of 30 tokens and 16 positions."""
    model = with_random_head(make_model(vocab_size=30, seed=3, spread=1.2))
    tasks = [InfillTask([i % 29 + 1, *[1] * 15], [True] + [False] * 15, i) for i in range(n)]
    unused = {"entropy": 0.0, "distinct_1": 0.0, "distinct_2": 0.0}
    found = {}
    for name, config in samplers.items():
        measures = {task.index: m for task, _, m in decode(model, tasks, config, 0, 200)}
        found[name] = [unused | measures[i] for i in range(n)]
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, list[dict]]:
    return records_of_small_model({"sequential": SamplerConfig("sequential")})


def comparison(records: dict[str, list[dict]]) -> dict[str, dict]:
    rows = summarise(records, SpeculativeConfig(margin=0.1))
    return {name: row["versus_sequential"]["log_prob_per_token"] for name, row in rows.items() if name != "sequential"}


@pytest.mark.slow
def test_exact_samplers_are_equivalent_and_the_biased_one_is_not(reference):
    exact = ["assd", "assd-head+one-pass", "assd-ngram"]
    samplers = {name: SamplerConfig.named(name, k=4) for name in [*exact, "parallel"]}
    found = comparison(reference | records_of_small_model(samplers))
    assert all(found[name]["power"] > 0.9999 for name in exact)
    verdicts = {name: row["verdict"] for name, row in found.items()}
    assert verdicts == dict.fromkeys(exact, "equivalent") | {"parallel": "different"}


@pytest.mark.parametrize(
    ("name", "rule"),
    [("assd", "accepted_prefix"), ("assd+one-pass", "accepted_prefix"), ("assd-head", "accepted_block")],
)
def test_a_sampler_that_keeps_every_draft_is_different(reference, name, rule, monkeypatch):
    monkeypatch.setattr(assd, rule, lambda *arguments: valid_of(arguments).sum(1))
    planted = records_of_small_model({name: SamplerConfig.named(name, k=4)})
    assert comparison(reference | planted)[name]["verdict"] == "different"


def test_a_sampler_with_slack_in_its_acceptance_is_different(reference):
    slack = records_of_small_model({"assd": SamplerConfig("assd", k=4, accept_slack=0.5)})
    assert comparison(reference | slack)["assd"]["verdict"] == "different"


def test_figures_are_drawn_again_from_the_records_alone(finished, tmp_path):
    folder, _ = finished
    names = {"histograms.png", "acceptance.png", "calls_by_k.png", "quality_by_calls.png", "equivalence.png"}
    for name in names:
        (folder / name).unlink()
    assert {path.name for path in replot(folder)} == names
    assert all((folder / name).stat().st_size > 10_000 for name in names)
    with pytest.raises(OutputDirError, match="no finished run"):
        replot(tmp_path)


CONFIGS = [path for path in (ROOT / "configs" / "eval").glob("*.yaml") if path.stem.startswith(("abl", "spec"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    config = SpeculativeConfig(**yaml.safe_load(path.read_text()))
    assert config.output_dir == f"runs/{path.stem}" and f"--config configs/eval/{path.name}" in path.read_text()
    assert len(config.cells()) == np.prod([len(values) for values in config.grid.values()]) * bool(config.grid)
