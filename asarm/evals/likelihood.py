"""Held-out joint negative log-likelihood at given masking rates."""

import numpy as np
from tqdm import tqdm

from ..density import joint_log_prob, require_memory_for_density
from ..errors import DataFileError
from ..infilling import collate
from ..network import Network
from .stats import mean_and_se
from .tasks import mask_rows


def held_out_likelihood(
    model: Network, rows: list[np.ndarray], masked_fractions: list[float], seed: int, batch_size: int
) -> list[dict[str, float]]:
    """Nats per masked token of packed rows, given a random visible subset, at each of ``masked_fractions``.

    The mean is over tokens; its standard error treats each row's mean as one observation.
    """
    if not rows:
        raise DataFileError("the text makes no row of two tokens or more, so there is nothing to score; give more text")
    require_memory_for_density(model, batch_size, max(map(len, rows)))
    fractions = tqdm(masked_fractions, desc="masking rates")
    return [likelihood_at(model, rows, fraction, seed, batch_size) for fraction in fractions]


def likelihood_at(
    model: Network, rows: list[np.ndarray], masked_fraction: float, seed: int, batch_size: int
) -> dict[str, float]:
    """Nats per masked token of packed rows, each with its own random visible subset, and their standard error."""
    tasks = mask_rows(rows, 1 - masked_fraction, seed)
    total, tokens, per_row = 0.0, 0, []
    for start in range(0, len(tasks), batch_size):
        ids_BN, order = collate(tasks[start : start + batch_size])
        logp_B = joint_log_prob(model, ids_BN, order).cpu()
        total -= logp_B.sum().item()
        tokens += int(order.n_masked_B.sum())
        per_row += (-logp_B / order.n_masked_B).tolist()
    return {
        "masked_fraction": masked_fraction,
        "nll_per_token": total / tokens,
        "nll_per_token_se": mean_and_se(per_row)[1],
        "tokens": tokens,
    }
