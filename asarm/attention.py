"""Relative attention of rows over slots (Transformer-XL's relative encoding, as in XLNet).

    score[b, h, r, n] = ((q + r_w_bias) . key[n]  +  (q + r_r_bias) . relative_key[position[r] - n]) / sqrt(D)

Parameter names and shapes are those of Hugging Face's ``XLNetRelativeAttention``. Its segment terms (``r_s_bias``,
``seg_embed``) are carried along untouched: one segment means they never enter the score.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import XLNetConfig


class RelativeAttention(nn.Module):
    def __init__(self, config: XLNetConfig):
        super().__init__()
        E, H, D = config.d_model, config.n_head, config.d_head
        self.q, self.k, self.v, self.o, self.r = (nn.Parameter(torch.empty(E, H, D)) for _ in range(5))
        self.r_w_bias, self.r_r_bias = (nn.Parameter(torch.empty(H, D)) for _ in range(2))
        self.r_s_bias = nn.Parameter(torch.empty(H, D), requires_grad=False)
        self.seg_embed = nn.Parameter(torch.empty(2, H, D), requires_grad=False)
        self.layer_norm = nn.LayerNorm(E, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def _heads(self, x_BRE: torch.Tensor, weight_EHD: torch.Tensor) -> torch.Tensor:
        E, H, D = weight_EHD.shape
        return (x_BRE @ weight_EHD.reshape(E, H * D)).unflatten(-1, (H, D))

    def key_value(self, content_BCE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of content rows, each [B, H, C, D]."""
        return self._heads(content_BCE, self.k).transpose(1, 2), self._heads(content_BCE, self.v).transpose(1, 2)

    def relative_key(self, encoding_PE: torch.Tensor) -> torch.Tensor:
        """Keys of the relative positions, [H, P, D]."""
        return self._heads(encoding_PE, self.r).transpose(0, 1)

    def forward(
        self,
        rows_BRE: torch.Tensor,
        key_BHND: torch.Tensor,
        value_BHND: torch.Tensor,
        relative_key_HPD: torch.Tensor,
        may_attend_BRN: torch.Tensor,
        shift_BR: torch.Tensor,
    ) -> torch.Tensor:
        q_BRHD = self._heads(rows_BRE, self.q)
        content_BHRN = (q_BRHD + self.r_w_bias).transpose(1, 2) @ key_BHND.transpose(2, 3)
        relative_BHRP = (q_BRHD + self.r_r_bias).transpose(1, 2) @ relative_key_HPD.transpose(1, 2)
        score_BHRN = content_BHRN + relative_shift(relative_BHRP, shift_BR)
        weight_BHRN = self._drop(masked_softmax(score_BHRN * q_BRHD.shape[-1] ** -0.5, may_attend_BRN))
        attended_BHRD = weight_BHRN.to(value_BHND.dtype) @ value_BHND
        attended_BRX = attended_BHRD.transpose(1, 2).flatten(2)
        out_BRE = self._drop(attended_BRX @ self.o.flatten(1).T)
        return self.layer_norm(rows_BRE + out_BRE)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)


def masked_softmax(score_BHRN: torch.Tensor, may_attend_BRN: torch.Tensor) -> torch.Tensor:
    """Softmax over the slots that a row may attend to; all zeros for a row that may attend to none.

    Computed in float32 at least. (Hugging Face adds -1e30 instead, which makes a row that sees nothing see everything.)
    """
    may_BHRN = may_attend_BRN[:, None]
    wide = torch.promote_types(score_BHRN.dtype, torch.float32)
    score_BHRN = score_BHRN.to(wide).masked_fill(~may_BHRN, torch.finfo(wide).min)
    sees_any_BHR1 = may_BHRN.any(-1, keepdim=True)
    return torch.softmax(score_BHRN, dim=-1) * sees_any_BHR1


class _RelativeShift(torch.autograd.Function):
    """``out[..., r, n] = x[..., r, shift[r] + n]``: each row takes its own window of N out of P = 2N-1.

    Autograd would turn the gather into a scatter-add, ten times slower on a CPU. A window is contiguous, so its
    gradient is a gather as well.
    """

    @staticmethod
    def forward(ctx, x_BHRP, shift_BR):
        B, H, R, P = x_BHRP.shape
        N = (P + 1) // 2
        ctx.save_for_backward(shift_BR)
        index_BRN = shift_BR[:, :, None] + torch.arange(N, device=x_BHRP.device)
        return x_BHRP.gather(3, index_BRN[:, None].expand(B, H, R, N))

    @staticmethod
    def backward(ctx, grad_BHRN):
        (shift_BR,) = ctx.saved_tensors
        B, H, R, N = grad_BHRN.shape
        index_BRP = torch.arange(2 * N - 1, device=grad_BHRN.device) - shift_BR[:, :, None]
        outside_BRP = (index_BRP < 0) | (index_BRP >= N)
        index_BHRP = index_BRP.clamp(0, N - 1)[:, None].expand(B, H, R, 2 * N - 1)
        return grad_BHRN.gather(3, index_BHRP).masked_fill(outside_BRP[:, None], 0), None


def relative_shift(x_BHRP: torch.Tensor, shift_BR: torch.Tensor) -> torch.Tensor:
    """Pick, for every row and slot, the score of their relative position: [B, H, R, 2N-1] -> [B, H, R, N]."""
    return _RelativeShift.apply(x_BHRP, shift_BR)


def relative_encoding(length: int, d_model: int, clamp_len: int, device: torch.device) -> torch.Tensor:
    """Sinusoids of the relative positions N-1 .. -(N-1), [2N-1, d_model].

    Always float32, as Hugging Face computes them, so that a checkpoint means the same in both programs.
    """
    frequency = 1 / 10000 ** (torch.arange(0, d_model, 2, device=device).float() / d_model)
    relative_P = torch.arange(length - 1, -length, -1, device=device).float()
    if clamp_len > 0:
        relative_P = relative_P.clamp(-clamp_len, clamp_len)
    angle = relative_P[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
