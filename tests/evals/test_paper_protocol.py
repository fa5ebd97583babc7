"""The paper's protocol, each piece against an independent computation: packing, masks, texts, judge, entropy, tests."""

import json
import math
import warnings

import numpy
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from asarm import AnySubsetLM
from asarm.cli import main
from asarm.data.datasets import load_text
from asarm.data.packing import pack_all
from asarm.embedded import ASSETS
from asarm.errors import ConfigError, DataFileError, TextError
from asarm.evals import speculative
from asarm.evals.config import SpeculativeConfig
from asarm.evals.judge import Judge
from asarm.evals.nlp_tasks import NLP_TASKS, resolve
from asarm.evals.protocols import PROTOCOLS
from asarm.evals.records import visible_of
from asarm.evals.speculative import describer, evaluate, masked_sequences, report
from asarm.evals.stats import FOUR_TESTS, difference_tests, paired_p_value
from asarm.runlog import read_lines
from asarm.tokenizer import TextTokenizer

LINES = [" \n", " = A cat = \n", " \n", " The cat sat on the mat . It was warm . \n", " \n", " = = A part = = \n"]
LINES += [" A dog ran to the park , and the children ran after it all the way home . \n", "\t\n", " The end . \n"]
PAPER = {"protocol": "paper", "bonus_token": False, "dataset": "wikitext"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An ASARM_DATA_DIR with a test split and no other."""
    (tmp_path / "eval" / "wikitext-2-raw").mkdir(parents=True)
    (tmp_path / "eval" / "wikitext-2-raw" / "wiki.test.raw").write_text("".join(LINES * 6))
    monkeypatch.setenv("ASARM_DATA_DIR", str(tmp_path))
    return tmp_path


def packed_one_token_at_a_time(documents: list[list[int]], end: list[int], length: int) -> list[list[int]]:
    """What the published packing does, the long way: a row that is not full at the end is lost."""
    rows, row = [], []
    for ids in documents:
        for token in [*ids, *end]:
            row.append(token)
            if len(row) == length:
                rows.append(row)
                row = []
    return rows


@pytest.mark.parametrize("length", [5, 16, 64])
def test_every_line_is_a_document_and_the_last_row_is_dropped(folder, length):
    config = SpeculativeConfig(**PAPER, judge="j", num_sequences=10_000, max_length=length)
    source, documents = load_text("wikitext", split=config.split, as_rows=True)
    assert source == "$ASARM_DATA_DIR/eval/wikitext-2-raw/wiki.test.raw"
    tokenizer = TextTokenizer.from_pretrained("tiny-english", document_end=config.document_end)
    by_hand = Tokenizer.from_file(str(ASSETS / "tiny-english" / "tokenizer.json"))
    encoded = [by_hand.encode(line if line.strip() else "", add_special_tokens=False).ids for line in LINES * 6]
    end = [by_hand.token_to_id(token) for token in ("<sep>", "<cls>", "</s>")]
    expected = packed_one_token_at_a_time(encoded, end, length)
    assert sum(map(len, expected)) < sum(len(ids) + 3 for ids in encoded), "something is left over"
    with pytest.warns(UserWarning, match=f"{len(expected)} of 10000 sequences: the text makes no more"):
        tasks = masked_sequences(config, pack_all(documents, tokenizer, length))
    assert [task.ids for task in tasks] == expected
    assert {sum(task.visible) for task in tasks} == {int(0.05 * length) + 1}


def test_of_512_tokens_26_are_given_in_random_places():
    rows = [numpy.arange(512) for _ in range(3)]
    tasks = masked_sequences(SpeculativeConfig(**PAPER, judge="j", num_sequences=3, max_length=512), rows)
    assert [sum(task.visible) for task in tasks] == [26] * 3
    assert len({tuple(task.visible) for task in tasks}) == 3
    ordinary = masked_sequences(SpeculativeConfig(num_sequences=3, max_length=512), rows)
    assert sum(ordinary[0].visible) == round(0.05 * 512) == 26
    assert (
        sum(masked_sequences(SpeculativeConfig(num_sequences=3, max_length=384), [rows[0][:384]] * 3)[0].visible) == 19
    )


def test_lines_and_texts_are_those_of_hugging_faces_tokenizer_for_xlnet(data_dir):
    """``tokenizer.encode`` there adds the first two tokens of a document's end by the template in tokenizer.json."""
    file = data_dir / "tokenizers" / "xlnet-base-cased" / "tokenizer.json"
    theirs = Tokenizer.from_file(str(file))
    lines = (data_dir / "eval" / "wikitext-2-raw" / "wiki.valid.raw").read_text().splitlines(keepends=True)[:300]
    stream = [t for line in lines for t in (*theirs.encode(line if line.strip() else "").ids, 2)]
    config = SpeculativeConfig(**PAPER, split="validation", judge="j", num_sequences=8, max_length=512)
    ours = TextTokenizer.from_pretrained(file.parent, document_end=config.document_end)
    _, documents = load_text("wikitext", split="validation", as_rows=True)
    tasks = masked_sequences(config, pack_all(documents, ours, 512))
    assert [task.ids for task in tasks] == [stream[i : i + 512] for i in range(0, 8 * 512, 512)]
    texts = [describer(config.rules, ours)(task, task.ids)["text"] for task in tasks]
    assert texts == [theirs.decode(task.ids, skip_special_tokens=False) for task in tasks]
    assert "<sep><cls></s>" in texts[0] and "\n" not in texts[0]


@torch.no_grad()
def perplexity_by_hand(judge: str, text: str, longest: int) -> float:
    """exp of the mean negative log-likelihood of a text that is cut, decoded and encoded again, after a begin token."""
    tokenizer, model = AutoTokenizer.from_pretrained(judge), AutoModelForCausalLM.from_pretrained(judge).eval()
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.encode(tokenizer.decode(ids[:longest]), add_special_tokens=False)
    logits_NV = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, :-1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits_NV, torch.tensor(ids)).item())


