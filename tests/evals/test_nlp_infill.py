"""Natural-language evaluations: scores against hand-worked cases and slow loops; runs that add up and repeat."""

import json
import math
import shutil

import pytest
import torch
from conftest import make_model

from asarm import AnySubsetLM, Order, SamplerConfig, TextTokenizer, joint_log_prob, sample
from asarm.embedded import ASSETS
from asarm.errors import ConfigError, TextError
from asarm.evals.config import NlpInfillConfig
from asarm.evals.metrics import rouge
from asarm.evals.nlp_infill import evaluate, report, summary_row
from asarm.evals.nlp_tasks import NLP_TASKS
from asarm.infilling import without_special_tokens
from asarm.loading import trained_length
from asarm.runlog import read_lines

WORDS = [
    {"context": "Tom saw a small brown dog. He liked the", "continuation": "dog"},
    {"context": "Anna had a red ball. She threw the red", "continuation": "ball"},
    {"context": "It was time for bed, so Ben went to", "continuation": "bed"},
]


def file_of(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def without_seconds(folder):
    records = read_lines(folder / "records.jsonl")
    return {(r["sampler"], r["index"]): {k: v for k, v in r.items() if k != "seconds"} for r in records}


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.from_pretrained("tiny-english")


# scores


def test_rouge_against_a_hand_worked_case():
    # "the cat sat" against "the cat ran off": 2 of 3 and 2 of 4 unigrams, 1 of 2 and 1 of 3 bigrams, subsequence of 2
    scores = rouge("The cat ran off.", "the cat sat")
    assert scores["rouge1"] == pytest.approx(100 * 2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rouge2"] == pytest.approx(100 * 2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3))
    assert scores["rougeL"] == pytest.approx(scores["rouge1"])
    assert scores["rouge_mean"] == pytest.approx((2 * scores["rouge1"] + scores["rouge2"]) / 3)


def test_a_text_counts_once_however_often_it_was_filled():
    records = [{"index": i, "row": i % 2, "rouge1": value} for i, value in enumerate((10.0, 20.0, 30.0, 60.0))]
    row = summary_row(NLP_TASKS["rocstories-1of5"], records)  # text 0: 10 and 30, text 1: 20 and 60
    assert (row["sequences"], row["texts"], row["rouge1"]) == (4, 2, 30.0)
    assert row["rouge1_se"] == pytest.approx(10.0)
    assert row["rouge1_low"] == 20.0 and row["rouge1_high"] == 40.0


def unigram(tokenizer, folder, log_weight) -> dict[int, float]:
    """Save a model that knows no context, only ``log_weight`` of some words; returns its log-probabilities by id."""
    model = make_model(vocab_size=8192, mask_token_id=6)
    with torch.no_grad():
        model.lm_loss.weight.zero_()  # tied to the embeddings: hidden states do not reach the logits
        model.lm_loss.bias.zero_()
        for word, value in log_weight.items():
            (token,) = tokenizer.encode(word)
            model.lm_loss.bias[token] = value
    model.save_pretrained(folder)
    shutil.copy(ASSETS / "tiny-english" / "tokenizer.json", folder)
    return dict(enumerate(model.lm_loss.bias.double().log_softmax(0).tolist()))


def test_the_model_that_knows_the_answers_is_always_right(tmp_path, tokenizer):
    """Hand-worked under a unigram model, so that the three ways to compare endings disagree where they should."""
    logp = unigram(tokenizer, tmp_path, {" dog": 9.0, " cat": 8.5, " something": 8.0})
    dog, cat, thing, house = (logp[tokenizer.encode(w)[0]] for w in (" dog", " cat", " something", " house"))
    endings, expected = ["cat", "something", "dog dog", "dog house"], [cat, thing, 2 * dog, dog + house]
    assert cat > max(2 * dog, thing) and dog > cat and thing / 9 > max(2 * dog / 7, cat / 3)  # house is far behind
    right = {"sum": 0, "token": 2, "byte": 1}
    for way, label in right.items():
        rows = [{"ctx": "He saw a", "endings": endings[n:] + endings[:n], "label": (label - n) % 4} for n in range(4)]
        wrong = [row | {"label": (row["label"] + 1) % 4} for row in rows]
        config = {"task": "hellaswag", "model": str(tmp_path), "batch_size": 5}
        good = evaluate(
            NlpInfillConfig(data_file=file_of(tmp_path, rows), output_dir=str(tmp_path / f"good-{way}"), **config)
        )
        bad = evaluate(
            NlpInfillConfig(data_file=file_of(tmp_path, wrong), output_dir=str(tmp_path / f"bad-{way}"), **config)
        )
        assert good["samplers"]["joint"][f"accuracy_{way}"] == 100.0
        assert bad["samplers"]["joint"][f"accuracy_{way}"] == 0.0
    record = next(r for r in read_lines(tmp_path / "good-sum" / "records.jsonl") if r["sampler"] == "joint")
    assert record["log_probs"] == pytest.approx(expected, abs=1e-5)
    assert (record["tokens"], record["bytes"]) == ([1, 1, 2, 2], [3, 9, 7, 9])


def test_the_words_log_probability_is_the_joint_one(tmp_path, small, tokenizer):
    out = tmp_path / "out"
    config = NlpInfillConfig(
        task="lambada", model=small, data_file=file_of(tmp_path, WORDS), output_dir=str(out), batch_size=2
    )
    summary = evaluate(config)
    model = AnySubsetLM.from_pretrained(small)
    records = {(r["sampler"], r["index"]): r for r in read_lines(out / "records.jsonl")}
    greedy = without_special_tokens(SamplerConfig("sequential", greedy=True), tokenizer)
    log_probs = []
    for index, row in enumerate(WORDS):
        context, word = tokenizer.encode(row["context"]), tokenizer.encode(" " + row["continuation"])
        ids_1N = torch.tensor([context + word])
        order = Order.from_visible(torch.arange(ids_1N.shape[1])[None] < len(context))
        log_probs.append(joint_log_prob(model, ids_1N, order).item())
        assert records["greedy", index]["word_log_prob"] == pytest.approx(log_probs[-1], abs=1e-5)
        same = torch.equal(sample(model, ids_1N, order, greedy).ids_BN, ids_1N)
        assert records["greedy", index]["exact_match"] == 100.0 * same
        sampled = records["assd", index]
        assert sampled["exact_match"] == 100.0 * (sampled["completion"].strip() == row["continuation"])
    assert summary["samplers"]["greedy"]["perplexity"] == pytest.approx(math.exp(-sum(log_probs) / 3), rel=1e-4)
    assert "perplexity of the word" in report(summary)


def test_greedy_decoding_of_a_known_word_is_right(tmp_path, tokenizer):
    unigram(tokenizer, tmp_path, {" ball": 20.0})
    config = NlpInfillConfig(
        task="lambada", model=str(tmp_path), data_file=file_of(tmp_path, WORDS), output_dir=str(tmp_path / "out")
    )
    evaluate(config)
    matches = [r["exact_match"] for r in read_lines(tmp_path / "out" / "records.jsonl") if r["sampler"] == "greedy"]
    assert matches == [0.0, 100.0, 0.0]


# runs


def test_stories_are_infilled_scored_and_resumed(tmp_path):
    config = NlpInfillConfig(output_dir=str(tmp_path), limit=5, samplers=["sequential", "assd"], batch_size=2)
    summary = evaluate(config)
    records = read_lines(tmp_path / "records.jsonl")
    mine = [r for r in records if r["sampler"] in config.samplers]
    assert len(mine) == 10 and summary["num_texts"] == summary["num_rows"] == 5
    for r in mine:
        assert r["completion"] and "<" not in r["completion"]
        assert r["nfe"] <= r["masked"]
        expected = rouge(r["reference"], r["completion"])
        assert all(r[key] == value for key, value in expected.items())
    scores = [r["rouge1"] for r in mine if r["sampler"] == "assd"]
    assert summary["samplers"]["assd"]["rouge1"] == pytest.approx(sum(scores) / 5)
    text = report(summary)
    assert "true length" in text and "5 rows in the file: 5 texts" in text
    assert evaluate(config)["samplers"] == summary["samplers"]
    assert read_lines(tmp_path / "records.jsonl") == records


@pytest.mark.parametrize("task", ["rocstories-3of5", "lambada", "hellaswag"])
def test_batch_and_shards_change_no_record(tmp_path, small, small_gpt2, task, monkeypatch):
    monkeypatch.delenv("ASARM_DATA_DIR", raising=False)
    settings = {"task": task, "model": small, "causal_lm": [small_gpt2], "trials": 2, "samplers": ["assd", "parallel"]}
    choices = [{"ctx": w["context"], "endings": ["dog", "bed at night", "ball"], "label": 0} for w in WORDS]
    if task == "rocstories-3of5":
        settings["limit"] = 4
    else:
        settings["data_file"] = file_of(tmp_path, WORDS if task == "lambada" else choices)
    whole = evaluate(NlpInfillConfig(output_dir=str(tmp_path / "whole"), batch_size=1, **settings))
    parts = [
        evaluate(NlpInfillConfig(output_dir=str(tmp_path / "parts"), batch_size=3, shard=shard, **settings))
        for shard in ("1/2", "0/2")
    ]
    assert [part["complete"] for part in parts] == [False, True]
    one, two = without_seconds(tmp_path / "whole"), without_seconds(tmp_path / "parts")
    assert one.keys() == two.keys() and list(parts[1]["samplers"]) == list(whole["samplers"])
    for key, record in one.items():
        for name, value in record.items():
            if isinstance(value, float):
                assert two[key][name] == pytest.approx(value, abs=1e-4), (key, name)
            elif name == "log_probs":
                assert two[key][name] == pytest.approx(value, abs=1e-4)
            else:
                assert two[key][name] == value, (key, name)


def test_the_first_trial_is_the_run_of_one_trial(tmp_path, small):
    settings = {"model": small, "limit": 3, "data_file": None}
    evaluate(NlpInfillConfig(output_dir=str(tmp_path / "one"), **settings))
    summary = evaluate(NlpInfillConfig(output_dir=str(tmp_path / "two"), trials=2, **settings))
    one, two = without_seconds(tmp_path / "one"), without_seconds(tmp_path / "two")
    assert len(two) == len(one) + 3 and summary["samplers"]["assd"]["texts"] == 3
    assert all(two[key]["completion"] == record["completion"] for key, record in one.items())
    again = [two["assd", index] for index in (3, 4, 5)]
    assert [(r["row"], r["trial"]) for r in again] == [(0, 1), (1, 1), (2, 1)]
    assert all(r["completion"] != two["assd", r["row"]]["completion"] for r in again)


def test_texts_longer_than_a_model_was_trained_on_are_counted(tmp_path, small):
    rows = [{"text": "Tom lost his <mask:2>.", "id": "short"}, {"text": "Tom ran. " * 90 + "<mask>", "id": "long"}]
    settings = {"task": "infill-file", "data_file": file_of(tmp_path, rows)}
    summary = evaluate(NlpInfillConfig(baselines=[small], output_dir=str(tmp_path / "out"), **settings))
    (skip,) = summary["models"]["tiny-english"]["skipped"]
    assert skip["index"] == 1 and "256" in skip["reason"]
    assert summary["samplers"]["assd"]["sequences"] + 1 == summary["num_texts"] == summary["num_rows"] == 2
    assert summary["samplers"][f"{small} assd"]["sequences"] == 2  # whose training length nobody knows
    lines = report(summary).splitlines()[-3:]
    assert lines[0] == "2 rows in the file: 2 texts, none skipped"
    assert "at most 256 tokens, 1 skipped" in lines[1] and "of any length" in lines[2]
    with pytest.raises(TextError, match="none of 2 texts"):
        evaluate(NlpInfillConfig(output_dir=str(tmp_path / "no"), max_length=2, **settings))


def test_what_a_vocabulary_changes_is_counted(tmp_path, data_dir):
    make_model(vocab_size=32000, mask_token_id=6).save_pretrained(tmp_path)
    shutil.copy(data_dir / "tokenizers" / "xlnet-base-cased" / "tokenizer.json", tmp_path)
    rows = [WORDS[0], WORDS[0] | {"context": "A line.\nHe liked the"}]
    settings = {"task": "lambada", "model": str(tmp_path), "data_file": file_of(tmp_path, rows)}
    summary = evaluate(NlpInfillConfig(output_dir=str(tmp_path / "out"), **settings))
    assert summary["samplers"]["assd"]["altered"] == 1
    assert "assd: the vocabulary changes what is given in 1 of 2" in report(summary)


def test_the_trained_length_is_that_of_the_recipe(tmp_path, small):
    assert trained_length(AnySubsetLM.from_pretrained("tiny-english")) == 256
    assert trained_length(AnySubsetLM.from_pretrained(small)) is None
    shutil.copytree(small, tmp_path / "final")
    (tmp_path / "final" / "training_config.yaml").write_text("data:\n  max_length: 96\n")
    assert trained_length(AnySubsetLM.from_pretrained(tmp_path / "final")) == 96


def test_a_file_of_masks_is_filled_around_what_is_given(tmp_path):
    rows = [{"text": "Tom <mask:3> and <mask> home.", "references": ["lost his hat", "went"]}, {"text": "A <mask:4>."}]
    config = NlpInfillConfig(task="infill-file", data_file=file_of(tmp_path, rows), output_dir=str(tmp_path / "out"))
    summary = evaluate(config)
    two, one = read_lines(tmp_path / "out" / "records.jsonl")
    assert two["filled"].startswith("Tom") and " and" in two["filled"] and two["filled"].endswith(" home.")
    assert two["masked"] == 4 and two["reference"] == " lost his hat went"
    assert len(two["filled"]) == len("Tom and home.") + len(two["completion"])
    assert one["filled"] == f"A{one['completion']}." and "rouge1" not in one
    assert summary["samplers"]["assd"]["rouge1"] == two["rouge1"]


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "nonsense"}, "task"),
        ({"task": "infill-file"}, "data_file"),
        ({"trials": 0}, "trials"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        NlpInfillConfig(**settings)
