"""Any-Subset Speculative Decoding (Guo & Ermon 2025): draft k tokens, score them jointly in one call, keep the
longest prefix that speculative rejection allows, and replace the first refused token. Exactly the law of sequential
sampling, in fewer calls.

With the self draft a round is two calls and settles two tokens at least (the first draft is exact; then a replacement
or a bonus token, unless one token was left); with the bigram draft it is one call and settles one at least. So calls
never outnumber tokens.
"""

import torch

from ..law import draw
from .accept import accepted_prefix, residual
from .decoding import Decoding, chosen
from .drafts import Draft, bigram_draft, self_draft


def decode_assd(state: Decoding) -> None:
    """Draft with the model itself."""
    while (most_remaining := state.most_remaining()) > 0:
        state.begin_round()
        draft = self_draft(state)
        first_logp_B = chosen(draft.probs_BKV, draft.ids_BK)[:, 0].log()
        state.logp_B += first_logp_B.where(draft.rows.valid_BR[:, 0], 0)
        if most_remaining > 1 and (state.config.k > 1 or state.config.bonus_token):
            verify(state, draft, n_exact=1)
        else:  # the exact first draft is all there is
            state.put(draft.rows, draft.ids_BK)
            state.settle(state.settled_B + 1, state.settled_B, backlog=1)


def decode_assd_ngram(state: Decoding) -> None:
    """Draft with the bigram of the context."""
    while state.most_remaining() > 0:
        state.begin_round()
        verify(state, bigram_draft(state), n_exact=0)


def verify(state: Decoding, draft: Draft, n_exact: int) -> None:
    """Score the drafts in one call, keep the first ``n_exact`` and the accepted prefix of the rest, and settle one
    more token: the replacement of the first refused draft, or the bonus token after the last accepted one.
    """
    start_B = state.settled_B + n_exact  # the first rank whose draft is put to the test
    state.put(draft.rows, draft.ids_BK)
    tested_BK = draft.rows.valid_BR[:, n_exact:]
    n_tested_B = tested_BK.sum(dim=1)
    K = tested_BK.shape[1]
    n_bonus = int(state.config.bonus_token)
    query = state.rows(start_B, start_B + n_tested_B + n_bonus, K + 1)
    target_logp_BQV = state.law.log_probs(
        state.call(query, draft_end_B=state.settled_B + state.config.k, n_drafts=state.config.k)
    )
    target_BQV = target_logp_BQV.exp()

    draft_BKV, draft_ids_BK = draft.probs_BKV[:, n_exact:], draft.ids_BK[:, n_exact:]
    accepted_B = accepted_prefix(
        chosen(draft_BKV, draft_ids_BK),
        chosen(target_BQV[:, :K], draft_ids_BK),
        state.uniforms(state.accept_uniform_BN, query)[:, :K],
        tested_BK,
    )
    kept_BK = torch.arange(K, device=accepted_B.device) < accepted_B[:, None]
    state.logp_B += chosen(target_logp_BQV[:, :K], draft_ids_BK).where(kept_BK, 0).sum(1)
    state.proposed_B += n_tested_B
    state.accepted_B += accepted_B

    last = state.rows(start_B + accepted_B, start_B + n_tested_B + n_bonus, 1)
    # past the last tested draft there is nothing to subtract: the residual is the target
    draft_BQV = torch.cat([draft_BKV * tested_BK[..., None], torch.zeros_like(target_BQV[:, :1])], dim=1)
    target_B1V, refused_B1V = (_at(x_BQV, accepted_B) for x_BQV in (target_BQV, draft_BQV))
    last_ids_B1 = draw(residual(target_B1V, refused_B1V), state.uniforms(state.target_uniform_BN, last))
    state.put(last, last_ids_B1)
    state.logp_B += chosen(_at(target_logp_BQV, accepted_B), last_ids_B1).where(last.valid_BR, 0).sum(1)
    settled_B = start_B + accepted_B
    state.settle(settled_B + last.valid_BR[:, 0], settled_B, backlog=1)


def _at(x_BQV: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    """Row ``index_B`` of each sequence, [B, 1, V]."""
    return x_BQV.take_along_dim(index_B[:, None, None], dim=1)
