"""Speculative acceptance as pure tensor functions (Leviathan et al. 2023; Guo & Ermon 2025).

A draft x with probability d(x) is kept with probability min(1, t(x)/d(x)), t being the target; the first that is not
kept is replaced by a draw from the residual, proportional to max(t - d, 0). Whatever the draft, the token that comes
out has law t: d(x) min(1, t(x)/d(x)) + (1 - sum min(t, d)) residual(x) = t(x).
"""

import torch


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


def residual(target_BV: torch.Tensor, draft_BV: torch.Tensor) -> torch.Tensor:
    """Weights of the replacement's law, max(target - draft, 0), unnormalised; the target itself where nothing is left.

    Nothing is left only where draft and target agree up to rounding, and then no draft is refused. A draft of all zeros
    gives the target: the bonus token.
    """
    weight_BV = (target_BV - draft_BV).clamp(min=0)
    return torch.where(weight_BV.sum(-1, keepdim=True) > 0, weight_BV, target_BV)
