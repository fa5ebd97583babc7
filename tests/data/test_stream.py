"""Streamed rows: none twice, none missed, the same for every number of processes and workers; exact resume."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from asarm import TextTokenizer
from asarm.config import DataConfig
from asarm.data import stream
from asarm.data.rows import open_rows
from asarm.errors import ConfigError, DataFileError

STREAMS, LENGTH, STEP = 4, 16, 6
N_DOCUMENTS = 150


def document(i: int) -> str:
    return f"Document {i} " + "word " * (i * 7 % 23)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.from_pretrained("tiny-english")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "text.jsonl.gz"
    with pa.output_stream(str(path), compression="gzip") as file:
        file.writelines(json.dumps({"text": document(i)}).encode() + b"\n" for i in range(N_DOCUMENTS))
    return path


@pytest.fixture(scope="module")
def config(text_file):
    sizes = {"streams": STREAMS, "max_length": LENGTH, "shuffle_buffer": 9, "num_workers": 0}
    return DataConfig(files=[str(text_file)], streaming=True, **sizes)


def read(config, tokenizer, world_size=1, step=0, steps=None, state=None, rows_per_step=STEP):
    """The rows of some steps by index, as all ranks read them, and the merged state after each step."""
    ranks = [open_rows(config, tokenizer, 3, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        rank.load_state(state or {})
    batches = [rank.batches(step, rows_per_step) for rank in ranks]
    rows, states = {}, []
    for _ in range(steps):
        merged = {}
        for rank, batch in enumerate(batches):
            ids, indices, state = next(batch)
            assert ids.shape == (len(indices), config.max_length) and ids.dtype == np.int32
            assert all(i % world_size == rank and i not in rows for i in indices)
            rows |= dict(zip(indices, ids, strict=True))
            merged |= state
        states.append(json.loads(json.dumps(merged)))
    assert sorted(rows) == list(range(step * rows_per_step, (step + steps) * rows_per_step))
    return rows, states


@pytest.fixture(scope="module")
def epoch(tokenizer):
    """What each stream holds in an epoch, by a slow loop: its tokens, in the order of the file."""
    return [
        [
            token
            for i in range(s, N_DOCUMENTS, STREAMS)
            for token in [*tokenizer.encode(document(i)), *tokenizer.document_end]
        ]
        for s in range(STREAMS)
    ]


N_STEPS = 70  # two epochs and a bit


@pytest.fixture(scope="module")
def uninterrupted(config, tokenizer):
    return read(config, tokenizer, steps=N_STEPS)


def test_an_epoch_holds_every_token_once_and_the_next_one_goes_on_where_it_ends(uninterrupted, epoch):
    rows, _ = uninterrupted
    for s, tokens in enumerate(epoch):
        got = [rows[i].tolist() for i in sorted(rows) if i % STREAMS == s]
        n_rows = len(tokens) // LENGTH
        endless = tokens * 3
        expected = [endless[i : i + LENGTH] for i in range(0, len(tokens) * 2, LENGTH)]
        assert len(got) > n_rows and sorted(got[:n_rows]) == sorted(expected[:n_rows]), "the rows of one epoch"
        assert got[:n_rows] != expected[:n_rows], "shuffled"
        n_rows_of_two = 2 * len(tokens) // LENGTH
        assert sorted(got[n_rows:n_rows_of_two]) == sorted(expected[n_rows:n_rows_of_two]), "no token between is lost"
        assert len(got) >= n_rows_of_two


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_workers_change_no_row_of_an_epoch(uninterrupted, epoch, config, tokenizer, world_size, num_workers):
    steps = max(map(len, epoch)) // LENGTH * STREAMS // STEP + 1
    rows, _ = read(replace(config, num_workers=num_workers), tokenizer, world_size, steps=steps)
    assert all(np.array_equal(row, uninterrupted[0][i]) for i, row in rows.items())


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 1), (3, 0)])
@pytest.mark.parametrize("step", [1, 29, 48])
def test_resumed_at_the_exact_next_row_with_other_ranks_and_workers(
    uninterrupted, config, tokenizer, world_size, num_workers, step
):
    rows, states = uninterrupted
    went_on, _ = read(replace(config, num_workers=num_workers), tokenizer, world_size, step, 12, states[step - 1])
    assert all(np.array_equal(row, rows[i]) for i, row in went_on.items())


def test_a_run_that_changed_its_ranks_and_workers_twice(uninterrupted, config, tokenizer):
    rows, state = uninterrupted[0], {}
    for step, world_size, num_workers in ((0, 3, 1), (10, 2, 2), (20, 1, 0)):
        part, states = read(replace(config, num_workers=num_workers), tokenizer, world_size, step, 10, state)
        state = states[-1]
        assert all(np.array_equal(row, rows[i]) for i, row in part.items())


def test_a_state_spares_reading_what_was_read(uninterrupted, config, tokenizer, monkeypatch):
    """Also: without a state, or with one of a later step, the rows are the same, only read from the beginning."""
    rows, states = uninterrupted
    packed = []
    monkeypatch.setattr(stream, "tokenize", lambda *a, f=stream.tokenize: packed.append(1) or f(*a))
    work = {}
    for name, state in (("state", states[59]), ("none", None), ("later", states[65])):
        packed.clear()
        went_on, _ = read(config, tokenizer, 1, 60, 1, state)
        assert all(np.array_equal(row, rows[i]) for i, row in went_on.items())
        work[name] = len(packed)
    assert work["state"] < work["none"] / 2 and work["later"] <= work["none"]


def documents_of(rows, n_streams, s, tokenizer) -> list[str]:
    """The whole documents at the beginning of stream ``s``, unshuffled."""
    ids = np.concatenate([rows[i] for i in sorted(rows) if i % n_streams == s])
    return [t.strip() for t in tokenizer.decode(ids.tolist()).split("<eod>")[:-1]]


@pytest.mark.parametrize("n_streams", [4, 5, 7])
def test_parquet_in_several_files(tmp_path, tokenizer, n_streams):
    """Six files of ten documents: with up to six streams whole files are dealt out, with more every n-th document."""
    for i in range(6):
        texts = [f"file {i} document {j}" + " and so on" * (j % 5) for j in range(10)]
        Dataset.from_dict({"content": texts, "stars": [1] * 10}).to_parquet(str(tmp_path / f"train-{i}.parquet"))
    sizes = {"max_length": 8, "streams": n_streams, "shuffle_buffer": 1, "num_workers": 0}
    config = DataConfig(dataset=str(tmp_path), text_column="content", **sizes)
    rows, states = read(config, tokenizer, steps=60)
    dealt, size = (6, 10) if n_streams <= 6 else (60, 1)
    share = [len(range(s, dealt, n_streams)) * size for s in range(n_streams)]
    heads = [documents_of(rows, n_streams, s, tokenizer)[: share[s]] for s in range(n_streams)]
    first_epoch = [text for head in heads for text in head]
    assert len(first_epoch) == len(set(first_epoch)) == 60
    if n_streams == 4:
        files = [list(dict.fromkeys(text.split()[1] for text in head)) for head in heads]
        assert files != [["0", "4"], ["1", "5"], ["2"], ["3"]], "files are in an order that the seed gives"
    for step in (3, 50):
        for world_size in (1, 2):
            went_on, _ = read(config, tokenizer, world_size, step, 5, states[step - 1])
            assert all(np.array_equal(row, rows[i]) for i, row in went_on.items())


def test_files_of_all_kinds_hold_the_same_rows(tmp_path, config, tokenizer):
    """JSON lines as they are, as .zst and as Parquet; streamed, and the same documents in memory."""
    records = [{"text": document(i)} for i in range(20)]
    lines = b"".join(json.dumps(r).encode() + b"\n" for r in records)
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as file:
        file.write(lines)
    Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    names = ("a.jsonl", "a.jsonl.zst", "a.parquet")
    for streaming in (True, False):
        changed = replace(config, streaming=streaming, streams=2)
        first, *others = (read(replace(changed, files=[str(tmp_path / n)]), tokenizer, steps=8)[0] for n in names)
        assert all(np.array_equal(row, other[i]) for other in others for i, row in first.items())


def test_text_files_by_pattern(tmp_path, tokenizer, config):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"This is the text of the file with the number {i}.\n" * 3)
    changed = replace(config, files=[str(tmp_path / "*.txt")], streams=1, shuffle_buffer=1)
    rows, _ = read(changed, tokenizer, steps=3)
    texts = documents_of(rows, 1, 0, tokenizer)[:3]
    assert sorted(text[-2] for text in texts) == ["0", "1", "2"]


def test_reading_leaves_the_random_numbers_of_training_alone(config, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    read(replace(config, num_workers=2), tokenizer, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_signal_to_the_workers_is_left_to_the_process_that_trains(config, tokenizer, uninterrupted):
    """A cluster signals all processes of a job; the training process wants to finish its step and save."""
    before = set(psutil.Process().children())
    batches = open_rows(replace(config, num_workers=2), tokenizer, 3).batches(0, STEP)
    next(batches)
    workers = [child for child in psutil.Process().children() if child not in before]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    for rows, indices, _ in islice(batches, 30):
        assert all(np.array_equal(row, uninterrupted[0][i]) for i, row in zip(indices, rows, strict=True))
    batches.close()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_workers_do_not_outlive_an_uncaught_error(text_file):
    script = f"""
