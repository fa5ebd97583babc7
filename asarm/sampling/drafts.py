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
    """k tokens as if they were independent, in one network call: every row sees exactly the settled tokens (Guo &
    Ermon 2025).

    The first is drawn from its true conditional.
    """
    k = state.config.k
    rows = state.rows(state.settled_B, state.settled_B + k, k)
    logits_BKV = state.call(rows, limit_B=state.settled_B)
    if state.draft_law == state.law:
        return draw_draft(state, rows, state.law.probs(logits_BKV))
    exact_B1V, later_BKV = state.law.probs(logits_BKV[:, :1]), state.draft_law.probs(logits_BKV[:, 1:])
    return draw_draft(state, rows, torch.cat([exact_B1V, later_BKV], dim=1))


def draw_draft(state: Decoding, rows: Rows, probs_BKV: torch.Tensor) -> Draft:
    """Draft one token a row, each from its own distribution."""
    return Draft(rows, draw(probs_BKV, state.uniforms(state.draft_uniform_BN, rows)), probs_BKV)


def no_draft(state: Decoding) -> Draft:
    """A draft of k rows of which none is valid: what there is before the first call."""
    rows = state.rows(state.settled_B, state.settled_B, state.config.k)
    shape = (*rows.rank_BR.shape, state.model.config.vocab_size)
    probs_BKV = torch.zeros(shape, dtype=torch.float64, device=rows.rank_BR.device)
    return Draft(rows, torch.zeros_like(rows.rank_BR), probs_BKV)


def bigram_draft(state: Decoding) -> Draft:
    """k tokens, one after another, from the bigram of the settled tokens (Guo & Ermon 2025); no network call.

    A token follows its left neighbour as often as it does in the settled text; where the neighbour is unknown or has no
    successor there, the unigram of the settled text stands in, and the uniform distribution where nothing is settled.
    Counts as one auxiliary call a round, as in the paper.
    """
    k, N = state.config.k, state.order.rank_BN.shape[1]
    rows = state.rows(state.settled_B, state.settled_B + k, k)
    uniform_BK = state.uniforms(state.draft_uniform_BN, rows)
    state.aux_nfe_B += rows.valid_BR.any(dim=1)
    rank_BN, ids_BS = state.order.rank_BN, state.ids_BS.clone()
    left_BM, right_BM = ids_BS[:, : N - 1], ids_BS[:, 1:N]
    settled_BN = rank_BN < state.settled_B[:, None]
    settled_pair_BM = settled_BN[:, :-1] & settled_BN[:, 1:]

    allowed_V = torch.ones(state.model.config.vocab_size, dtype=torch.float64, device=ids_BS.device)
    allowed_V[list(state.law.banned_ids)] = 0
    nothing_BV = allowed_V.expand(len(ids_BS), -1)
    unigram_BV = _counts_or(nothing_BV, ids_BS[:, :N], settled_BN, allowed_V)
    ids, probs = [], []
    for j in range(k):
        position_B1 = rows.position_BR[:, j : j + 1]
        neighbour_B1 = (position_B1 - 1).clamp(min=0)
        known_B1 = (position_B1 > 0) & (rank_BN.gather(1, neighbour_B1) < (state.settled_B + j)[:, None])
        follows_BM = settled_pair_BM & known_B1 & (left_BM == ids_BS.gather(1, neighbour_B1))
        weight_BV = _counts_or(unigram_BV, right_BM, follows_BM, allowed_V)
        probs.append(weight_BV / weight_BV.sum(1, keepdim=True))
        ids.append(draw(probs[-1], uniform_BK[:, j])[:, None])
        ids_BS.scatter_(1, position_B1, ids[-1])
    return Draft(rows, torch.cat(ids, dim=1), torch.stack(probs, dim=1))


def _counts_or(
    fallback_BV: torch.Tensor, ids_BX: torch.Tensor, counted_BX: torch.Tensor, allowed_V: torch.Tensor
) -> torch.Tensor:
    """How often each allowed token occurs where ``counted_BX``; the fallback for a sequence where none does."""
    count_BV = torch.zeros_like(fallback_BV).scatter_add_(1, ids_BX, counted_BX.double()) * allowed_V
    return torch.where(count_BV.sum(1, keepdim=True) > 0, count_BV, fallback_BV)
