"""Sources and packing: every token is used, and every error names the file."""

import gzip
import json

import numpy as np
import pytest
from datasets import Dataset

from asarm import TextTokenizer
from asarm.config import DataConfig
from asarm.data.datasets import load_text
from asarm.data.packing import PackedRows, pack_all, tokenize
from asarm.data.rows import open_rows
from asarm.data.sources import Document, find_files, iterate_documents, read_documents
from asarm.errors import ConfigError, DataFileError


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.from_pretrained("tiny-english")


def write_jsonl(path, records):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    path = write_jsonl(tmp_path / name, [{"text": "one", "source": "s"}, {"text": "  "}, {"text": "two\nlines"}])
    assert read_documents(path) == [Document("one", "s"), Document("two\nlines", "")]


def test_wikitext_is_split_at_top_level_headings_only(tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = First = \n \n Text one . \n = = Part = = \n More . \n \n = Second = \n \n Text two . \n")
    titles = [d.text.splitlines()[0].strip() for d in read_documents(str(path), wikitext=True)]
    assert titles == ["= First =", "= Second ="]
    assert len(read_documents(str(path))) == 1


def test_environment_variables_in_paths(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    monkeypatch.setenv("ASARM_TEST_DIR", str(tmp_path))
    assert read_documents("$ASARM_TEST_DIR/a.jsonl")[0].text == "one"
    with pytest.raises(DataFileError, match="ASARM_NOT_SET"):
        read_documents("$ASARM_NOT_SET/a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
        ("bad.jsonl", b'{"story": "no text"}\n', "line 1: expected an object with a string"),
        ("bad.jsonl.gz", b"not gzip", "cannot read data file"),
        ("bad.txt", b"\xff\xfe\xfa", "cannot read data file"),
        ("bad.jsonl.zst", b"not Zstandard", "cannot read data file"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 99, mtime=0)[:-9], "Truncated"),
        ("bad.parquet", b"not Parquet", "cannot read data file"),
        ("lines.json", b'{"text": "fine"}\n', "not read as raw text: give JSON lines"),
    ],
)
def test_file_errors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        read_documents(str(tmp_path / name))


def test_parquet_columns_and_records_without_text(tmp_path):
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"content": ["one", None, " ", "two"], "source": list("abcd")}).to_parquet(str(path))
    assert list(iterate_documents(path, "content")) == [Document("one", "a"), Document("two", "d")]
    with pytest.raises(DataFileError, match=r"no column 'text'; it has \['content', 'source'\]"):
        read_documents(str(path))


