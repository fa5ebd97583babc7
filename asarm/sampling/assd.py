"""Any-Subset Speculative Decoding (Guo & Ermon 2025): draft k tokens, score them jointly in one call, keep the
longest prefix that speculative acceptance allows, and replace the token after it. Exactly the law of sequential
sampling, in fewer calls.

With the self draft a round is two calls and settles two tokens at least (the first draft is exact; then a replacement
or a bonus token, unless one token was left); with the bigram draft it is one call and settles one at least. So calls
never outnumber tokens.
"""

import torch

from ..law import draw
from ..orders import Rows, rows_from, rows_with_limit
from .accept import accepted_block, accepted_prefix, prefix_weights, residual
from .decoding import Decoding, Draft, chosen
from .drafts import bigram_draft, draft_ahead, head_draft, self_draft


def assd_round(state: Decoding) -> None:
    """Draft with the model itself, and its draft head if the sampler has one."""
    draft = draft_ahead(state)
    first_logp_B = chosen(draft.probs_BKV, draft.ids_BK)[:, 0].log()
    state.logp_B += first_logp_B.where(draft.rows.valid_BR[:, 0], 0)
    if state.several_left and (state.config.k > 1 or state.config.bonus_token):
        verify(state, draft, n_exact=1)
    else:  # the exact first draft is all there is
        state.put(draft.rows, draft.ids_BK)
        state.settle(state.settled_B + 1, state.settled_B, backlog=1)


def assd_ngram_round(state: Decoding) -> None:
    """Draft with the bigram of the context."""
    verify(state, bigram_draft(state), n_exact=0)


def assd_one_pass_round(state: Decoding) -> None:
    """Draft in the pass that verifies the drafts of the round before: one call a round.

    Without a draft head, for every length a that the accepted prefix may have, the pass also holds query rows for the k
    ranks after the token that will then be settled, all seeing what precedes that token. Acceptance picks the branch;
    only its rows are projected onto the vocabulary. A head is told the tokens that its states have not seen, so for it
    one window of 2k ranks is enough, whatever is accepted.
    """
    k, draft = state.config.k, state.draft
    assert draft is not None  # Decoding makes one for a sampler that drafts ahead
    query = _tested_rows(state, draft, n_exact=0)
    ahead = _branches(state) if state.drafter is None else _window(state)
    state.put(draft.rows, draft.ids_BK)
    hidden_BQE = state.hidden(query.followed_by(ahead), draft_end_B=state.settled_B + k, n_drafts=k)
    accepted_B = accept(state, draft, 0, query, state.engine.logits(hidden_BQE[:, : k + 1]))
    rows, ahead_BXE = state.rows(state.settled_B, state.settled_B + k, k), hidden_BQE[:, k + 1 :]
    if state.drafter is None:
        state.draft = self_draft(state, rows, rows_from(ahead_BXE, accepted_B * k, k), n_missing=1)
    else:
        state.draft = head_draft(state, rows, ahead_BXE, accepted_B, n_missing=1)


def _branches(state: Decoding) -> Rows:
    """Query rows for the k ranks after each rank that may be settled next, [B, (k+1) k], blind to the token at that
    rank."""
    k, device = state.config.k, state.settled_B.device
    accepted_A1 = torch.arange(k + 1, device=device)[:, None]
    limit_BX = (state.settled_B[:, None, None] + accepted_A1.expand(-1, k)).flatten(1)
    rank_BX = (state.settled_B[:, None, None] + accepted_A1 + 1 + torch.arange(k, device=device)).flatten(1)
    return rows_with_limit(state.order, rank_BX, limit_BX, state.order.length_B)


def _window(state: Decoding) -> Rows:
    """Query rows for the 2k ranks after the next one, [B, 2k], which see the settled tokens."""
    settled_B1 = state.settled_B[:, None]
    rank_BW = settled_B1 + 1 + torch.arange(2 * state.config.k, device=settled_B1.device)
    return rows_with_limit(state.order, rank_BW, settled_B1.expand_as(rank_BW), state.order.length_B)


def verify(state: Decoding, draft: Draft, n_exact: int) -> None:
    """Score the drafts in one call; keep the first ``n_exact`` and what acceptance keeps of the rest."""
    query = _tested_rows(state, draft, n_exact)
    state.put(draft.rows, draft.ids_BK)
    logits_BQV = state.call(query, draft_end_B=state.settled_B + state.config.k, n_drafts=state.config.k)
    accept(state, draft, n_exact, query, logits_BQV)


def _tested_rows(state: Decoding, draft: Draft, n_exact: int) -> Rows:
    """Query rows [B, K+1] of the drafts that are put to the test, and of the bonus token."""
    tested_BK = draft.rows.valid_BR[:, n_exact:]
    start_B = state.settled_B + n_exact
    return state.rows(start_B, start_B + tested_BK.sum(dim=1) + int(state.config.bonus_token), tested_BK.shape[1] + 1)


def accept(state: Decoding, draft: Draft, n_exact: int, query: Rows, logits_BQV: torch.Tensor) -> torch.Tensor:
    """Keep the accepted prefix and settle one more token: the replacement of the draft after it, or the bonus token
    after the last draft. Returns the number of accepted drafts [B], the ``n_exact`` untested ones not counted.
    """
    target_BQV = state.law.probs(logits_BQV)
    tested_BK = draft.rows.valid_BR[:, n_exact:]
    draft_BKV, draft_ids_BK = draft.probs_BKV[:, n_exact:], draft.ids_BK[:, n_exact:]
    K = tested_BK.shape[1]
    target_BKV = target_BQV[:, :K]
    draft_prob_BK, target_prob_BK = chosen(draft_BKV, draft_ids_BK), chosen(target_BKV, draft_ids_BK)
    uniform_BK = state.uniforms(state.accept_uniform_KBN, draft.rows.rank_BR)[:, n_exact:]
    weight_B11: torch.Tensor | float = 1.0
    if state.config.verifies_blocks:
        weight_BA = prefix_weights(draft_prob_BK, target_prob_BK, tested_BK)
        accepted_B = accepted_block(weight_BA, draft_BKV, target_BKV, uniform_BK, tested_BK)
        weight_B11 = weight_BA.gather(1, accepted_B[:, None])[..., None]
    else:
        slack = state.config.accept_slack
        accepted_B = accepted_prefix(draft_prob_BK, target_prob_BK, uniform_BK, tested_BK, slack)
    kept_BK = torch.arange(K, device=accepted_B.device) < accepted_B[:, None]
    state.logp_B += target_prob_BK.log().where(kept_BK, 0).sum(1)
    state.proposed_BK[:, n_exact:] += tested_BK
    state.accepted_BK[:, n_exact:] += kept_BK

    last, last_B1V = query.at(accepted_B), rows_from(target_BQV, accepted_B, 1)
    weight_B1V = last_B1V
    if K:  # past the last tested draft there is nothing to subtract: the bonus token has the target's law
        refused_B11 = (accepted_B < tested_BK.sum(1))[:, None, None]
        refused_B1V = rows_from(draft_BKV, accepted_B.clamp(max=K - 1), 1) * refused_B11
        weight_B1V = residual(weight_B11 * last_B1V, refused_B1V)
    last_ids_B1 = draw(weight_B1V, state.uniforms(state.target_uniform_1BN, last.rank_BR))
    state.put(last, last_ids_B1)
    state.logp_B += chosen(last_B1V, last_ids_B1).log().where(last.valid_BR, 0).sum(1)
    cached_B = state.settled_B + n_exact + accepted_B
    state.settle(cached_B + last.valid_BR[:, 0], cached_B, backlog=1)
    return accepted_B
