"""Speculative acceptance as pure tensor functions: which drafts are kept, and the law of the token after them.

Draft by draft (Leviathan et al. 2023; Guo & Ermon 2025): a draft x with probability d(x) is kept with probability
min(1, t(x)/d(x)), t being the target; the first that is not kept is replaced by a draw from the residual, proportional
to max(t - d, 0). Whatever the draft, the token that comes out has law t: d(x) min(1, t(x)/d(x)) + (1 - sum min(t, d))
residual(x) = t(x).

As a block (Sun et al. 2025, arXiv 2403.10444): a draft that the target likes better than the draft did makes up for one
before it that it liked less. A prefix of i drafts has the weight p_i = min(1, p_(i-1) t/d), p_0 = 1; the longest prefix
that passes a test of its own is kept, and the residual after it is proportional to max(p_i t - d, 0). The law is the
same, and no rule that knows only these probabilities keeps more drafts on average.
"""

import torch
from torch.nn import functional as F


def accepted_prefix(
    draft_prob_BK: torch.Tensor,
    target_prob_BK: torch.Tensor,
    uniform_BK: torch.Tensor,
    valid_BK: torch.Tensor,
    slack: float = 0.0,
) -> torch.Tensor:
    """How many drafts are kept before the first that is not, [B].

    ``draft_prob_BK`` and ``target_prob_BK`` are the two probabilities of the drafted tokens; ``valid_BK`` says which
    columns hold a draft. ``slack`` is added to the probability of keeping a draft: above 0 the law is lost.
    """
    kept_BK = valid_BK & (uniform_BK * draft_prob_BK < target_prob_BK + slack * draft_prob_BK)
    return kept_BK.long().cumprod(dim=1).sum(dim=1)


def prefix_weights(draft_prob_BK: torch.Tensor, target_prob_BK: torch.Tensor, valid_BK: torch.Tensor) -> torch.Tensor:
    """p_0 .. p_K of the module's description, [B, K+1]; invalid drafts change nothing.

    In logarithms p is a sum that is held down at 0 whenever it would rise above: what the plain sum has risen above 0,
    at its highest so far, is taken off.
    """
    step_BK = (target_prob_BK.log() - draft_prob_BK.log()).where(valid_BK, 0)
    sum_BA = F.pad(step_BK.cumsum(dim=1), (1, 0))
    return (sum_BA - sum_BA.cummax(dim=1).values).exp()


def accepted_block(
    weight_BA: torch.Tensor,
    draft_BKV: torch.Tensor,
    target_BKV: torch.Tensor,
    uniform_BK: torch.Tensor,
    valid_BK: torch.Tensor,
) -> torch.Tensor:
    """How many drafts are kept when they are judged together, [B].

    ``weight_BA`` are their :func:`prefix_weights`, ``draft_BKV`` and ``target_BKV`` the two laws of every draft. A
    prefix that further drafts follow passes with probability r / (r + 1 - p), r being the mass of the residual after
    it; one of all valid drafts with probability p.
    """
    weight_BK, weight_BM = weight_BA[:, 1:], weight_BA[:, 1:-1]  # M = K - 1: of the drafts that another may follow
    negative_BMV = torch.addcmul(draft_BKV[:, 1:], weight_BM[..., None], target_BKV[:, 1:], value=-1).clamp_(max=0)
    residual_BM = -negative_BMV.sum(-1)
    passing_BM = (residual_BM / (residual_BM + (1 - weight_BM))).where(weight_BM < 1, 1)
    passing_BK = weight_BK.clone()
    passing_BK[:, :-1] = passing_BM.where(valid_BK[:, 1:], weight_BM)
    kept_BK = valid_BK & (uniform_BK < passing_BK)
    length_BK = kept_BK * torch.arange(1, kept_BK.shape[1] + 1, device=kept_BK.device)
    return F.pad(length_BK, (1, 0)).amax(dim=1)


def residual(target_BV: torch.Tensor, draft_BV: torch.Tensor) -> torch.Tensor:
    """Weights of the replacement's law, max(target - draft, 0), unnormalised; the target itself where nothing is left.

    ``target_BV`` is the target's law times the prefix's weight (1 where drafts are kept one by one). Nothing is
    left only where draft and target agree up to rounding, and then the next draft is not refused. A draft of all zeros
    gives the target: the bonus token.
    """
    weight_BV = (target_BV - draft_BV).clamp(min=0)
    return torch.where(weight_BV.sum(-1, keepdim=True) > 0, weight_BV, target_BV)
