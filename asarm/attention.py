"""Relative attention of rows over slots (Transformer-XL's relative encoding, as in XLNet).

    score[b, h, r, n] = ((q + r_w_bias) . key[n]  +  (q + r_r_bias) . relative_key[position[r] - n]) / sqrt(D)

Parameter names and shapes are those of Hugging Face's ``XLNetRelativeAttention``. Its segment terms (``r_s_bias``,
``seg_embed``) are carried along untouched: one segment means they never enter the score.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import XLNetConfig

from .dropout import dropout, signs

SCORE_BYTES = 2**23  # of a [heads, B, R, P] array of scores that are worked on at a time, in a CPU's cache


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which products with ``x`` are computed: its own, or that of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@dataclass(frozen=True)
class Sight:
    """What the rows of a call see. ``bias_BRN`` is added to their scores: 0, or a number that leaves nothing of a
    weight; ``sees_any_BR`` says whether a row sees a slot at all; ``shift_BR`` = N - 1 - position is where the relative
    key of slot 0 lies."""

    bias_BRN: torch.Tensor
    sees_any_BR: torch.Tensor
    shift_BR: torch.Tensor

    @classmethod
    def of(cls, may_attend_BRN: torch.Tensor, shift_BR: torch.Tensor, dtype: torch.dtype) -> "Sight":
        """From who may attend to what (True = may), for scores of type ``dtype``."""
        bias_BRN = (~may_attend_BRN).to(dtype).mul_(torch.finfo(torch.bfloat16).min)
        return cls(bias_BRN, may_attend_BRN.any(-1), shift_BR)

    def after(self, first: int) -> "Sight":
        """That of the rows from ``first`` on."""
        return Sight(self.bias_BRN[:, first:], self.sees_any_BR[:, first:], self.shift_BR[:, first:])

    def scale(self, p: float) -> torch.Tensor:
        """What becomes of a row's output, [B, R, 1, 1]: what dropout keeps is scaled up, and nothing is left of a row
        that sees nothing."""
        return (self.sees_any_BR / (1 - p))[..., None, None]


class RelativeAttention(nn.Module):
    def __init__(self, config: XLNetConfig):
        super().__init__()
        E, H, D = config.d_model, config.n_head, config.d_head
        self.q, self.k, self.v, self.o, self.r = (nn.Parameter(torch.empty(E, H, D)) for _ in range(5))
        self.r_w_bias, self.r_r_bias = (nn.Parameter(torch.empty(H, D)) for _ in range(2))
        self.r_s_bias = nn.Parameter(torch.empty(H, D))
        self.seg_embed = nn.Parameter(torch.empty(2, H, D))
        self.freeze_segment_terms()
        self.layer_norm = nn.LayerNorm(E, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def freeze_segment_terms(self) -> None:
        """They never get a gradient, for which DDP and a checkpoint's optimiser state would wait."""
        self.r_s_bias.requires_grad_(False)
        self.seg_embed.requires_grad_(False)

    def _heads(self, x: torch.Tensor, weight_EHD: torch.Tensor) -> torch.Tensor:
        E, H, D = weight_EHD.shape
        return (x @ weight_EHD.reshape(E, H * D)).unflatten(-1, (H, D))

    def relative_key(self, encoding_PE: torch.Tensor) -> torch.Tensor:
        """Keys of the relative positions, [P, H, D]."""
        return self._heads(encoding_PE, self.r)

    def forward(
        self, x_BRE: torch.Tensor, n_content: int, first: int, encoding_PE: torch.Tensor, sight: Sight
    ) -> torch.Tensor:
        """What becomes of the rows of ``x_BRE`` from ``first`` on when each has attended to the slots, which hold the
        first ``n_content`` of all rows."""
        narrow_BRE = x_BRE.to(product_dtype(x_BRE))  # once, and not for each of the three products
        content_BNE = narrow_BRE[:, :n_content]
        q_BRHD = self._heads(narrow_BRE[:, first:], self.q)
        scale = q_BRHD.shape[-1] ** -0.5
        attended_BRHD = attend(
            (q_BRHD + self.r_w_bias).mul(scale).to(q_BRHD.dtype),
            (q_BRHD + self.r_r_bias).mul(scale).to(q_BRHD.dtype),
            self._heads(content_BNE, self.k),
            self._heads(content_BNE, self.v),
            self.relative_key(encoding_PE),
            sight,
            self.dropout if self.training else 0.0,
        )
        out_BRE = attended_BRHD.flatten(2) @ self.o.flatten(1).T
        return self.layer_norm(x_BRE[:, first:] + dropout(out_BRE, self.dropout, self.training))


