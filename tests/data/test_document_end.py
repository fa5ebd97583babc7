"""What stands after a document, and the whitespace map: stored with a tokenizer, and used as a model was trained."""

import json

import numpy as np
import pytest
from conftest import TEXTS, assert_same_tokenizer
from training_runs import small_run
from transformers import AutoTokenizer

from asarm import TextTokenizer
from asarm.cli import main
from asarm.data.packing import pack_all, tokenize
from asarm.data.sources import Document
from asarm.embedded import ASSETS
from asarm.errors import ConfigError, ModelNotFoundError, TextError
from asarm.loading import load
from asarm.train.model import train

PAPER = "<sep><cls></s>"  # XLNet's own ids of these are 4, 3 and 2


def test_documents_end_as_the_setting_says():
    documents = [Document("One."), Document("Two.")]
    for setting, end in ((None, [7]), ("<eod>", [7]), (PAPER, [4, 3, 2]), ("</s>", [2])):
        tokenizer = TextTokenizer.from_pretrained("tiny-english", document_end=setting)
        assert tokenizer.document_end == tuple(end)
        one, two = (tokenizer.encode(d.text) for d in documents)
        assert np.concatenate(tokenize(documents, tokenizer)).tolist() == [*one, *end, *two, *end]
        assert np.concatenate(pack_all(documents, tokenizer, 100)).tolist() == [*one, *end, *two, *end]


def test_xlnets_document_end_is_that_of_the_authors_code(data_dir):
    """They append the end-of-sequence token to what Hugging Face's tokenizer makes of a document."""
    folder = data_dir / "tokenizers" / "xlnet-base-cased"
    tokenizer = TextTokenizer.from_pretrained(folder, document_end=PAPER)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        (ours,) = tokenize([Document(text)], tokenizer)
        assert ours.tolist() == [*theirs.encode(text), theirs.eos_token_id]


@pytest.mark.parametrize("wrong", ["", "the end", "<sep> <cls>", "<sep>the end", "<mask>", "<eos>", "<sep", "<eod>\n"])
def test_anything_but_special_tokens_is_refused(wrong):
    with pytest.raises(ConfigError, match="document_end must be special tokens") as caught:
        TextTokenizer.from_pretrained("tiny-english", document_end=wrong)
    assert repr(wrong) in str(caught.value)


def test_a_vocabulary_without_the_tokens_is_named():
    backend = TextTokenizer.from_pretrained("tiny-english").backend
    fewer = json.loads(backend.to_str())
    fewer["added_tokens"] = [t for t in fewer["added_tokens"] if t["content"] != "<sep>"]
    del fewer["model"]["vocab"]["<sep>"]
    with pytest.raises(TextError, match="no <sep> token"):
        TextTokenizer(type(backend).from_str(json.dumps(fewer)), document_end=PAPER)


def test_a_stored_tokenizer_is_as_it_was_and_a_setting_goes_over_it(tmp_path):
    tokenizer = TextTokenizer.from_pretrained("tiny-english", whitespace_map="code", document_end=PAPER)
    tokenizer.save_pretrained(tmp_path)
    stored = TextTokenizer.from_pretrained(tmp_path)
    assert stored.whitespace_map == "code" and stored.document_end == (4, 3, 2)
    assert all(stored.encode(text) == tokenizer.encode(text) for text in TEXTS)
    other = TextTokenizer.from_pretrained(tmp_path, document_end="<eod>")
    assert other.whitespace_map == "code" and other.document_end == (7,)
    (tmp_path / "tokenizer_config.json").write_text('{"document_end": "end"}')
    with pytest.raises(ConfigError, match="'end'"):
        TextTokenizer.from_pretrained(tmp_path)
    for malformed in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(malformed)
        with pytest.raises(ModelNotFoundError, match=r"tokenizer_config.json cannot be read"):
            TextTokenizer.from_pretrained(tmp_path)


def test_a_run_is_trained_validated_and_evaluated_with_its_document_end(text_file, tmp_path, capsys):
    run = small_run(text_file, tmp_path / "run", steps=1, document_end=PAPER, whitespace_map="code")
    final = str(train(run))
    _, tokenizer = load(final)
    assert tokenizer.document_end == (4, 3, 2) and tokenizer.whitespace_map == "code"
    assert load(final, document_end="<eod>")[1].document_end == (7,)
    scores = []
    for setting in ([], ["--document_end", PAPER], ["--document_end", "<eod>"]):
        command = ["score", "--model", final, "--data_file", str(text_file), "--max_length", "16", "--json", *setting]
        assert main(command) == 0
        scores.append(json.loads(capsys.readouterr().out)["likelihood"])
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("name", ["tiny-english", "tiny-code"])
def test_embedded_tokenizers_are_what_auto_tokenizer_loads(name):
    ours = TextTokenizer.from_pretrained(name)
    assert_same_tokenizer(AutoTokenizer.from_pretrained(ASSETS / name), ours)
