"""Documents to rows of a fixed length: concatenated, with the document end after each, and cut.

Nothing is dropped. Training wraps an epoch's last row around to the epoch's beginning; evaluation keeps it as a
shorter row.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import count

import numpy as np

from ..errors import ConfigError, DataFileError
from ..rng import generator
from ..tokenizer import TextTokenizer
from .sources import Document

TOKENIZED_TOGETHER = 256  # documents


def tokenize(documents: list[Document], tokenizer: TextTokenizer) -> list[np.ndarray]:
    """Each document's ids followed by those of the document end."""
    encoded = tokenizer.encode_batch([d.text for d in documents])
    return [np.array([*ids, *tokenizer.document_end], dtype=np.int32) for ids in encoded]


def pack_all(
    documents: list[Document], tokenizer: TextTokenizer, max_length: int, n_rows: int | None = None
) -> list[np.ndarray]:
    """Rows of ``max_length`` ids in reading order, all or the first ``n_rows``; the text's last one may be shorter (one
    of a single token is not kept: nothing to predict)."""
    encoded, n_tokens = [], 0
    for start in range(0, len(documents), TOKENIZED_TOGETHER):
        encoded.append(np.concatenate(tokenize(documents[start : start + TOKENIZED_TOGETHER], tokenizer)))
        n_tokens += len(encoded[-1])
        if n_rows is not None and n_tokens >= n_rows * max_length:
            break
    stream = np.concatenate(encoded)[: None if n_rows is None else n_rows * max_length]
    rows = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
    return [row for row in rows if len(row) > 1]


class PackedRows:
    """An endless, seeded sequence of rows in memory (a :class:`~asarm.data.rows.TrainingRows`); row ``i`` is a pure
    function of the seed and ``i``, so that there is no state to keep.

    ``weights`` maps a pattern over ``source`` (``ChiLit/*``) to the number of times that such a document appears in
    an epoch; fractions are drawn anew each epoch. The first pattern that matches counts; without one the weight is 1.
    """

    def __init__(
        self,
        documents: list[Document],
        tokenizer: TextTokenizer,
        max_length: int,
        seed: int,
        weights: dict[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        weights = weights or {}
        unused = [p for p in weights if not any(fnmatch(d.source, p) for d in documents)]
        if unused:
            raise ConfigError(
                f"source_weights {unused} match no document; sources: {sorted({d.source for d in documents})[:8]}"
            )
        self.max_length, self.seed, self.rank, self.world_size = max_length, seed, rank, world_size
        self.documents = tokenize(documents, tokenizer)
        self.weight = np.array([next((w for p, w in weights.items() if fnmatch(d.source, p)), 1.0) for d in documents])
        self._rewind()

    def _rewind(self) -> None:
        self._epoch, self._stream, self._first_row = -1, np.empty(0, np.int32), 0
        self._advance()

    def _advance(self) -> None:
        """Lay out the next epoch: how often each document appears, in which order."""
        self._first_row += self._n_rows
        self._epoch += 1
        rng = generator(self.seed, "epoch", self._epoch)
        copies = np.floor(self.weight + rng.random(len(self.weight))).astype(int)
        which = rng.permutation(np.repeat(np.arange(len(copies)), copies))
        self._stream = np.concatenate([np.empty(0, np.int32), *(self.documents[i] for i in which)])
        if len(self._stream) < self.max_length:
            raise DataFileError(
                f"an epoch of the training data has {len(self._stream)} tokens, less than one row of "
                f"{self.max_length}; give more text or a shorter data.max_length"
            )

    @property
    def _n_rows(self) -> int:
        return -(-len(self._stream) // self.max_length)

    def row(self, index: int) -> np.ndarray:
        """Row ``index`` of the run, [max_length]; quick as long as indices do not go back to an earlier epoch."""
        if index < self._first_row:
            self._rewind()
        while index >= self._first_row + self._n_rows:
            self._advance()
        start = (index - self._first_row) * self.max_length
        return np.take(self._stream, np.arange(start, start + self.max_length), mode="wrap")

    def batches(self, step: int, rows_per_step: int) -> Iterator[tuple[np.ndarray, list[int], dict]]:
        for indices in rank_indices(step, rows_per_step, self.rank, self.world_size):
            yield np.array([self.row(i) for i in indices], np.int32).reshape(-1, self.max_length), indices, {}

    def load_state(self, state: dict) -> None:
        """Nothing to do: any row can be made at once."""


def rank_indices(step: int, rows_per_step: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """The indices of a rank's rows, for ``step`` and each step after it."""
    for first in count(step * rows_per_step, rows_per_step):
        yield list(range(first + (rank - first) % world_size, first + rows_per_step, world_size))
