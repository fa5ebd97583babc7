"""What the rows of a call see, and, for a CPU, which of them go through attention together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

# fewer rows leave out more slots; bfloat16 products of few rows are slow
BLOCK_ROWS = {torch.float32: 192, torch.bfloat16: 512}
MULTIPLE = 16  # of slots and of relative keys: products with an odd number of columns take longer


class Block(NamedTuple):
    """Some rows of a sequence, the slots that any of them sees, and the relative keys between the two.

    Slots 0 .. ``n_near``-1 come whole, in order. In an ascending order a row sees the tokens before it and of those
    after it the prompt alone: ``far_X``, the slots beyond that some row sees. ``bias_RS`` is that of both kinds. The
    keys of the distances that occur are ``relative``; the key of row r and slot n is number ``shift_R[r] + n`` of them.
    """

    sequence: int
    rows: slice
    n_near: int
    far_X: torch.Tensor
    bias_RS: torch.Tensor
    relative: slice
    shift_R: torch.Tensor


@dataclass(frozen=True)
class RowMask:
    """What the rows of a call see, the first of which are content rows. ``bias_BRN`` is added to their scores: 0, or a
    number that leaves nothing of a weight; ``sees_any_BR`` says whether a row sees a slot at all; ``shift_BR`` = N - 1
    - position is where the relative key of slot 0 lies. ``blocks`` hold every row once (on a CPU; otherwise none)."""

    bias_BRN: torch.Tensor
    sees_any_BR: torch.Tensor
    shift_BR: torch.Tensor
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, may_attend_BRN: torch.Tensor, shift_BR: torch.Tensor, n_content: int, dtype: torch.dtype) -> "RowMask":
        """From who may attend to what (True = may), for scores of type ``dtype``."""
        bias_BRN = (~may_attend_BRN).to(dtype).mul_(torch.finfo(torch.bfloat16).min)
        sees_any_BR = may_attend_BRN.any(-1)
        blocks = ()
        if bias_BRN.device.type == "cpu":
            blocks = tuple(_blocks(may_attend_BRN, sees_any_BR, shift_BR, bias_BRN, n_content))
        return cls(bias_BRN, sees_any_BR, shift_BR, blocks)

    def after(self, first: int) -> "RowMask":
        """That of the rows from ``first`` on, where a block begins."""
        blocks = (
            block._replace(rows=slice(block.rows.start - first, block.rows.stop - first))
            for block in self.blocks
            if block.rows.start >= first
        )
        rows = (x[:, first:] for x in (self.bias_BRN, self.sees_any_BR, self.shift_BR))
        return RowMask(*rows, tuple(blocks))

    def scale(self, p: float) -> torch.Tensor:
        """What becomes of a row's output, [B, R, 1, 1]: what dropout keeps is scaled up, and nothing is left of a row
        that sees nothing."""
        return (self.sees_any_BR / (1 - p))[..., None, None]


def _blocks(may_attend_BRN, sees_any_BR, shift_BR, bias_BRN, n_content: int) -> Iterator[Block]:
    B, R, N = may_attend_BRN.shape
    size = BLOCK_ROWS.get(bias_BRN.dtype, BLOCK_ROWS[torch.float32])
    starts = [*range(0, n_content, size), *range(n_content, R, size)]
    for sequence in range(B):
        for start, stop in zip(starts, [*starts[1:], R], strict=True):
            rows = slice(start, stop)
            shift_R, sees_any_R = shift_BR[sequence, rows], sees_any_BR[sequence, rows]
            shift_R = shift_R.where(sees_any_R, N - 1)  # nothing is left of a row that sees nothing, wherever it lies
            least, most = (x.item() for x in shift_R.aminmax())
            n_near, far_X = _slots(may_attend_BRN[sequence, rows].any(0), N - least)
            n_keys = min(2 * N, _rounded(most - least + (N if len(far_X) else n_near)))
            first = min(least, 2 * N - n_keys)
            bias_RN = bias_BRN[sequence, rows]
            bias_RS = torch.cat([bias_RN[:, :n_near], bias_RN[:, far_X]], dim=1)
            yield Block(sequence, rows, n_near, far_X, bias_RS, slice(first, first + n_keys), shift_R - first)


def _slots(seen_N: torch.Tensor, n_least: int) -> tuple[int, torch.Tensor]:
    """How many slots are near, ``n_least`` or some more, so that near and far ones are a multiple of ``MULTIPLE``; and
    the far ones. All are near where far ones would be many."""
    N = len(seen_N)
    far_X = seen_N[n_least:].nonzero().flatten() + n_least
    if len(far_X) > (N - n_least) // 4:
        return N, far_X[:0]
    n_near = n_least
    while n_near < N and (n_near + len(far_X)) % MULTIPLE:
        n_near += 1
        far_X = far_X[far_X >= n_near]
    return n_near, far_X


def _rounded(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE
