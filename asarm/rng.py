"""Random numbers keyed by (seed, stream, index).

Every sequence owns its random numbers: they depend on the run's seed, on what they are for (the stream) and on the
sequence's index, and on nothing else: not on the batch it happens to share, nor on the order in which things run.
That is what makes batching, sharding and resuming reproducible.
"""

import zlib
from functools import cache

import numpy as np
import torch

from .compiling import constant


def generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """A generator of its own for ``index`` of ``stream`` (NumPy's ``SeedSequence`` mixes the three)."""
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), index])


def rank_uniforms(seed: int, stream: str, indices: list[int], n_ranks: int, n_columns: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64, of shape [columns, sequences, ranks].

    The draw is laid out rank by rank, so that the numbers of a rank do not depend on ``n_ranks``: a sequence
    padded to a longer batch gets the same ones.
    """
    rows = [generator(seed, stream, index).random((n_ranks, n_columns)) for index in indices]
    return torch.from_numpy(np.stack(rows)).permute(2, 0, 1).contiguous()


def exponentials(uniform: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` independent standard exponential numbers [..., count], float64, for each of ``uniform`` [...].

    Counter-based (SplitMix64; Steele, Lea & Flood 2014, keyed by the bits of ``uniform``), so that they can be made
    where they are used, on any device.
    """
    key = _mix(uniform.double().contiguous().view(torch.int64))
    bits = _mix(key[..., None] + counter(uniform.device, count))
    return -torch.log((_shift_right(bits, 11).double() + 0.5) * 2.0**-53)


@constant
def counter(device: torch.device, count: int) -> torch.Tensor:
    """SplitMix64's counter, made once. (What torch.compile makes of it would be an index of 32 bits.)"""
    return _counter(device, count)


@cache
def _counter(device: torch.device, count: int) -> torch.Tensor:
    return torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15)


def _signed(constant: int) -> int:
    """A 64-bit constant as the signed integer with the same bits."""
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift of the 64 bits (``>>`` alone would copy the sign)."""
    return (x >> by) & (2 ** (64 - by) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers that makes neighbours unrelated."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)
