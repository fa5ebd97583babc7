"""The judge's perplexity against a loop over tokens, with a small GPT-2 made on the spot."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from asarm.errors import ModelNotFoundError, OutputDirError, TextError
from asarm.evals.config import SpeculativeConfig
from asarm.evals.judge import Judge, windows
from asarm.evals.speculative import evaluate, report
from asarm.loading import load
from asarm.runlog import read_lines
from asarm.train.config import ValidationConfig
from asarm.train.validation import Validation

WINDOW = 16
TEXTS = [
    "A small grey cat sat on the mat.",
    "Hi",
    "The old dog ran to the park, and the children ran after it all the way home, laughing and shouting. " * 2,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_dir):
    path = tmp_path_factory.mktemp("judge")
    files = data_dir / "tokenizers" / "gpt2"
    tokenizer = GPT2TokenizerFast(str(files / "vocab.json"), str(files / "merges.txt"))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=WINDOW)
    config.initializer_range = 0.3
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@torch.no_grad()
def nll_by_hand(folder, text: str) -> tuple[int, float]:
    """One forward pass a token. Windows of 16 tokens start 8 apart: from the 17th token on, the context begins at the
    last multiple of 8 that leaves the token inside."""
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), GPT2TokenizerFast.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
    total = 0.0
    for i in range(1, len(ids)):
        start = 0 if i < WINDOW else (i - WINDOW // 2) // 8 * 8
        logits_V = model(torch.tensor([ids[start:i]])).logits[0, -1]
        total -= torch.log_softmax(logits_V.double(), -1)[ids[i]].item()
    return len(ids) - 1, total


def test_perplexity_equals_a_loop_over_tokens(folder):
    judge, expected = Judge(str(folder)), [nll_by_hand(folder, text) for text in TEXTS]
    assert judge.window_length == WINDOW
    for batch_size in (1, 3, 8):
        scores = judge.score(TEXTS, batch_size)
        assert [tokens for tokens, _ in scores] == [tokens for tokens, _ in expected]
        assert [nll for _, nll in scores] == pytest.approx([nll for _, nll in expected], abs=1e-4)
    assert judge.score(TEXTS, 2)[2][0] > 2 * WINDOW, "the long text has several windows"


def test_a_text_of_which_no_token_is_scored_is_an_error_that_names_it(folder):
    with pytest.raises(TextError, match=f"the judge {folder} reads no token of text 3, ''"):
        Judge(str(folder)).score([*TEXTS[:2], ""], 2)
    without_start = Judge(str(folder))
    without_start.tokenizer.bos_token = None
    assert without_start.score([TEXTS[0]], 1)[0][0] == Judge(str(folder)).score([TEXTS[0]], 1)[0][0] - 1
    with pytest.raises(TextError, match="reads no token of text 1, 'a'"):
        without_start.score(["a"], 1)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 24, 25, 100])
@pytest.mark.parametrize("length", [2, 5, 16])
def test_windows_score_every_token_once_with_context(n, length):
    scored = []
    for window in windows(0, list(range(n)), length):
        assert 0 < window.first < len(window.ids) <= length
        scored += window.ids[window.first :]
        assert window.first >= min(length // 2, window.ids[window.first])
    assert scored == list(range(1, n))


@pytest.fixture
def ignorant_folder(folder, tmp_path):
    """A judge to which every token is as likely as any other."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "ignorant")
    GPT2TokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "ignorant")
    return str(tmp_path / "ignorant")


def test_perplexity_of_a_judge_that_knows_nothing_is_its_vocabulary(ignorant_folder):
    [(tokens, nll)] = Judge(ignorant_folder).score([TEXTS[2]], 4)
    assert math.exp(nll / tokens) == pytest.approx(50257, rel=1e-5)


def test_validation_in_training_asks_the_judge(ignorant_folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXTS[2] * 4)
    config = ValidationConfig(
        file=str(tmp_path / "text.txt"), rows=3, generations=2, masked_fractions=[], judge=ignorant_folder
    )
    model, tokenizer = load("tiny-english")
    measured, texts = Validation(config, tokenizer, 16).measure(model)
    assert measured["judge_ppl"] == pytest.approx(50257, rel=1e-5)
    assert [text["judge_ppl"] for text in texts] == pytest.approx([50257] * 2, rel=1e-5)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        Validation(replace(config, judge="nowhere"), tokenizer, 16)


