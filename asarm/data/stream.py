"""Rows from text that is read piece by piece, the same for every number of processes and workers.

The text is dealt into a fixed number of streams, whoever reads them. Each stream tokenises its documents, packs them,
and shuffles its rows in blocks; row i of the run is row i // streams of stream i % streams. A process reads the streams
that hold its rows. So which rows a step has is a function of the settings and the seed alone, and a state is no more
than a place near which to begin reading: any processes and workers can go on from it, at the exact next row.

Streams repeat their share of the text without end, files in a new order each epoch; one with a smaller share begins its
next epoch sooner. Nothing is dropped: the tokens that do not fill a row at a stream's end of an epoch begin its first
row of the next.
"""

import atexit
import math
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils import data as torch_data

from ..config import DataConfig
from ..errors import DataFileError, UserError
from ..rng import generator
from ..tokenizer import TextTokenizer
from .datasets import explained, open_hub
from .packing import rank_indices, tokenize
from .sources import Document, find_files, iterate_documents

PIECE = 2**16  # characters of raw text that are a document of their own, so that it is streamed as well
DOCUMENTS_READ = 32  # tokenised together; a state points at such a batch and into it
START = {"row": 0, "epoch": 0, "source": None, "used": 0}


def open_text(config: DataConfig) -> tuple[IterableDataset, str]:
    """What ``config`` names, as a data set that is read piece by piece, and the column that holds its text."""
    if config.dataset is not None:
        where = {"data_dir": config.data_dir, "revision": config.revision, "text_column": config.text_column}
        return open_hub(config.dataset, config.dataset_config, config.split, **where), config.text_column
    files = find_files(config.files)
    for path in files:
        next(_documents([path], config.text_column), None)  # a file that is not as it should be: say so now
    found = sum(1 for _ in islice(_documents(files, config.text_column), config.streams))
    if found < config.streams:
        raise DataFileError(
            f"{config.files} hold {found} document(s), which cannot be dealt into {config.streams} data.streams; give "
            "more text, or fewer data.streams, or leave data.streaming out"
        )
    make = {"files": [str(path) for path in files], "text_column": config.text_column}
    try:
        return IterableDataset.from_generator(_texts, gen_kwargs=make), "text"
    except OSError as error:  # of a lock that the library takes in its cache, although it keeps nothing there
        raise DataFileError(f"cannot stream {config.files}: {error}; let HF_HOME name a folder to write to") from error


def _texts(files: list[str], text_column: str) -> Iterator[dict[str, str]]:
    for document in _documents(map(Path, files), text_column):
        yield {"text": document.text}


def _documents(files: Iterable[Path], text_column: str) -> Iterator[Document]:
    for path in files:
        yield from iterate_documents(path, text_column, piece=PIECE)


