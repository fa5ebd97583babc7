"""Dropout whose random numbers cost little on a CPU.

There PyTorch draws one Bernoulli number after another, which took a quarter of an optimiser step of XLNet-base. Sixteen
random bits decide as well (the probability is rounded to a multiple of 2^-16), and one word holds four times sixteen.
"""

import torch
from torch.nn import functional as F

_VALUES = 2**16


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """``torch.nn.functional.dropout``, with other random numbers on a CPU."""
    if not (training and p) or x.device.type != "cpu":
        return F.dropout(x, p, training)
    return dropped(x, keep_mask(x, p), p)


def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor | None:
    """What of ``x`` is kept with dropout probability ``p``: a bool tensor of its shape, True = kept; None at 0."""
    if not p:
        return None
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return bits >= round(p * _VALUES) - _VALUES // 2


def dropped(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    """``x`` where it is kept, scaled so that its expectation stays, and 0 elsewhere."""
    return x if keep is None else x * keep / (1 - p)
