"""Draft distributions: the model's own marginals, corrected by a draft head or not, and a bigram of the context."""

import torch

from ..draft_head import distance_to_previous, previous_ids
from ..drafter import Window
from ..law import Law, argmin, draw, exponential_noise, ids_on
from ..orders import Rows, rows_from
from .decoding import Decoding, Draft


def draft_ahead(state: Decoding) -> Draft:
    """k tokens in one network call: every row sees exactly the settled tokens (Guo & Ermon 2025).

    The first is drawn from its true conditional.
    """
    k = state.config.k
    rows = state.rows(state.settled_B, state.settled_B + k, k)
    states_BKE = state.hidden(rows, limit_B=state.settled_B)
    if state.drafter is None:
        return self_draft(state, rows, states_BKE, n_missing=0)
    return head_draft(state, rows, states_BKE, torch.zeros_like(state.settled_B), n_missing=0)


def self_draft(state: Decoding, rows: Rows, states_BKE: torch.Tensor, n_missing: int) -> Draft:
    """Draft one token a row from the rows' hidden states, the first of which misses ``n_missing`` tokens before it:
    each as if the others did not exist. Where nothing is missing the law is the target's."""
    probs_BKV = _probs(_laws(state, n_missing), state.engine.logits(states_BKE))
    return Draft(rows, draw(probs_BKV, state.uniforms(state.draft_uniform_KBN, rows.rank_BR)), probs_BKV)


def head_draft(state: Decoding, rows: Rows, states_BWE: torch.Tensor, first_B: torch.Tensor, n_missing: int) -> Draft:
    """Draft one token a row with the draft head, one after another.

    ``states_BWE`` are the hidden states of a window of ranks, in which ``rows`` begin at row ``first_B``; the first row
    of the window misses ``n_missing`` tokens before it. Where nothing is missing the law is the target's.
    """
    assert state.drafter is not None  # Decoding has asked for it
    W, K = states_BWE.shape[1], rows.rank_BR.shape[1]
    rank_BW = (rows.rank_BR[:, 0] - first_B)[:, None] + torch.arange(W, device=first_B.device)
    before_BW = previous_ids(state.ids_BS, state.order, rank_BW, state.model.mask_token_id)
    window = Window(states_BWE, distance_to_previous(state.order, rank_BW), n_missing)
    logits_BKV = state.engine.logits(rows_from(states_BWE, first_B, K))
    steps = state.drafter.begin(window, logits_BKV, first_B, before_BW[:, : W - K])
    token_B = before_BW.gather(1, first_B[:, None])[:, 0]
    noise_BKX = exponential_noise(state.uniforms(state.draft_uniform_KBN, rows.rank_BR), logits_BKV.shape[-1])
    ids, probs = [], []
    for j, law in enumerate(_laws(state, n_missing)):
        probs.append(law.probs(steps.step(j, token_B)))
        token_B = argmin(probs[-1], noise_BKX[:, j])
        ids.append(token_B)
    return Draft(rows, torch.stack(ids, dim=1), torch.stack(probs, dim=1))


def _laws(state: Decoding, n_missing: int) -> list[Law]:
    """Of the rows of a draft: the target's where nothing is missing."""
    return [state.law if n_missing + j == 0 else state.draft_law for j in range(state.config.k)]


def _probs(laws: list[Law], logits_BKV: torch.Tensor) -> torch.Tensor:
    """Every row's distribution under its own law; at most the first differs from the rest."""
    if laws[0] == laws[-1]:
        return laws[0].probs(logits_BKV)
    return torch.cat([laws[0].probs(logits_BKV[:, :1]), laws[-1].probs(logits_BKV[:, 1:])], dim=1)


def bigram_draft(state: Decoding) -> Draft:
    """k tokens, one after another, from the bigram of the settled tokens (Guo & Ermon 2025); no network call.

    A token follows its left neighbour as often as it does in the settled text; where the neighbour is unknown or has no
    successor there, the unigram of the settled text stands in, and the uniform distribution where nothing is settled.
    Counts as one auxiliary call a round, as in the paper.
    """
    k, N = state.config.k, state.order.rank_BN.shape[1]
    rows = state.rows(state.settled_B, state.settled_B + k, k)
    noise_BKX = exponential_noise(state.uniforms(state.draft_uniform_KBN, rows.rank_BR), state.model.config.vocab_size)
    state.aux_nfe_B += rows.valid_BR.any(dim=1)
    rank_BN, ids_BS = state.order.rank_BN, state.ids_BS.clone()
    left_BM, right_BM = ids_BS[:, : N - 1], ids_BS[:, 1:N]
    settled_BN = rank_BN < state.settled_B[:, None]
    settled_pair_BM = settled_BN[:, :-1] & settled_BN[:, 1:]

    allowed_V = torch.ones(state.model.config.vocab_size, dtype=torch.float64, device=ids_BS.device)
    allowed_V.index_fill_(0, ids_on(ids_BS.device, state.law.banned_ids), 0)
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
        ids.append(argmin(probs[-1], noise_BKX[:, j])[:, None])
        ids_BS.scatter_(1, position_B1, ids[-1])
    return Draft(rows, torch.cat(ids, dim=1), torch.stack(probs, dim=1))


def _counts_or(
    fallback_BV: torch.Tensor, ids_BX: torch.Tensor, counted_BX: torch.Tensor, allowed_V: torch.Tensor
) -> torch.Tensor:
    """How often each allowed token occurs where ``counted_BX``; the fallback for a sequence where none does."""
    count_BV = torch.zeros_like(fallback_BV).scatter_add_(1, ids_BX, counted_BX.double()) * allowed_V
    return torch.where(count_BV.sum(1, keepdim=True) > 0, count_BV, fallback_BV)
