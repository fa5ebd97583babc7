"""Dropout that costs little on a CPU.

There PyTorch draws one Bernoulli number after another, which took a quarter of an optimiser step of XLNet-base, and
multiplying by a bool mask converts it first. Here fourteen random bits decide (the probability is rounded to a multiple
of 2^-14), one word holds four times fourteen, and what is dropped is blotted out bit by bit. The words are NumPy's,
which takes half as long for them; PyTorch's generator seeds it, so that it rules here as well.
"""

import numpy as np
import torch
from torch.nn import functional as F

from .compiling import uncompiled

_VALUES = 2**14
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """``torch.nn.functional.dropout``, with other random numbers on a CPU."""
    if not (training and p) or x.device.type != "cpu":
        return F.dropout(x, p, training)
    return _of_a_cpu(x, p)


@uncompiled
def _of_a_cpu(x: torch.Tensor, p: float) -> torch.Tensor:
    return _Dropout.apply(x, p)


def signs(x: torch.Tensor, p: float) -> torch.Tensor:
    """Numbers (or none) of the type and shape of ``x``, on a CPU, whose sign bit is random: set with probability
    ``p``."""
    integers = _integers(x, p)
    return integers.view(x.dtype) if x.dtype == torch.bfloat16 else integers.to(x.dtype)


def _integers(x: torch.Tensor, p: float) -> torch.Tensor:
    """Random int16 numbers of the shape of ``x``, negative with probability ``p``."""
    seed = torch.randint(2**63 - 1, ()).item()
    words = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16))
    bits = words[: x.numel()].view(x.shape)
    return bits.bitwise_and_(_VALUES - 1).sub_(round(p * _VALUES))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        kept = _integers(x, p).bitwise_right_shift_(15).bitwise_not_()  # every bit is set, or none
        ctx.save_for_backward(kept)
        ctx.p = p
        return _where(kept, x, p)

    @staticmethod
    def backward(ctx, grad):
        return _where(*ctx.saved_tensors, grad, ctx.p), None


def _where(kept: torch.Tensor, x: torch.Tensor, p: float) -> torch.Tensor:
    """``x`` where it is kept, scaled so that its expectation stays, and 0 elsewhere."""
    integer = _INTEGERS[x.element_size()]
    return x.view(integer).bitwise_and(kept.to(integer)).view(x.dtype).mul_(1 / (1 - p))