from asarm import TextTokenizer
from asarm.config import DataConfig
from asarm.data.rows import open_rows
config = DataConfig(files=[{str(text_file)!r}], streaming=True, max_length=16, streams=2, num_workers=2)
batches = open_rows(config, TextTokenizer.from_pretrained("tiny-english"), 0).batches(0, 4)
next(batches)
raise RuntimeError("of the training")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "RuntimeError: of the training" in done.stderr


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_met_while_reading_are_named(tmp_path, tokenizer, config, num_workers):
    changed = replace(config, num_workers=num_workers)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + '{"text":\n')
    with pytest.raises(DataFileError, match=r"^\S*bad.jsonl, line 2: not JSON"):
        next(open_rows(replace(changed, files=[str(tmp_path / "bad.jsonl")]), tokenizer, 0).batches(0, STEP))
    (tmp_path / "1.txt").write_text("a text that is long enough for a row " * 20)
    for i in (2, 3, 4):
        (tmp_path / f"{i}.txt").write_text("\n" if i == 3 else "a line\n" * 20_000)
    with pytest.raises(DataFileError, match=r"^stream \d of 4 has no document in epoch 0: give more text, or fewer"):
        next(open_rows(replace(changed, files=[str(tmp_path / "?.txt")]), tokenizer, 0).batches(0, STEP))