def attend(
    content_q_BRHD: torch.Tensor,
    relative_q_BRHD: torch.Tensor,
    key_BNHD: torch.Tensor,
    value_BNHD: torch.Tensor,
    relative_key_PHD: torch.Tensor,
    sight: Sight,
    p: float,
) -> torch.Tensor:
    """softmax(content_q . key + relative_q . relative_key, over the slots that a row may attend to) . value

    All [.., H, D] with queries of R rows, keys and values of N slots and relative keys of P = 2N distances; a row
    that sees nothing gets zeros. (Hugging Face adds -1e30 to its scores instead, which makes it see everything.)
    """
    way = CacheAttention.apply if content_q_BRHD.device.type == "cpu" else fused_attention
    return way(content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD, sight, p)


def fused_attention(content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD, sight, p) -> torch.Tensor:
    """:func:`attend` as a GPU wants it: the relative scores are the bias of PyTorch's fused attention."""
    relative_HBRP = _of_heads(relative_q_BRHD.movedim(2, 0), relative_key_PHD.permute(1, 2, 0))
    bias_HBRN = Windows.apply(relative_HBRP, sight.shift_BR, key_BNHD.shape[1]) + sight.bias_BRN
    by_head = (x.transpose(1, 2) for x in (content_q_BRHD, key_BNHD, value_BNHD))
    out_BHRD = F.scaled_dot_product_attention(*by_head, bias_HBRN.transpose(0, 1), dropout_p=p, scale=1.0)
    return (out_BHRD * sight.sees_any_BR[:, None, :, None]).transpose(1, 2)


class Windows(torch.autograd.Function):
    """:func:`windows`, element by element both ways, which is what a compiler can make part of other kernels."""

    @staticmethod
    def forward(ctx, x_HBRP, shift_BR, length):
        ctx.save_for_backward(shift_BR)
        ctx.n_relative = x_HBRP.shape[-1]
        place_BRN = shift_BR[..., None] + torch.arange(length, device=shift_BR.device)
        return x_HBRP.gather(3, place_BRN.expand(len(x_HBRP), -1, -1, -1))

    @staticmethod
    def backward(ctx, grad_HBRN):
        (shift_BR,), N = ctx.saved_tensors, grad_HBRN.shape[-1]
        place_BRP = torch.arange(ctx.n_relative, device=shift_BR.device) - shift_BR[..., None]
        grad_HBRP = grad_HBRN.gather(3, place_BRP.clamp(0, N - 1).expand(len(grad_HBRN), -1, -1, -1))
        return grad_HBRP.where((place_BRP >= 0) & (place_BRP < N), 0), None, None


class CacheAttention(torch.autograd.Function):
    """:func:`attend` as a CPU wants it.

    The heads of each sequence go through a few at a time and only their weights are kept for the backward pass, so that
    the many [R, N] arrays in between stay in a CPU's cache: passing them through the memory took longer than the
    products. A weight that dropout drops is kept with a minus sign: ``relu`` is what enters the product, ``abs`` the
    softmax. Products with a factor transposed are written so that the larger one is read as it lies.
    """

    @staticmethod
    def forward(ctx, content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD, sight, p):
        tensors = (content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD)
        out_BRHD, kept = torch.empty_like(content_q_BRHD), []
        with torch.autocast(out_BRHD.device.type, enabled=False):
            for part in _parts(content_q_BRHD, relative_key_PHD):
                content_q, relative_q, key, value, relative_key = (_take(x, part) for x in tensors)
                relative_score = _of_heads(relative_q, relative_key.mT)
                score = windows(relative_score, sight.shift_BR[part.sequences], key.shape[2])
                score.add_(sight.bias_BRN[part.sequences])
                score.flatten(0, 1).baddbmm_(content_q.flatten(0, 1), key.mT.flatten(0, 1))
                weight = score.softmax(-1)
                if p:
                    weight.copysign_(signs(weight, p))
                _view(out_BRHD, part).copy_((weight.relu() if p else weight) @ value)
                if any(ctx.needs_input_grad):
                    kept.append(weight)
        ctx.save_for_backward(*tensors, *kept)
        ctx.sight, ctx.p = sight, p
        return out_BRHD.mul_(sight.scale(p))

    @staticmethod
    def backward(ctx, grad_BRHD):
        saved, sight, p = ctx.saved_tensors, ctx.sight, ctx.p
        tensors, kept, dtype = saved[:5], saved[5:], saved[0].dtype
        grads = [torch.empty_like(x) for x in tensors[:4]]
        # a sum over sequences
        relative_key_grad = torch.zeros_like(tensors[4], dtype=torch.promote_types(dtype, torch.float32))
        grad_BRHD = (grad_BRHD * sight.scale(p)).to(dtype)
        with torch.autocast(grad_BRHD.device.type, enabled=False):
            for part, weight in zip(_parts(tensors[0], tensors[4]), kept, strict=True):
                content_q, relative_q, key, value, relative_key = (_take(x, part) for x in tensors)
                grad = _take(grad_BRHD, part)
                grad_weight = grad @ value.mT
                grad_value = (grad.mT @ (weight.relu() if p else weight)).mT
                if p:
                    grad_weight, weight = torch.ops.aten.threshold_backward(grad_weight, weight, 0), weight.abs()
                grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
                if part.heads.start == 0:  # every head's windows lie at the same places, with zeros around them
                    grad_relative = grad_score.new_zeros(*grad_score.shape[:3], relative_key.shape[1])
                grad_relative = unwindowed(grad_score, sight.shift_BR[part.sequences], grad_relative[: len(grad_score)])
                of_part = (
                    grad_score @ key,
                    _of_heads(grad_relative, relative_key),
                    (content_q.mT @ grad_score).mT,
                    grad_value,
                )
                for grad_of, x in zip(grads, of_part, strict=True):
                    _view(grad_of, part).copy_(x)
                of_sequences = relative_q.flatten(1, 2).mT @ grad_relative.flatten(1, 2)
                _view(relative_key_grad, part).add_(of_sequences.mT)
        return *grads, relative_key_grad.to(dtype), None, None


