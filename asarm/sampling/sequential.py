"""One token a call: the reference that the others must match in law."""

from ..law import draw
from .decoding import Decoding, chosen


def sequential_round(state: Decoding) -> None:
    """Draw the next rank from its conditional given all ranks below it."""
    row = state.rows(state.settled_B, state.settled_B + 1, 1)
    logp_B1V = state.law.log_probs(state.call(row))
    ids_B1 = draw(logp_B1V.exp(), state.uniforms(state.target_uniform_1BN, row.rank_BR))
    state.put(row, ids_B1)
    state.logp_B += chosen(logp_B1V, ids_B1).where(row.valid_BR, 0).sum(1)
    state.settle(state.settled_B + 1, state.settled_B, backlog=1)
