"""Relative attention of rows over slots (Transformer-XL's relative encoding, as in XLNet).

    score[b, h, r, n] = ((q + r_w_bias) . key[n]  +  (q + r_r_bias) . relative_key[position[r] - n]) / sqrt(D)

Parameter names and shapes are those of Hugging Face's ``XLNetRelativeAttention``. Its segment terms (``r_s_bias``,
``seg_embed``) are carried along untouched: one segment means they never enter the score.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import XLNetConfig

from .block_attention import BlockAttention
from .compiling import uncompiled
from .dropout import dropout
from .row_mask import RowMask


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which products with ``x`` are computed: its own, or that of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


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
        self, x_BRE: torch.Tensor, n_content: int, first: int, encoding_PE: torch.Tensor, row_mask: RowMask
    ) -> torch.Tensor:
        """What becomes of the rows of ``x_BRE`` from ``first`` on when each has attended to the slots, which hold the
        first ``n_content`` of all rows."""
        narrow_BRE = x_BRE.to(product_dtype(x_BRE))  # once, and not for each of the three products
        content_BNE = narrow_BRE[:, :n_content].contiguous()  # nor copied for both that read it
        scale = self.q.shape[-1] ** -0.5  # of the few weights, not of the many queries
        q_BRHD = self._heads(narrow_BRE[:, first:], self.q * scale)
        attended_BRHD = attend(
            (q_BRHD + self.r_w_bias * scale).to(q_BRHD.dtype),
            (q_BRHD + self.r_r_bias * scale).to(q_BRHD.dtype),
            self._heads(content_BNE, self.k),
            self._heads(content_BNE, self.v),
            self.relative_key(encoding_PE),
            row_mask,
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
    row_mask: RowMask,
    p: float,
) -> torch.Tensor:
    """softmax(content_q . key + relative_q . relative_key, over the slots that a row may attend to) . value

    All [.., H, D] with queries of R rows, keys and values of N slots and relative keys of P = 2N distances; a row
    that sees nothing gets zeros. (Hugging Face adds -1e30 to its scores instead, which makes it see everything.)
    """
    way = block_attention if content_q_BRHD.device.type == "cpu" else fused_attention
    return way(content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD, row_mask, p)


@uncompiled
def block_attention(*arguments) -> torch.Tensor:
    """:func:`attend` as a CPU wants it."""
    return BlockAttention.apply(*arguments)


def fused_attention(
    content_q_BRHD, relative_q_BRHD, key_BNHD, value_BNHD, relative_key_PHD, row_mask, p
) -> torch.Tensor:
    """:func:`attend` as a GPU wants it: the relative scores are the bias of PyTorch's fused attention."""
    relative_q_HXD = relative_q_BRHD.movedim(2, 0).flatten(1, 2)
    relative_HXP = relative_q_HXD @ relative_key_PHD.permute(1, 2, 0)
    relative_HBRP = relative_HXP.unflatten(1, relative_q_BRHD.shape[:2])
    bias_HBRN = RelativeShift.apply(relative_HBRP, row_mask.shift_BR, key_BNHD.shape[1]) + row_mask.bias_BRN
    by_head = (x.transpose(1, 2) for x in (content_q_BRHD, key_BNHD, value_BNHD))
    out_BHRD = F.scaled_dot_product_attention(*by_head, bias_HBRN.transpose(0, 1), dropout_p=p, scale=1.0)
    return (out_BHRD * row_mask.sees_any_BR[:, None, :, None]).transpose(1, 2)


class RelativeShift(torch.autograd.Function):
    """``out[h, b, r, n] = x[h, b, r, shift[b, r] + n]`` for n < ``length``, element by element both ways, which a
    compiler can make part of other kernels."""

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
        return grad_HBRP.masked_fill_((place_BRP < 0) | (place_BRP >= N), 0), None, None


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
