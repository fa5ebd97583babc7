"""Text to ids and back; gaps."""

import pytest

from asarm import TextTokenizer
from asarm.errors import ModelNotFoundError, TextError
from asarm.tokenizer import SPECIAL_TOKENS, train_byte_level_bpe

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
    ("text", "message"), [("no gap here", "no <mask>"), ("a <mask:0> b", "<mask:0>.*at least one")]
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
    xlnet.check_lossless("The cat sat on the mat.")
    with pytest.raises(TextError, match=r"'\\nb' at character 1 comes back as ' b'"):
        xlnet.check_lossless("a\nb")
    with pytest.raises(TextError, match="does not keep"):
        xlnet.encode_masked("A text\nwith <mask:2> lost.")
    masked = xlnet.encode_masked("A text with <mask:2> kept.")
    word = xlnet.encode("gaps")[0]
    filled = xlnet.fill(masked, [i if v else word for i, v in zip(masked.ids, masked.visible, strict=True)])
    assert filled == "A text with gaps gaps kept."
