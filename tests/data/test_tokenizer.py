"""Text to ids and back; gaps."""

import gzip
import json
from collections import Counter

import pytest
import torch
from conftest import make_model
from transformers import AutoTokenizer

from asarm import SamplerConfig, TextTokenizer, infill
from asarm.errors import ConfigError, ModelNotFoundError, TextError
from asarm.tokenizer import SPECIAL_TOKENS, Difference, train_byte_level_bpe

HARD = 'Two  spaces, a\ttab,\n\na newline, "quotes", naïve café, 雪, 🐈, <eod> and <s> spelled out. '


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.from_pretrained("tiny-english")


def test_byte_level_vocabulary_keeps_every_byte(tokenizer):
    ids = tokenizer.encode(HARD)
    assert tokenizer.decode(ids) == HARD
    assert not set(ids) & set(tokenizer.special_ids), "a special token that is spelled out is text"
    tokenizer.check_lossless(HARD)


def test_special_tokens_have_the_ids_of_xlnet():
    trained = train_byte_level_bpe(["a small text, a very small text"], 300)
    assert [trained.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(9))
    assert trained.token_to_id("<mask>") == 6


def test_gaps_swallow_the_space_before_them_and_filling_keeps_the_rest(tokenizer):
    text = "The  cat <mask:2> on\nthe mat.<mask> It  slept\t<mask:3>"
    masked = tokenizer.encode_masked(text)
    assert [len(g) for g in masked.gaps] == [2, 1, 3]
    assert [i for i, v in enumerate(masked.visible) if not v] == [i for g in masked.gaps for i in g]
    assert all(masked.ids[i] == tokenizer.mask_id for g in masked.gaps for i in g)
    words = [tokenizer.encode(t) for t in (" sat", " down", " Yes.", " all")]
    filled = list(masked.ids)
    for position, word in zip([*masked.gaps[0], *masked.gaps[1]], [words[0][0], words[1][0], words[3][0]], strict=True):
        filled[position] = word
    for position in masked.gaps[2]:
        filled[position] = words[3][0]
    assert tokenizer.fill(masked, filled) == "The  cat sat down on\nthe mat. all It  slept\t all all all"


def test_indentation_before_a_gap_is_kept_and_a_character_may_span_gaps(tokenizer):
    masked = tokenizer.encode_masked("def f():\n    <mask>\n\tx <mask><mask:3>.")
    assert masked.pieces == ["def f():\n   ", "\n\tx", "."]
    cat = tokenizer.encode("\U0001f408")
    assert len(cat) == len(masked.gaps[1]) == 4
    ids = list(masked.ids)
    ids[masked.gaps[0].start] = tokenizer.encode(" a")[0]
    ids[masked.gaps[1].start : masked.gaps[1].stop] = cat
    assert tokenizer.fill(masked, ids) == "def f():\n    a\n\tx\U0001f408."


def test_a_text_may_begin_with_a_gap(tokenizer):
    masked = tokenizer.encode_masked("<mask> sat.")
    assert tokenizer.fill(masked, [tokenizer.encode("She")[0], *masked.ids[1:]]) == "She sat."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no gap here", "no <mask>"),
        ("a <mask:0> b", "<mask:0>.*at least one"),
        ("a <mask:99999999999> b", "<mask:99999999999>.*at most 1048576"),
        (f"a <mask:{'9' * 5000}> b", "<mask:9{34}.*at most 1048576"),  # more digits than Python converts
    ],
)
def test_text_errors(tokenizer, text, message):
    with pytest.raises(TextError, match=message):
        tokenizer.encode_masked(text)