def test_raw_text_is_streamed_a_piece_at_a_time(tmp_path, tokenizer, config, monkeypatch):
    """One file for all streams: piece n is in stream n % 4, and together they are the file."""
    monkeypatch.setattr(stream, "PIECE", 300)
    text = "".join(f"This is line number {i}.\n" for i in range(400))
    (tmp_path / "long.txt").write_text(text)
    rows, _ = read(replace(config, files=[str(tmp_path / "long.txt")], shuffle_buffer=1), tokenizer, steps=30)
    by_stream = [documents_of(rows, STREAMS, s, tokenizer)[:6] for s in range(STREAMS)]
    pieces = [f"{piece}\n" for turn in zip(*by_stream, strict=True) for piece in turn]
    assert len(pieces) == 6 * STREAMS and all(300 <= len(piece) < 330 for piece in pieces)
    assert text.startswith("".join(pieces))


def test_too_few_documents_are_named_before_anything_is_read(tmp_path, tokenizer, config):
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "a document of its own " * 20}) + "\n")
    message = r"few.jsonl'\] hold 1 document\(s\), which cannot be dealt into 4 data.streams; give more text, or fewer"
    with pytest.raises(DataFileError, match=message):
        open_rows(replace(config, files=[str(tmp_path / "few.jsonl")]), tokenizer, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"files": ["nowhere/*.jsonl"]}, DataFileError, r"no data file 'nowhere/\*\.jsonl'"),
        ({"text_column": "content"}, DataFileError, 'line 1: expected an object with a string "content"'),
        ({"files": [], "dataset": "nobody/nothing"}, DataFileError, "'nobody/nothing'.*a Hub id that exists"),
        ({"source_weights": {"a": 2.0}}, ConfigError, "data.source_weights must be empty where text is streamed"),
        ({"revision": "main"}, ConfigError, "data.revision must be used with data.dataset, got 'main'"),
        ({"streams": 0}, ConfigError, "data.streams must be at least 1, got 0"),
        ({"shuffle_buffer": 0}, ConfigError, "data.shuffle_buffer"),
        ({"num_workers": -1}, ConfigError, "data.num_workers"),
        ({"dataset": "someone/text"}, ConfigError, "data.files or from data.dataset, and both are given"),
        ({"files": []}, ConfigError, "data.files or from data.dataset, and nothing is given"),
    ],
)
def test_errors_before_anything_is_read(tokenizer, config, changes, error, message):
    with pytest.raises(error, match=message):
        open_rows(replace(config, **changes), tokenizer, 0)


def test_an_empty_data_set_is_named(tmp_path, tokenizer):
    Dataset.from_dict({"text": []}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(DataFileError, match="holds no row"):
        open_rows(DataConfig(dataset=str(tmp_path)), tokenizer, 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_that_breaks_off_is_named(tmp_path, tokenizer, num_workers):
    Dataset.from_dict({"text": [document(i) for i in range(9)]}).to_parquet(str(tmp_path / "train-0.parquet"))
    (tmp_path / "train-1.parquet").write_bytes(b"a download that was not one")
    config = DataConfig(dataset=str(tmp_path), max_length=8, streams=1, num_workers=num_workers)
    with pytest.raises(DataFileError, match=r"^cannot read data set .*ArrowInvalid"):
        next(open_rows(config, tokenizer, 0).batches(0, 4))
