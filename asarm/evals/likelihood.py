"""Held-out joint negative log-likelihood at given masking rates."""

import numpy as np
from tqdm import tqdm

from ..command_config import ScoreConfig
from ..data.packing import pack_all
from ..data.sources import read_documents
from ..density import joint_log_prob, require_memory_for_density
from ..infilling import collate
from ..loading import load
from ..network import Network
from .stats import mean_and_se
from .tasks import mask_rows


def held_out_likelihood(config: ScoreConfig) -> dict:
    """Nats per masked token, given a random visible subset, at each of ``masked_fractions``.

    The mean is over tokens; its standard error treats each row's mean as one observation.
    """
    documents = read_documents(config.data_file)
    model, tokenizer = load(config.model, config.revision, config.tokenizer, whitespace_map=config.whitespace_map)
    rows = pack_all(documents, tokenizer, config.max_length)[: config.num_sequences]
    require_memory_for_density(model, config.batch_size, config.max_length)
    table = [
        likelihood_at(model, rows, fraction, config.seed, config.batch_size)
        for fraction in tqdm(config.masked_fractions, desc="masking rates")
    ]
    return {
        "model": config.model,
        "data_file": config.data_file,
        "max_length": config.max_length,
        "rows": len(rows),
        "likelihood": table,
    }


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