def test_unknown_tokenizer(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        TextTokenizer.from_pretrained(str(tmp_path / "missing"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="not a fast tokenizer"):
        TextTokenizer.from_pretrained(tmp_path)


def test_xlnet_vocabulary_and_its_losses_are_named(data_dir):
    xlnet = TextTokenizer.from_pretrained(data_dir / "tokenizers" / "xlnet-base-cased")
    assert len(xlnet) == 32000 and xlnet.mask_id == 6 and xlnet.special_ids == tuple(range(9))
    spelled = " ".join(SPECIAL_TOKENS)
    assert xlnet.decode(xlnet.encode(spelled)) == spelled and not set(xlnet.encode(spelled)) & set(range(9))
    xlnet.check_lossless("The cat sat on the mat.")
    with pytest.raises(TextError, match=r"'\\n' at character 1 comes back as ' '"):
        xlnet.check_lossless("a\nb")
    with pytest.raises(TextError, match="does not keep"):
        xlnet.encode_masked("A text\nwith <mask:2> lost.")
    masked = xlnet.encode_masked("A text with <mask:2> kept.")
    word = xlnet.encode("gaps")[0]
    filled = xlnet.fill(masked, [i if v else word for i, v in zip(masked.ids, masked.visible, strict=True)])
    assert filled == "A text with gaps gaps kept."


@pytest.fixture(scope="module")
def xlnet_code(data_dir):
    return TextTokenizer.from_pretrained(data_dir / "tokenizers" / "xlnet-base-cased", whitespace_map="code")


def single_line_problems(data_dir) -> list[dict]:
    with gzip.open(data_dir / "eval" / "humaneval_infill" / "HumanEval-SingleLineInfilling.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


PROGRAM = "def f(x):\n    if x:  # two spaces\n\treturn '<cls> and <unk>'\n\n"


def test_whitespace_map_keeps_programs(xlnet_code):
    ids = xlnet_code.encode(PROGRAM)
    assert ids.count(3) == 4 and ids.count(4) == 1 and ids.count(0) == 3, "line breaks, tab, pairs of spaces"
    assert xlnet_code.decode(ids) == PROGRAM
    assert xlnet_code.encode_batch([PROGRAM, "", "x\n"]) == [ids, [], [*xlnet_code.encode("x"), 3]]
    xlnet_code.check_lossless(PROGRAM)
    masked = xlnet_code.encode_masked("if x:\n    <mask:2>\n")
    one, two = xlnet_code.encode("return None")
    assert masked.ids[-4:-1] == [0, 6, 6], "the indentation before a gap stays where it is"
    assert xlnet_code.fill(masked, [*masked.ids[:-3], one, two, 3]) == "if x:\n    return None\n"


def test_whitespace_map_gives_the_ids_of_the_published_checkpoint(xlnet_code, data_dir):
    """Hugging Face's tokenizer on text in which the published replacements were made, in their order."""
    reference = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "xlnet-base-cased")
    keys = ("prompt", "canonical_solution", "suffix")
    texts = sorted({problem[key] for problem in single_line_problems(data_dir) for key in keys})
    replaced = []
    for text in texts:
        for whitespace, token in (("\n", "<cls>"), ("\t", "<sep>"), ("  ", "<unk>"), ("   ", "<pad>")):
            text = text.replace(whitespace, token)
        replaced.append(text)
    assert len(texts) == 2645
    assert xlnet_code.encode_batch(texts) == reference(replaced, add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_the_exact_loss_of_the_whitespace_map(xlnet_code, data_dir):
    """All prompts and suffixes of single-line HumanEval: lost are odd spaces, '' and characters that XLNet lacks."""
    counts, lossy = Counter(), Counter()
    for problem in single_line_problems(data_dir):
        for key in ("prompt", "suffix"):
            text, rebuilt, end = problem[key], "", 0
            differences = xlnet_code.round_trip_loss(text)
            for d in differences:
                assert text[d.start : d.start + len(d.text)] == d.text != d.back
                rebuilt, end = rebuilt + text[end : d.start] + d.back, d.start + len(d.text)
                counts["spaces" if not d.text.strip(" ") else d.text] += 1
            assert rebuilt + text[end:] == xlnet_code.decode(xlnet_code.encode(text)), "nothing else is lost"
            lossy[key] += bool(differences)
    assert lossy == {"prompt": 564, "suffix": 88}
    assert counts == {"spaces": 1307, "''": 346, " ➞ ": 314, "^": 61, " ≤ ": 18}


def test_losses_are_named_with_their_place(xlnet_code):
    assert xlnet_code.round_trip_loss("a\n   b ''\n") == [Difference(2, "   ", "  "), Difference(7, "''", '"')]
    with pytest.raises(TextError, match=r"'   ' at character 2 comes back as '  ' \(the first of 2\)"):
        xlnet_code.check_lossless("a\n   b ''\n")
    xlnet_code.check_lossless(" a gap may take a single space at an end ")
    with pytest.raises(TextError, match="does not keep"):
        xlnet_code.encode_masked("a\n   <mask>")


def test_whitespace_can_be_drawn_with_the_map_and_not_without(xlnet_code, data_dir):
    plain = TextTokenizer.from_pretrained(data_dir / "tokenizers" / "xlnet-base-cased")
    assert xlnet_code.special_ids == (1, 2, 5, 6, 7, 8) and plain.special_ids == tuple(range(9))
    model = make_model(vocab_size=32000, mask_token_id=6, spread=0.02)
    with torch.no_grad():
        model.lm_loss.bias[3] = 100.0  # a model that writes nothing but line breaks
    config = SamplerConfig("sequential", greedy=True)
    assert infill(model, xlnet_code, "x<mask:3>", config) == ["x\n\n\n"]
    assert "\n" not in infill(model, plain, "x<mask:3>", config)[0]


def test_errors_of_the_whitespace_map():
    with pytest.raises(ConfigError, match="whitespace_map must be one of code, got 'python'"):
        TextTokenizer.from_pretrained("tiny-english", whitespace_map="python")
    backend = train_byte_level_bpe(["a text"], 300)
    fewer = json.loads(backend.to_str())
    fewer["added_tokens"] = [t for t in fewer["added_tokens"] if t["content"] != "<cls>"]
    del fewer["model"]["vocab"]["<cls>"]
    with pytest.raises(TextError, match="has no <cls> token"):
        TextTokenizer(type(backend).from_str(json.dumps(fewer)), whitespace_map="code")


def test_a_byte_level_vocabulary_keeps_every_byte_with_the_map_too():
    mapped = TextTokenizer.from_pretrained("tiny-english", whitespace_map="code")
    assert mapped.decode(mapped.encode(HARD)) == HARD and 3 in mapped.encode(HARD)
