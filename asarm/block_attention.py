"""Relative attention as a CPU wants it: a block of rows at a time, on the slots that it sees, in the cache."""

import torch

from .dropout import signs
from .row_mask import Block, RowMask


class BlockAttention(torch.autograd.Function):
    """:func:`asarm.attention.attend` on a CPU.

    A block's rows lie near each other, so that they reach few relative keys, and in an ascending order they see little
    of what comes after them. All heads of a block go through together and only their weights are kept for the backward
    pass: passing the many [rows, slots] arrays in between through the memory took longer than the products. A weight
    that dropout drops is kept with a minus sign: ``relu`` is what enters the product, ``abs`` the softmax. Products
    with a factor transposed are written so that the larger one is read as it lies.
    """

    @staticmethod
    def forward(
        ctx, content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD, row_mask: RowMask, p: float
    ):
        tensors = (content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD)
        out_BRHD, kept = torch.empty_like(content_q_BRHD), []
        with torch.autocast("cpu", enabled=False):
            for block, (content_q, relative_q, key, value, relative_key) in _by_block(row_mask, *tensors):
                score = _relative_scores(relative_q @ relative_key.mT, block).baddbmm_(content_q, key.mT)
                weight = score.softmax(-1)
                if p:
                    weight.copysign_(signs(weight, p))
                out = (weight.relu() if p else weight) @ value
                out_BRHD[block.sequence, block.rows].copy_(out.transpose(0, 1))
                if any(ctx.needs_input_grad):
                    kept.append(weight)
        ctx.save_for_backward(*tensors, *kept)
        ctx.row_mask, ctx.p = row_mask, p
        return out_BRHD.mul_(row_mask.scale(p))

    @staticmethod
    def backward(ctx, grad_BRHD):
        row_mask, p, saved = ctx.row_mask, ctx.p, ctx.saved_tensors
        tensors, kept, dtype = saved[:5], saved[5:], saved[0].dtype
        grad_BRHD = (grad_BRHD * row_mask.scale(p)).to(dtype)
        content_q_grad, relative_q_grad = (torch.empty_like(x) for x in tensors[:2])
        # sums over blocks, laid out as the products are
        wide = torch.promote_types(dtype, torch.float32)
        sums = [x.new_zeros(x.movedim(-3, -1).shape, dtype=wide) for x in tensors[2:]]
        key_grad_BHDN, value_grad_BHDN, relative_key_grad_HDP = sums
        with torch.autocast("cpu", enabled=False):
            for (block, of_block), weight in zip(_by_block(row_mask, *tensors), kept, strict=True):
                content_q, relative_q, key, value, relative_key = of_block
                grad = _heads_first(grad_BRHD[block.sequence, block.rows])
                grad_weight = grad @ value.mT
                _add(value_grad_BHDN, block, grad.mT @ (weight.relu() if p else weight))
                if p:
                    grad_weight, weight = torch.ops.aten.threshold_backward(grad_weight, weight, 0), weight.abs()
                grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
                grad_relative = _relative_grad(grad_score, block)
                content_q_grad[block.sequence, block.rows].copy_((grad_score @ key).transpose(0, 1))
                relative_q_grad[block.sequence, block.rows].copy_((grad_relative @ relative_key).transpose(0, 1))
                _add(key_grad_BHDN, block, content_q.mT @ grad_score)
                relative_key_grad_HDP[..., block.relative] += relative_q.mT @ grad_relative
        return content_q_grad, relative_q_grad, *(x.to(dtype).movedim(-1, -3) for x in sums), None, None


def _by_block(row_mask: RowMask, content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD):
    """Every block with its part of each tensor, heads first and side by side: products of a view, whose rows lie far
    apart, take up to one and a half times as long."""
    relative_key_HPD, sequence = _heads_first(relative_key_PHD), None
    for block in row_mask.blocks:
        if block.sequence != sequence:
            sequence = block.sequence
            by_sequence = [_heads_first(x[sequence]) for x in (key_BNHD, value_BNHD)]
        queries = [_heads_first(x[sequence, block.rows]) for x in (content_q_BRHD, relative_q_BRHD)]
        slots = [x_HND[:, : block.n_near] for x_HND in by_sequence]
        if len(block.far_X):
            slots = [torch.cat([near, x[:, block.far_X]], 1) for near, x in zip(slots, by_sequence, strict=True)]
        yield block, (*queries, *slots, relative_key_HPD[:, block.relative])


def _heads_first(x_RHD: torch.Tensor) -> torch.Tensor:
    return x_RHD.transpose(0, 1).contiguous()


def _relative_scores(x_HRP: torch.Tensor, block: Block) -> torch.Tensor:
    """Of each row with each slot of the block, [H, R, S], bias included: a row's near slots are a window of its scores
    with the relative keys, copied whole (an element-wise gather takes ten times as long)."""
    every_window, first = _every_window(x_HRP, block)
    near_HRS = every_window.index_select(0, first).view(*x_HRP.shape[:2], block.n_near)
    if not len(block.far_X):
        return near_HRS.add_(block.bias_RS)
    score_HRS = x_HRP.new_empty(*x_HRP.shape[:2], block.bias_RS.shape[1])
    near_RS, far_RX = block.bias_RS.split([block.n_near, len(block.far_X)], dim=1)
    torch.add(near_HRS, near_RS, out=score_HRS[..., : block.n_near])
    far_HRX = x_HRP.flatten(1).index_select(1, _far(block)).unflatten(1, far_RX.shape)
    torch.add(far_HRX, far_RX, out=score_HRS[..., block.n_near :])
    return score_HRS


def _relative_grad(grad_HRS: torch.Tensor, block: Block) -> torch.Tensor:
    """The gradient of :func:`_relative_scores`: each score back at the place of its relative key, [H, R, P]."""
    grad_HRP = grad_HRS.new_zeros(*grad_HRS.shape[:2], block.relative.stop - block.relative.start)
    every_window, first = _every_window(grad_HRP, block)
    every_window.index_copy_(0, first, grad_HRS[..., : block.n_near].reshape(-1, block.n_near))
    if len(block.far_X):
        grad_HRP.flatten(1).index_copy_(1, _far(block), grad_HRS[..., block.n_near :].flatten(1))
    return grad_HRP


def _far(block: Block) -> torch.Tensor:
    """Where the scores of the rows with the far slots' relative keys lie, [R F], in [R P] of them."""
    n_keys = block.relative.stop - block.relative.start
    first_R = torch.arange(0, len(block.shift_R) * n_keys, n_keys) + block.shift_R
    return (first_R[:, None] + block.far_X).flatten()


def _every_window(x_HRP: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Every run of ``n_near`` elements of a contiguous tensor, as a view; and which of them are its rows' windows."""
    (H, R, P), n = x_HRP.shape, block.n_near
    first_HR = torch.arange(0, H * R * P, P).view(H, R) + block.shift_R
    return x_HRP.as_strided((H * R * P - n + 1, n), (1, 1)), first_HR.flatten()


def _add(sum_BHDN: torch.Tensor, block: Block, x_HDS: torch.Tensor) -> None:
    """Add what belongs to the block's slots."""
    sum_HDN = sum_BHDN[block.sequence]
    sum_HDN[..., : block.n_near] += x_HDS[..., : block.n_near]
    if len(block.far_X):
        sum_HDN.index_add_(2, block.far_X, x_HDS[..., block.n_near :].to(sum_HDN.dtype))
