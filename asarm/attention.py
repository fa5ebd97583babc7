"""Relative attention of rows over slots (Transformer-XL's relative encoding, as in XLNet).

    score[b, h, r, n] = ((q + r_w_bias) . key[n]  +  (q + r_r_bias) . relative_key[position[r] - n]) / sqrt(D)

Parameter names and shapes are those of Hugging Face's ``XLNetRelativeAttention``. Its segment terms (``r_s_bias``,
``seg_embed``) are carried along untouched: one segment means they never enter the score.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import XLNetConfig

from .dropout import dropout, signs

# bytes of a [B, heads, R, P] array of scores that are worked on at a time: in a CPU's cache, or enough for a GPU
SCORE_BYTES = {"cpu": 2**22, "cuda": 2**28}


@dataclass(frozen=True)
class Sight:
    """What the rows of a call see: ``may_attend_BRN``, and ``shift_BR`` = N - 1 - position, where the relative key of
    slot 0 lies."""

    may_attend_BRN: torch.Tensor
    shift_BR: torch.Tensor

    def after(self, first: int) -> "Sight":
        """That of the rows from ``first`` on."""
        return Sight(self.may_attend_BRN[:, first:], self.shift_BR[:, first:])

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """Added to the scores, [B, 1, R, N]: 0, or a number that leaves nothing of a weight."""
        return (~self.may_attend_BRN).to(dtype).mul_(torch.finfo(torch.bfloat16).min)[:, None]

    def sees_any(self) -> torch.Tensor:
        """Whether a row sees a slot at all, [B, R, 1, 1]."""
        return self.may_attend_BRN.any(-1)[..., None, None]


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
        narrow_BRE = x_BRE
        if torch.is_autocast_enabled(x_BRE.device.type):  # once, and not for each of the three products
            narrow_BRE = x_BRE.to(torch.get_autocast_dtype(x_BRE.device.type))
        content_BNE = narrow_BRE[:, :n_content]
        q_BRHD = self._heads(narrow_BRE[:, first:], self.q)
        scale = q_BRHD.shape[-1] ** -0.5
        attended_BRHD = Attention.apply(
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


class Attention(torch.autograd.Function):
    """softmax(content_q . key + relative_q . relative_key, over the slots that a row may attend to) . value

    All [.., H, D] with queries of R rows, keys and values of N slots and relative keys of P = 2N distances; a row
    that sees nothing gets zeros. (Hugging Face adds -1e30 to its scores instead, which makes it see everything.)

    The heads go through a few at a time and only their weights are kept for the backward pass, so that the many [R, N]
    arrays in between stay in a CPU's cache: passing them through the memory took longer than the products. A weight
    that dropout drops is kept with a minus sign: ``relu`` is what enters the product, ``abs`` the softmax.
    """

    @staticmethod
    def forward(ctx, content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD, sight, p):
        tensors = (content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD)
        out_BRHD, kept = torch.empty_like(content_q_BRHD), []
        bias_B1RN = sight.bias(out_BRHD.dtype)
        with torch.autocast(out_BRHD.device.type, enabled=False):
            for heads in _chunks(content_q_BRHD, relative_key_PHD):
                content_q, relative_q, key, value, relative_key = (_some_heads(x, heads) for x in tensors)
                score = windows(relative_q @ relative_key.mT, sight.shift_BR, key.shape[2]).add_(bias_B1RN)
                score.flatten(0, 1).baddbmm_(content_q.flatten(0, 1), key.mT.flatten(0, 1))
                weight = score.softmax(-1)
                if p:
                    weight = torch.copysign(weight, signs(weight, p))
                out_BRHD[:, :, heads] = ((weight.relu() if p else weight) @ value).transpose(1, 2)
                if any(ctx.needs_input_grad):
                    kept.append(weight)
        ctx.save_for_backward(*tensors, *kept)
        ctx.sight, ctx.p = sight, p
        return out_BRHD.mul_(sight.sees_any() / (1 - p))

    @staticmethod
    def backward(ctx, grad_BRHD):
        saved, p = ctx.saved_tensors, ctx.p
        tensors, kept = saved[:5], saved[5:]
        grads = [torch.empty_like(x) for x in tensors]
        grad_BRHD = (grad_BRHD * (ctx.sight.sees_any() / (1 - p))).to(tensors[0].dtype)
        with torch.autocast(grad_BRHD.device.type, enabled=False):
            for heads, weight in zip(_chunks(tensors[0], tensors[4]), kept, strict=True):
                content_q, relative_q, key, value, relative_key = (_some_heads(x, heads) for x in tensors)
                grad = _some_heads(grad_BRHD, heads)
                grad_weight = grad @ value.mT
                grad_value = (weight.relu() if p else weight).mT @ grad
                if p:
                    grad_weight, weight = torch.ops.aten.threshold_backward(grad_weight, weight, 0), weight.abs()
                grad_score = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
                grad_relative = unwindowed(grad_score, ctx.sight.shift_BR, relative_key.shape[2])
                by_head = (
                    grad_score @ key,
                    grad_relative @ relative_key,
                    grad_score.mT @ content_q,
                    grad_value,
                    (grad_relative.mT @ relative_q).sum(0, keepdim=True),
                )
                for grad_of, x in zip(grads, by_head, strict=True):
                    _some_heads(grad_of, heads).copy_(x)
        return *grads, None, None


def _chunks(content_q_BRHD: torch.Tensor, relative_key_PHD: torch.Tensor) -> list[slice]:
    """The heads, so many at a time that their relative scores take about ``SCORE_BYTES``."""
    B, R, H, _ = content_q_BRHD.shape
    of_a_head = B * R * len(relative_key_PHD) * content_q_BRHD.element_size()
    size = max(1, SCORE_BYTES[content_q_BRHD.device.type] // max(1, of_a_head))
    return [slice(h, h + size) for h in range(0, H, size)]


def _some_heads(x: torch.Tensor, heads: slice) -> torch.Tensor:
    """A view [B or 1, h, .., D] of the heads of a tensor [B, .., H, D] or [.., H, D]."""
    return (x if x.ndim == 4 else x[None])[:, :, heads].transpose(1, 2)


def windows(x_BHRP: torch.Tensor, shift_BR: torch.Tensor, length: int) -> torch.Tensor:
    """``out[b, h, r, n] = x[b, h, r, shift[b, r] + n]`` for n < ``length``: each row's own window, copied whole (an
    element-wise gather takes ten times as long)."""
    every_window, first = _every_window(x_BHRP.contiguous(), shift_BR, length)
    return every_window.index_select(0, first).view(*x_BHRP.shape[:3], length)


def unwindowed(grad_BHRN: torch.Tensor, shift_BR: torch.Tensor, n_distances: int) -> torch.Tensor:
    """The gradient of :func:`windows`: each row back at its place among P = ``n_distances``, zeros around it."""
    grad_BHRP = grad_BHRN.new_zeros(*grad_BHRN.shape[:3], n_distances)
    every_window, first = _every_window(grad_BHRP, shift_BR, grad_BHRN.shape[-1])
    every_window.index_copy_(0, first, grad_BHRN.reshape(-1, grad_BHRN.shape[-1]))
    return grad_BHRP


def _every_window(x_BHRP: torch.Tensor, shift_BR: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every run of ``length`` elements of a contiguous tensor, as a view; and which of them are its rows' windows."""
    B, H, R, P = x_BHRP.shape
    first_BHR = torch.arange(0, x_BHRP.numel(), P, device=x_BHRP.device).view(B, H, R) + shift_BR[:, None]
    return x_BHRP.as_strided((x_BHRP.numel() - length + 1, length), (1, 1)), first_BHR.flatten()


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