def test_patterns_name_files_once(tmp_path, tokenizer):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"The file {name} has this text.")
    assert [p.name for p in find_files([str(tmp_path / "*.txt")])] == ["a.txt", "b.txt"]
    with pytest.raises(DataFileError, match=r"a\.txt'\] are named more than once"):
        find_files([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataFileError, match="hold no text"):
        open_rows(DataConfig(files=[str(tmp_path / "empty.txt")]), tokenizer, 0)


def test_missing_file_and_unreachable_data_set(tmp_path):
    with pytest.raises(DataFileError, match=r"no data file .*nowhere"):
        read_documents(str(tmp_path / "nowhere.txt"))
    with pytest.raises(DataFileError, match="nobody/nothing"):
        load_text("nobody/nothing")


def test_a_data_set_folder_as_the_hub_holds_it(tmp_path):
    Dataset.from_dict({"text": ["one", "", "two"]}).to_parquet(str(tmp_path / "validation-00000-of-00001.parquet"))
    source, documents = load_text(str(tmp_path))
    assert [d.text for d in documents] == ["one", "two"] and "validation" in source


def test_wikitext_rows_of_the_hub_become_the_articles_of_the_file(tmp_path, monkeypatch):
    from asarm.data import datasets

    lines = [
        "",
        " = S = \n",
        "",
        " Text one . \n",
        " = = Part = = \n",
        " More . \n",
        " = Second = \n",
        " Text two . \n",
    ]
    Dataset.from_dict({"text": lines}).to_parquet(str(tmp_path / "validation-00000-of-00001.parquet"))
    monkeypatch.delenv("ASARM_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "WIKITEXT_HUB", (str(tmp_path), None))
    _, documents = load_text("wikitext")
    assert [d.text.splitlines()[0].strip() for d in documents] == ["= S =", "= Second ="]


def test_samples_are_there_and_as_many_as_the_documentation_says():
    _, documents = load_text("samples")
    assert len(documents) == 64 + 22
    assert len({d.text for d in documents}) == len(documents)


def test_packing_for_evaluation_keeps_every_token(tokenizer):
    documents = [Document("A short one."), Document("Another document, a little longer than that."), Document("End.")]
    stream = np.concatenate(tokenize(documents, tokenizer))
    assert (stream == tokenizer.document_end).sum() == 3
    rows = pack_all(documents, tokenizer, 7)
    assert np.array_equal(np.concatenate(rows), stream[: sum(map(len, rows))])
    assert len(stream) - sum(map(len, rows)) <= 1 and all(len(r) == 7 for r in rows[:-1])


def test_training_rows_hold_every_document_once_an_epoch_weights_apart(tokenizer):
    documents = [Document(f"Document number {i}.", "a" if i % 2 else "b") for i in range(40)]
    lengths = [len(t) for t in tokenize(documents, tokenizer)]
    rows = PackedRows(documents, tokenizer, 16, seed=0)
    n_rows = -(-sum(lengths) // 16)
    epoch = np.concatenate([rows.row(i) for i in range(n_rows)])
    assert (epoch[: sum(lengths)] == tokenizer.document_end).sum() == 40
    assert sorted(tokenizer.decode(epoch[: sum(lengths)].tolist()).split("<eod>")[:-1]) == sorted(
        d.text for d in documents
    )
    assert np.array_equal(epoch[sum(lengths) :], epoch[: len(epoch) - sum(lengths)])  # the last row wraps around
    second = np.concatenate([rows.row(n_rows + i) for i in range(n_rows)])
    assert not np.array_equal(epoch, second)

    weighted = PackedRows(documents, tokenizer, 16, seed=0, weights={"a": 3, "b": 0.5})
    text = tokenizer.decode(np.concatenate([weighted.row(i) for i in range(weighted._n_rows)]).tolist())
    assert text.count("number 1.") >= 3 and text.count("number 39.") >= 3
    assert 5 <= sum(f"number {i}." in text for i in range(0, 40, 2)) <= 18  # half of 20, five standard deviations


def test_a_row_is_a_function_of_seed_and_index(tokenizer):
    documents = [Document(f"Document number {i}.") for i in range(30)]
    first, again = (PackedRows(documents, tokenizer, 16, seed=4) for _ in range(2))
    expected = [first.row(i) for i in range(60)]
    assert np.array_equal(again.row(45), expected[45])
    assert np.array_equal(again.row(3), expected[3]), "going back to an earlier epoch"
    assert not np.array_equal(PackedRows(documents, tokenizer, 16, seed=5).row(0), expected[0])


def test_packing_errors(tokenizer):
    with pytest.raises(DataFileError, match="less than one row of 512"):
        PackedRows([Document("tiny")], tokenizer, 512, seed=0)
    with pytest.raises(ConfigError, match=r"\['TinyStores'\] match no document"):
        PackedRows([Document("tiny " * 50, "TinyStories")], tokenizer, 16, seed=0, weights={"TinyStores": 2})


@pytest.mark.parametrize(("world_size", "rows_per_step"), [(1, 4), (2, 4), (3, 5)])
def test_ranks_share_the_rows_of_a_step(tokenizer, tmp_path, world_size, rows_per_step):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"Document number {i}."} for i in range(30)])
    config = DataConfig(files=[path], max_length=16)
    whole = PackedRows(read_documents(path), tokenizer, 16, seed=3)
    ranks = [open_rows(config, tokenizer, 3, rank, world_size).batches(2, rows_per_step) for rank in range(world_size)]
    for step in range(2, 9):
        parts = [next(rank) for rank in ranks]
        assert sorted(i for _, indices, _ in parts for i in indices) == list(
            range(step * rows_per_step, (step + 1) * rows_per_step)
        )
        for rank, (rows, indices, _) in enumerate(parts):
            assert all(i % world_size == rank for i in indices)
            assert np.array_equal(rows, np.stack([whole.row(i) for i in indices]))
