"""k tokens a call without correction: the biased baseline of masked diffusion models.

Every token of a call is drawn from its own conditional as if the others did not exist, so the result does not have
the model's law.
"""

from .decoding import Decoding, chosen
from .drafts import draft_ahead


def parallel_round(state: Decoding) -> None:
    """Draw the next k ranks from their marginals given the settled tokens, and keep them all."""
    draft = draft_ahead(state)
    state.put(draft.rows, draft.ids_BK)
    logp_BK = chosen(draft.probs_BKV, draft.ids_BK).log()
    state.logp_B += logp_BK.where(draft.rows.valid_BR, 0).sum(1)
    state.settle(state.settled_B + state.config.k, state.settled_B, backlog=state.config.k)
