"""Training rows as the settings describe them, and what a training loop may ask of them."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ..config import DataConfig
from ..errors import DataFileError
from ..tokenizer import TextTokenizer
from .packing import PackedRows
from .sources import find_files, iterate_documents


class TrainingRows(Protocol):
    """An endless sequence of rows [max_length], of which a process reads those of its rank.

    Which row has which index is a function of the settings and the seed alone: not of the number of processes, nor of
    what was read before. ``batches`` may therefore begin anywhere; a state only spares it reading from the beginning.
    """

    max_length: int

    def batches(self, step: int, rows_per_step: int) -> Iterator[tuple[np.ndarray, list[int], dict]]:
        """For ``step`` and each optimiser step after it: this rank's rows [n, max_length], their indices, and a state.

        A step's rows are those with the indices step * rows_per_step .. (step + 1) * rows_per_step - 1; a rank gets the
        ones whose index leaves ``rank`` when divided by ``world_size``, in order. The state is a small dictionary of
        plain values. The states of all ranks merge into one with ``|``, in any order.
        """

    def load_state(self, state: dict) -> None:
        """Let the next ``batches`` begin near the end of the step that came with ``state`` (merged over the ranks, of
        whatever number there were)."""


def open_rows(
    config: DataConfig, tokenizer: TextTokenizer, seed: int, rank: int = 0, world_size: int = 1
) -> TrainingRows:
    """The training rows that ``config`` describes, as rank ``rank`` of ``world_size`` processes reads them.

    Raises :class:`~asarm.errors.UserError` where there is nothing to read.
    """
    config.require_source()
    if config.streamed:
        from .stream import StreamedRows  # the library behind it takes a second to import

        return StreamedRows(config, tokenizer, seed, rank, world_size)
    documents = [d for path in find_files(config.files) for d in iterate_documents(path, config.text_column)]
    if not documents:
        raise DataFileError(f"data.files {config.files} hold no text")
    return PackedRows(documents, tokenizer, config.max_length, seed, config.source_weights, rank, world_size)
