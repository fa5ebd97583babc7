"""Random numbers keyed by (seed, stream, index).

Every sequence owns its random numbers: they depend on the run's seed, on what they are for (the stream) and on the
sequence's index, and on nothing else: not on the batch it happens to share, nor on the order in which things run.
That is what makes batching, sharding and resuming reproducible.
"""

import zlib

import numpy as np
import torch


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """A generator of its own for ``index`` of ``stream`` (NumPy's ``SeedSequence`` mixes the three)."""
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), index])


def rank_uniforms(seed: int, indices: list[int], n_ranks: int, n_columns: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64, of shape [columns, sequences, ranks].

    The draw is laid out rank by rank, so that the numbers of a rank do not depend on ``n_ranks``: a sequence
    padded to a longer batch gets the same ones.
    """
    rows = [generator(seed, "sample", index).random((n_ranks, n_columns)) for index in indices]
    return torch.from_numpy(np.stack(rows)).permute(2, 0, 1).contiguous()
