"""Held-out joint negative log-likelihood at given masking rates."""

from tqdm import tqdm

from ..data.packing import pack_all
from ..data.sources import read_documents
from ..density import joint_log_prob, require_memory_for_density
from ..infilling import collate
from ..loading import load
from .config import ScoreConfig
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
    table = []
    for fraction in config.masked_fractions:
        tasks = mask_rows(rows, 1 - fraction, config.seed)
        total, tokens, per_row = 0.0, 0, []
        for start in tqdm(range(0, len(tasks), config.batch_size), desc=f"{fraction:.0%} masked"):
            ids_BN, order = collate(tasks[start : start + config.batch_size])
            logp_B = joint_log_prob(model, ids_BN, order).cpu()
            total -= logp_B.sum().item()
            tokens += int(order.n_masked_B.sum())
            per_row += (-logp_B / order.n_masked_B).tolist()
        se = mean_and_se(per_row)[1]
        table.append(
            {"masked_fraction": fraction, "nll_per_token": total / tokens, "nll_per_token_se": se, "tokens": tokens}
        )
    return {
        "model": config.model,
        "data_file": config.data_file,
        "max_length": config.max_length,
        "rows": len(rows),
        "likelihood": table,
    }
