"""Draft distributions: the model's own marginals, and a bigram of the context."""

from dataclasses import dataclass

import torch

from ..law import draw
from ..orders import Rows
from .decoding import Decoding


@dataclass(frozen=True)
class Draft:
    """Drafted tokens: their rows, ids [B, K] and the distributions [B, K, V] that they were drawn from."""

    rows: Rows
    ids_BK: torch.Tensor
    probs_BKV: torch.Tensor


def self_draft(state: Decoding) -> Draft:
    """k tokens as if they were independent, in one network call: every row sees exactly the settled tokens (paper, algorithm 1).

    The first is drawn from its true conditional.
    """
    k = state.config.k
    rows = state.rows(state.settled_B, state.settled_B + k, k)
    probs_BKV = state.law.probs(state.call(rows, limit_B=state.settled_B))
    return Draft(rows, draw(probs_BKV, state.uniforms(state.draft_uniform_BN, rows)), probs_BKV)


def bigram_draft(state: Decoding) -> Draft:
    """k tokens, one after another, from the bigram of the settled tokens (paper, section 5.2); no network call.

    A token follows its left neighbour as often as it does in the settled text; where the neighbour is unknown or has no
    successor there, the unigram of the settled text stands in, and the uniform distribution where nothing is settled.
    Counts as one auxiliary call a round, as in the paper.
    """
    k, N = state.config.k, state.order.rank_BN.shape[1]
    rows = state.rows(state.settled_B, state.settled_B + k, k)
    known_BN = state.order.rank_BN < state.settled_B[:, None]
    ids_BN = state.ids_BS[:, :N].clone()
    state.aux_nfe_B += rows.valid_BR.any(dim=1)
    probs = []
    for j in range(k):
        position_B1 = rows.position_BR[:, j : j + 1].clamp(max=N - 1)
        left_B1 = (position_B1 - 1).clamp(min=0)
        drafted_BN = state.order.rank_BN < (state.settled_B + j)[:, None]
        left_known_B1 = drafted_BN.gather(1, left_B1) & (position_B1 > 0)
        follows_BN = torch.zeros_like(known_BN)
        follows_BN[:, 1:] = known_BN[:, 1:] & known_BN[:, :-1] & (ids_BN[:, :-1] == ids_BN.gather(1, left_B1)) & left_known_B1
        probs_BV = _backed_off_probs(state, ids_BN, [follows_BN, known_BN])
        uniform_B = state.uniforms(state.draft_uniform_BN, rows)[:, j]
        drawn_B1 = draw(probs_BV, uniform_B)[:, None]
        ids_BN.scatter_(1, position_B1, torch.where(rows.valid_BR[:, j : j + 1], drawn_B1, ids_BN.gather(1, position_B1)))
        probs.append((drawn_B1, probs_BV))
    return Draft(rows, torch.cat([d for d, _ in probs], dim=1), torch.stack([p for _, p in probs], dim=1))


def _backed_off_probs(state: Decoding, ids_BN: torch.Tensor, counted: list[torch.Tensor]) -> torch.Tensor:
    """Relative token frequencies [B, V] over the first mask of ``counted`` that leaves any; uniform if none does."""
    V = state.model.config.vocab_size
    allowed_V = torch.ones(V, dtype=torch.float64, device=ids_BN.device)
    allowed_V[list(state.law.banned_ids)] = 0
    weight_BV = allowed_V.expand(len(ids_BN), V)
    for mask_BN in reversed(counted):
        count_BV = torch.zeros_like(weight_BV).scatter_add_(1, ids_BN, mask_BN.double()) * allowed_V
        weight_BV = torch.where(count_BV.sum(1, keepdim=True) > 0, count_BV, weight_BV)
    return weight_BV / weight_BV.sum(1, keepdim=True)