def test_a_text_that_the_judge_cannot_read_does_not_end_the_training(folder, tmp_path):
    """It has no perplexity; those of the others are as they would be without it."""
    (tmp_path / "text.txt").write_text(TEXTS[2] * 4)
    config = ValidationConfig(file=str(tmp_path / "text.txt"), rows=3, generations=2, judge=str(folder))
    validation = Validation(config, load("tiny-english")[1], 16)
    texts = [{"index": index, "text": text} for index, text in enumerate(("", TEXTS[0], TEXTS[1]))]
    [(n, nll), (m, other)] = validation.judge.score(TEXTS[:2], 8)
    assert validation._judge(texts) == {"judge_ppl": pytest.approx(math.exp((nll + other) / (n + m)))}
    by_hand = [None, math.exp(nll / n), math.exp(other / m)]
    assert [text["judge_ppl"] for text in texts] == pytest.approx(by_hand)
    assert validation._judge([{"index": 0, "text": ""}]) == {}


SMALL = {"dataset": "samples", "num_sequences": 4, "max_length": 24, "samplers": ["sequential", "parallel"]}


def test_a_judge_reads_the_texts_of_a_finished_run(folder, tmp_path, without_figures, monkeypatch):
    out = tmp_path / "out"
    before = evaluate(SpeculativeConfig(output_dir=str(out), **SMALL))
    assert before["samplers"]["sequential"]["judge_ppl"] is None
    decoded = (out / "records.jsonl").read_bytes()
    judged = SpeculativeConfig(output_dir=str(out), judge=str(folder), **SMALL)
    row = evaluate(judged)["samplers"]["sequential"]
    assert (out / "records.jsonl").read_bytes() == decoded, "nothing is decoded again"
    texts = [r["text"] for r in read_lines(out / "records.jsonl") if r["sampler"] == "sequential"]
    by_hand = [math.exp(nll / tokens) for tokens, nll in (nll_by_hand(folder, text) for text in texts)]
    assert row["judge_ppl"] == pytest.approx(sum(by_hand) / 4, rel=1e-4)
    assert row["judge_ppl_low"] < row["judge_ppl"] < row["judge_ppl_high"]

    lines = (out / "judge.jsonl").read_text().splitlines(keepends=True)
    (out / "judge.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # as a kill leaves it
    (out / "summary.json").unlink()
    read, score = [], Judge.score
    monkeypatch.setattr(
        Judge, "score", lambda judge, texts, batch_size: read.extend(texts) or score(judge, texts, batch_size)
    )
    again = evaluate(judged)
    assert again["complete"] and len(read) == 3, "what was judged is not judged again"
    assert again["samplers"]["sequential"]["judge_ppl"] == row["judge_ppl"]
    copy = tmp_path / "another judge"
    shutil.copytree(folder, copy)
    with pytest.raises(OutputDirError, match="judge_model: "):
        evaluate(SpeculativeConfig(output_dir=str(out), judge=str(copy), **SMALL))


def test_shards_judge_what_they_decoded(folder, tmp_path, without_figures):
    settings = SMALL | {"judge": str(folder), "output_dir": str(tmp_path / "out")}
    first = evaluate(SpeculativeConfig(shard="0/2", **settings))
    assert not first["complete"] and (first["recorded"], first["expected"]) == (8, 16)
    second = evaluate(SpeculativeConfig(shard="1/2", **settings))
    assert second["complete"] and second["samplers"]["parallel"]["judge_ppl"] > 1
    assert "PPL of" in report(second) and "judge's negative log-likelihood" in report(second)
    assert len(read_lines(tmp_path / "out" / "judge.jsonl")) == 8


def test_a_judge_that_does_not_exist_is_an_error_before_anything_is_decoded(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no causal language model 'no/such-judge' at revision 'main'"):
        evaluate(SpeculativeConfig(output_dir=str(tmp_path), judge="no/such-judge", **SMALL))
    assert not (tmp_path / "records.jsonl").exists()