@dataclass(frozen=True)
class Stream:
    """One of ``config.streams`` shares of the text: whole files where there are enough, else every n-th document."""

    text: IterableDataset
    column: str
    tokenizer: TextTokenizer
    config: DataConfig
    seed: int
    index: int

    def rows(self, state: dict) -> Iterator[tuple[int, dict, np.ndarray]]:
        """From the block that begins at ``state``: a row's number, the state of its block's beginning, the row.

        The rows of a block are those of one epoch, in a random order that the number of the first one seeds.
        """
        number = state["row"]
        for _, rows in groupby(self._pack(state), key=lambda row: row[0]):
            while block := list(islice(rows, self.config.shuffle_buffer)):
                begin = block[0][1] | {"row": number}
                order = generator(self.seed, f"stream-{self.index}", number).permutation(len(block))
                for offset, which in enumerate(order):
                    yield number + offset, begin, block[which][2]
                number += len(block)

    def _pack(self, state: dict) -> Iterator[tuple[int, dict, np.ndarray]]:
        """Rows in reading order: the epoch in which a row is completed, the state of its beginning, the row."""
        length = self.config.max_length
        rest = np.empty(0, np.int32)  # tokens that do not fill a row, from the place that ``state`` tells
        skipped = state["used"]
        for epoch, source, ids in self._read(state["epoch"], state["source"]):
            buffer = np.concatenate([rest, ids[skipped:]])
            before = skipped - len(rest)  # where the buffer begins, counted from this batch's first token
            skipped = 0
            for start in range(0, len(buffer) - length + 1, length):
                yield epoch, state, buffer[start : start + length]
                state = {"epoch": epoch, "source": source, "used": before + start + length}
            rest = buffer[len(buffer) // length * length :]

    def _read(self, epoch: int, source: dict | None) -> Iterator[tuple[int, dict | None, np.ndarray]]:
        """Batches of documents as ids, each with its epoch and the state of the text before it, without end."""
        while True:
            text = self._share(epoch)
            if source is not None:
                text.load_state_dict(source)
            empty, c = source is None, self.config
            with explained(c.dataset, c.dataset_config, c.split) if c.dataset else nullcontext():
                for batch in text.iter(batch_size=DOCUMENTS_READ):
                    documents = [Document(t) for t in batch[self.column] if t and t.strip()]
                    if documents:
                        empty = False
                        yield epoch, source, np.concatenate(tokenize(documents, self.tokenizer))
                    source = text.state_dict()
            if empty:
                raise DataFileError(
                    f"stream {self.index} of {self.config.streams} has no document in epoch {epoch}: give more text, "
                    "or fewer data.streams"
                )
            epoch, source = epoch + 1, None

    def _share(self, epoch: int) -> IterableDataset:
        n = self.config.streams
        strategy = "shards" if self.text.num_shards >= n else "examples"
        share = split_dataset_by_node(self.text, self.index, n, strategy)
        share.set_epoch(int(generator(self.seed, "files", epoch).integers(1, 2**31)))  # seeds the order of its files
        return share


class StreamedRows:
    """Rows of streams (a :class:`~asarm.data.rows.TrainingRows`), read by ``config.num_workers`` processes.

    A state holds, for each stream that was read, the beginning of the block of its last row.
    """

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer, seed: int, rank: int = 0, world_size: int = 1):
        self.max_length, self.rank, self.world_size = config.max_length, rank, world_size
        text, column = open_text(config)
        self.streams = [Stream(text, column, tokenizer, config, seed, index) for index in range(config.streams)]
        n_read = sum(self.reads(index) for index in range(config.streams))
        self.num_workers = min(config.num_workers, n_read)
        self.state: dict[str, dict] = {}

    def reads(self, stream: int) -> bool:
        """Whether any row of a stream is one of this rank's."""
        return (stream - self.rank) % math.gcd(len(self.streams), self.world_size) == 0

    def load_state(self, state: dict) -> None:
        self.state = state

    def batches(self, step: int, rows_per_step: int) -> Iterator[tuple[np.ndarray, list[int], dict]]:
        loader = torch_data.DataLoader(
            _Reader(self, step, rows_per_step),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # its own: the default one is the training's
        )
        workers = [iter(loader)]  # ends them when it is let go of, which an uncaught error must not prevent
        atexit.register(workers.clear)
        try:
            while True:
                rows, state = {}, {}
                for part in islice(workers[0], max(1, self.num_workers)):  # of each in turn
                    if isinstance(part, UserError):
                        raise part
                    rows |= part[0]
                    state |= part[1]
                indices = sorted(rows)
                yield np.array([rows[i] for i in indices], np.int32).reshape(-1, self.max_length), indices, state
        finally:
            atexit.unregister(workers.clear)
            workers.clear()


class _Reader(torch_data.IterableDataset):
    """What one worker reads (or the process itself): of each step, the rows of its streams by index, and a state."""

    def __init__(self, rows: StreamedRows, step: int, rows_per_step: int):
        self.rows, self.step, self.rows_per_step = rows, step, rows_per_step

    def __iter__(self) -> Iterator[tuple[dict[int, np.ndarray], dict] | UserError]:
        worker = torch_data.get_worker_info()
        streams = [s for s in self.rows.streams if self.rows.reads(s.index)]
        if worker is not None:
            streams = streams[worker.id :: worker.num_workers]
        try:
            yield from self._steps(streams)
        except UserError as error:  # as a value: one that is raised comes back with the worker's traceback as its text
            yield error

    def _steps(self, streams: list[Stream]) -> Iterator[tuple[dict[int, np.ndarray], dict]]:
        rows, n = self.rows, len(self.rows.streams)
        first = self.step * self.rows_per_step
        state = {str(s.index): self._near(s, -((s.index - first) // n)) for s in streams}
        found = {s.index: s.rows(state[str(s.index)]) for s in streams}
        for indices in rank_indices(self.step, self.rows_per_step, rows.rank, rows.world_size):
            taken = {}
            for index in indices:
                number, stream = divmod(index, n)
                if stream in found:
                    _, state[str(stream)], taken[index] = next(row for row in found[stream] if row[0] == number)
            yield taken, dict(state)

    def _near(self, stream: Stream, number: int) -> dict:
        """A state from which the stream's row ``number``, or one before it, comes next."""
        state = self.rows.state.get(str(stream.index), START)
        return state if state["row"] <= number else START


def _as_it_is(part: object) -> object:
    return part


def _prepare_worker(_: int) -> None:
    """A worker leaves signals to its parent, which may want to finish a step and save; the parent's end is its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