class Part(NamedTuple):
    """Sequences and heads that are worked on together."""

    sequences: slice
    heads: slice


def _parts(content_q_BRHD: torch.Tensor, relative_key_PHD: torch.Tensor) -> list[Part]:
    """All heads of all sequences, so many at a time that their relative scores take about ``SCORE_BYTES``."""
    B, R, H, _ = content_q_BRHD.shape
    of_a_head = R * len(relative_key_PHD) * content_q_BRHD.element_size()
    n_heads = max(1, SCORE_BYTES // max(1, of_a_head))
    n_sequences = max(1, n_heads // H)
    return [
        Part(slice(b, b + n_sequences), slice(h, h + n_heads))
        for b in range(0, B, n_sequences)
        for h in range(0, H, n_heads)
    ]


def _view(x: torch.Tensor, part: Part) -> torch.Tensor:
    """A part of a tensor [B, .., H, D] or [P, H, D], heads first: [h, b, .., D] or [h, P, D]."""
    of_sequences = x[part.sequences] if x.ndim == 4 else x
    return of_sequences[..., part.heads, :].movedim(-2, 0)


def _take(x: torch.Tensor, part: Part) -> torch.Tensor:
    """A part by itself: products of a view, whose rows lie far apart, take up to one and a half times as long."""
    return _view(x, part).contiguous()


def _of_heads(x_HBRX: torch.Tensor, y_HXY: torch.Tensor) -> torch.Tensor:
    """The product of each head, for all sequences at once: [H, B, R, Y]."""
    return (x_HBRX.flatten(1, 2) @ y_HXY).unflatten(1, x_HBRX.shape[1:3])


def windows(x_HBRP: torch.Tensor, shift_BR: torch.Tensor, length: int) -> torch.Tensor:
    """``out[h, b, r, n] = x[h, b, r, shift[b, r] + n]`` for n < ``length``: each row's own window, copied whole (an
    element-wise gather takes ten times as long)."""
    every_window, first = _every_window(x_HBRP, shift_BR, length)
    return every_window.index_select(0, first).view(*x_HBRP.shape[:3], length)


def unwindowed(grad_HBRN: torch.Tensor, shift_BR: torch.Tensor, around_HBRP: torch.Tensor) -> torch.Tensor:
    """The gradient of :func:`windows`: each row back at its place in ``around_HBRP``, which holds zeros elsewhere."""
    every_window, first = _every_window(around_HBRP, shift_BR, grad_HBRN.shape[-1])
    every_window.index_copy_(0, first, grad_HBRN.flatten(0, 2))
    return around_HBRP


def _every_window(x_HBRP: torch.Tensor, shift_BR: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every run of ``length`` elements of a contiguous tensor, as a view; and which of them are its rows' windows."""
    H, B, R, P = x_HBRP.shape
    first_HBR = torch.arange(0, x_HBRP.numel(), P, device=x_HBRP.device).view(H, B, R) + shift_BR
    return x_HBRP.as_strided((x_HBRP.numel() - length + 1, length), (1, 1)), first_HBR.flatten()


def relative_encoding(length: int, d_model: int, clamp_len: int, device: torch.device) -> torch.Tensor:
    """Sinusoids of the relative positions N-1 .. -N, [2N, d_model]. The last is that of no row and slot: a bfloat16
    product of few columns with an odd number of keys takes twice as long.

    Always float32, as Hugging Face computes them, so that a checkpoint means the same in both programs.
    """
    frequency = 1 / 10000 ** (torch.arange(0, d_model, 2, device=device).float() / d_model)
    relative_P = torch.arange(length - 1, -length - 1, -1, device=device).float()
    if clamp_len > 0:
        relative_P = relative_P.clamp(-clamp_len, clamp_len)
    angle = relative_P[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