def test_the_judge_reads_the_beginning_of_a_long_text(small_gpt2):
    text = "The old dog ran to the park, and the children ran after it all the way home, laughing and shouting. " * 2
    judge = Judge(small_gpt2, longest=20)
    [(tokens, nll)] = judge.score([text], 1)
    assert len(judge.tokens(text)) > 40 and tokens < 23
    assert math.exp(nll / tokens) == pytest.approx(perplexity_by_hand(small_gpt2, text, 20), rel=1e-4)
    assert Judge(small_gpt2).score([text], 1)[0][0] == len(judge.tokens(text)), "without a limit, all of it"


def test_a_cut_may_part_a_letter(small_gpt2):
    """Byte-level tokens: what is left of the letter becomes a replacement character, of three bytes."""
    judge = Judge(small_gpt2, longest=1)
    assert judge.encode("\U0001f600")[1:] == judge.tokens("\ufffd")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small, small_gpt2):
    """A run of six sequences by the command line, its texts cut for the judge after 15 tokens."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "eval" / "wikitext-2-raw").mkdir(parents=True)
    (folder / "eval" / "wikitext-2-raw" / "wiki.test.raw").write_text("".join(LINES * 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASARM_DATA_DIR", str(folder))
        patch.setattr(speculative, "draw_plots", lambda *_: None)
        patch.setitem(vars(PROTOCOLS["paper"]), "judged_tokens", 15)
        words = ["eval", "speculative", "--protocol", "paper", "--bonus_token", "false", "--dataset", "wikitext"]
        words += ["--model", small, "--judge", small_gpt2, "--num_sequences", "6", "--max_length", "24"]
        words += ["--samplers", "sequential,assd,assd-ngram", "--batch_size", "3", "--output_dir", str(folder / "out")]
        assert main(words) == 0
    summary = json.loads((folder / "out" / "summary.json").read_text())
    phases = [read_lines(folder / "out" / name) for name in ("records.jsonl", "judge.jsonl")]
    return summary, [a | b for a, b in zip(*phases, strict=True)]


def test_perplexity_and_entropy_are_the_judges(finished, small, small_gpt2):
    summary, records = finished
    tokenizer = Tokenizer.from_file(f"{small}/tokenizer.json")
    judges = AutoTokenizer.from_pretrained(small_gpt2)
    for name, row in summary["samplers"].items():
        mine = [r for r in records if r["sampler"] == name]
        assert [r["text"] for r in mine] == [tokenizer.decode(r["ids"], skip_special_tokens=False) for r in mine]
        perplexities = [perplexity_by_hand(small_gpt2, r["text"], 15) for r in mine]
        assert row["judge_ppl"] == pytest.approx(sum(perplexities) / 6, rel=1e-4)
        assert row["judge_ppl_se"] == pytest.approx(stats.sem(perplexities), rel=1e-3)
        entropies = []
        for r in mine:
            counts = torch.tensor(judges.encode(r["text"], add_special_tokens=False)).unique(return_counts=True)[1]
            entropies.append(stats.entropy(counts.double(), base=2))
        assert row["entropy"] == pytest.approx(sum(entropies) / 6, rel=1e-9)
        calls = sum(r["nfe"] for r in mine) / 6
        assert row["nfe_per_token"] == pytest.approx(calls / 22), "22 of 24 tokens are drawn"
    assert summary["samplers"]["sequential"]["nfe_per_token"] == 1
    assert summary["config"]["split"] == "test" and summary["text"].endswith("wiki.test.raw")


def test_the_four_tests_are_scipys_on_the_values_of_the_records(finished):
    summary, records = finished
    values = {
        "judge_ppl": lambda r: math.exp(r["judge_nll"] / r["judge_tokens"]),
        "entropy": lambda r: r["entropy"],
    }
    assert "tests" not in summary["samplers"]["sequential"]
    for name in ("assd", "assd-ngram"):
        for key, value in values.items():
            a, b = ([value(r) for r in records if r["sampler"] == system] for system in ("sequential", name))
            assert summary["samplers"][name]["tests"][key] == {
                "t_unpaired": stats.ttest_ind(a, b).pvalue,
                "t_paired": stats.ttest_rel(a, b).pvalue,
                "wilcoxon": stats.wilcoxon(a, b, zero_method="zsplit").pvalue,
                "mann_whitney": stats.mannwhitneyu(a, b).pvalue,
            }
    text = report(summary)
    assert (
        "PPL, p-values that it differs from sequential:" in text and "mann whitney" in text and "protocol paper" in text
    )


def test_tests_that_cannot_be_made_have_no_p_value():
    assert set(difference_tests([1.0], [2.0]).values()) == {None}
    same = difference_tests([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert same["t_paired"] is None and same["wilcoxon"] == 1 and list(same) == list(FOUR_TESTS)
    a, b = [1.0, 2.5, 4.0, 8.0], [2.0, 1.0, 5.5, 7.0]
    assert difference_tests(a, b)["t_paired"] == pytest.approx(
        paired_p_value([x - y for x, y in zip(a, b, strict=True)])
    )


def test_the_mask_token_is_never_drawn_and_special_tokens_may_be(folder, small, small_gpt2, monkeypatch):
    """By a model that would draw nothing but the mask token and, if it may not, <sep>."""
    monkeypatch.setattr(speculative, "draw_plots", lambda *_: None)
    model = AnySubsetLM.from_pretrained(small)
    with torch.no_grad():
        model.lm_loss.bias[6], model.lm_loss.bias[4] = 900, 300
    model.save_pretrained(folder / "model")
    settings = PAPER | {"model": str(folder / "model"), "tokenizer": small, "judge": small_gpt2, "num_sequences": 2}
    settings |= {"max_length": 16, "samplers": ["sequential", "assd"], "output_dir": str(folder / "out")}
    evaluate(SpeculativeConfig(**settings))
    records = read_lines(folder / "out" / "records.jsonl")
    assert {i for r in records for i, given in zip(r["ids"], visible_of(r), strict=True) if not given} == {4}
    assert all("<sep><sep>" in r["text"] for r in records)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": None}, "judge must be given with protocol paper.*--judge openai-community/gpt2-large"),
        ({"bonus_token": True}, "bonus_token must be false with protocol paper.*--bonus_token false"),
        ({"document_end": "<eod>"}, "document_end must be <sep><cls></s> with protocol paper, got '<eod>'"),
        ({"protocol": "papers"}, "protocol must be one of default, paper, got 'papers'"),
        ({"grid": {"protocol": ["default"]}}, "grid must be made of settings of this evaluation, got 'protocol'"),
        ({"split": "valid"}, None),
    ],
)
def test_settings_that_the_protocol_excludes_are_named_with_the_remedy(folder, settings, message):
    settings = PAPER | {"judge": "j"} | settings
    if message is None:
        with pytest.raises(DataFileError, match="WikiText has no split 'valid'; it has train, validation, test"):
            evaluate(SpeculativeConfig(**settings))
    else:
        with pytest.raises(ConfigError, match=message):
            SpeculativeConfig(**settings)


def test_the_split_that_is_asked_for_is_read_or_none(folder):
    (folder / "eval" / "wikitext-2-raw" / "wiki.valid.raw").write_text(" = Another = \n Text . \n")
    assert "cat" in load_text("wikitext", split="test")[1][0].text
    assert "Another" in load_text("wikitext", split="validation")[1][0].text
    with pytest.raises(DataFileError, match=r"no WikiText, split 'train': .*wiki\.train\.raw.*fetch_eval_datasets\.py"):
        load_text("wikitext", split="train")


@pytest.mark.parametrize("settings", [{"dataset": "samples"}, {"data_file": "text.txt"}, {}])
def test_a_split_of_what_has_none_is_refused(settings):
    assert SpeculativeConfig(**settings).split == "validation"
    with pytest.raises(ConfigError, match=r"split must be left out with .*, which has no splits, got 'test'"):
        SpeculativeConfig(**settings, split="test")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("rows.jsonl", '{"text": "One."}\n{"text": ""}\n{"text": " Two. "}\n', ["One.", "", " Two. "]),
        ("rows.txt", "One.\n \n Two. \n", ["One.\n", "", " Two. \n"]),
        ("empty.txt", " \n\n", None),
    ],
)
def test_rows_of_a_file_are_documents_with_or_without_text(tmp_path, name, content, texts):
    (tmp_path / name).write_text(content)
    if texts is None:
        with pytest.raises(DataFileError, match="holds no text"):
            load_text(data_file=str(tmp_path / name), as_rows=True)
    else:
        assert [d.text for d in load_text(data_file=str(tmp_path / name), as_rows=True)[1]] == texts


def test_a_text_that_is_short_is_used_with_a_warning_and_limit_lowers_the_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(speculative, "draw_plots", lambda *_: None)
    (tmp_path / "text.txt").write_text("A small grey cat sat on the mat. " * 9)
    settings = {"data_file": str(tmp_path / "text.txt"), "max_length": 16, "samplers": ["parallel"]}
    with pytest.warns(UserWarning, match="of 64 sequences: the text makes no more of 16 tokens"):
        summary = evaluate(SpeculativeConfig(**settings, output_dir=str(tmp_path / "short")))
    there = summary["num_sequences"]
    assert 3 < there < 64 and summary["num_sequences_wanted"] == 64
    assert summary["samplers"]["parallel"]["sequences"] == there
    assert f"{there} sequences (64 asked for) of 16 tokens" in report(summary)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        limited = evaluate(SpeculativeConfig(**settings, limit=3, output_dir=str(tmp_path / "limited")))
    assert (limited["num_sequences"], limited["num_sequences_wanted"]) == (3, 3) and "asked for" not in report(limited)
    paper = SpeculativeConfig(**settings, protocol="paper", bonus_token=False, judge="j", num_sequences=1)
    with pytest.raises(DataFileError, match="the text makes no sequence of 16 tokens"):
        masked_sequences(paper, [numpy.arange(15)])


def test_lambadas_own_rows_are_split_before_the_last_word():
    """At white space, as the published code splits them; the two forms of a row are the same item."""
    parse = resolve(NLP_TASKS["lambada"].parse)
    own = parse(3, {"text": "Tom saw\n a  dog. He liked the dog"})
    assert own == parse(3, {"context": "Tom saw a dog. He liked the", "continuation": "dog"})
    assert own.pieces == ("Tom saw a dog. He liked the", "") and own.references == (" dog",)
    for row in ({"text": "dog"}, {"text": " "}, {"text": 3}, {}):
        with pytest.raises(DataFileError, match="must be a text that is not empty"):
            parse(0, row)


@pytest.mark.parametrize("task", ["rocstories-1of5", "infill-file"])
def test_a_row_whose_reference_has_no_word_is_left_out_with_the_reason(task):
    story = {"text": "Tom ran. He fell. ...! She saw. They left."}
    row = story if task != "infill-file" else {"text": "Tom <mask:2> ran.", "reference": "--"}
    with pytest.raises(TextError, match="has no word that ROUGE counts"):
        resolve(NLP_TASKS[task].parse)(0, row)
