"""The speculative-decoding comparison (Guo & Ermon 2025, table 1).

The same masked sequences, every sampler: network calls, time and likelihood."""

from ..data.datasets import load_text
from ..data.packing import pack_all
from ..density import require_memory_for_density
from ..errors import DataFileError
from ..infilling import InfillTask
from .config import SpeculativeConfig
from .metrics import token_entropy
from .run import EvalRun
from .stats import summarise_by_sampler, table
from .tasks import mask_rows

MEASURES = {
    "nfe_per_token": lambda r: r["nfe"] / r["masked"],
    "aux_nfe_per_token": lambda r: r["aux_nfe"] / r["masked"],
    "tokens_per_round": lambda r: r["masked"] / r["rounds"],
    "seconds_per_sequence": lambda r: r["seconds"],
    "log_prob_per_token": lambda r: r["log_prob"] / r["masked"],
    "entropy": lambda r: r["entropy"],
}
HEADINGS = {
    "nfe_per_token": "NFE/token",
    "aux_nfe_per_token": "aux NFE/token",
    "tokens_per_round": "tokens/round",
    "seconds_per_sequence": "s/sequence",
    "log_prob_per_token": "log-prob/token",
    "entropy": "entropy (bits)",
}


def evaluate(config: SpeculativeConfig) -> dict:
    """Run, or go on with, the comparison; returns what ``summary.json`` holds."""
    text, documents = load_text(config.dataset, config.data_file, config.dataset_config, config.split)
    run = EvalRun(config)
    for candidate in run.candidates():
        require_memory_for_density(candidate.model, config.batch_size, config.max_length)
        tasks = masked_sequences(config, pack_all(documents, candidate.tokenizer, config.max_length))

        def describe(task: InfillTask, ids: list[int], tokenizer=candidate.tokenizer) -> dict:
            return {"entropy": token_entropy(ids), "text": tokenizer.decode(ids)}

        run.decode(candidate, tasks, describe)

    def summarise(records: dict[str, list[dict]]) -> dict:
        rows = summarise_by_sampler(records, MEASURES)
        samplers = {name: row | {"judge_ppl": None} for name, row in rows.items()}
        return {"samplers": samplers, "text": text, "num_sequences": config.num_sequences}

    return run.finish(summarise)


def masked_sequences(config: SpeculativeConfig, rows: list) -> list[InfillTask]:
    """The first ``num_sequences`` full rows, each with its own random visible subset."""
    full = [row for row in rows if len(row) == config.max_length] or rows
    if len(full) < config.num_sequences:
        raise DataFileError(
            f"the text makes {len(full)} sequences of {config.max_length} tokens and num_sequences is "
            f"{config.num_sequences}; give more text, or a smaller --num_sequences or --max_length"
        )
    return mask_rows(full[: config.num_sequences], config.visible_fraction, config.seed)


def report(summary: dict) -> str:
    """What was measured, and the table."""
    config = summary["config"]
    title = (
        f"{config['model']}: {summary['num_sequences']} sequences of {config['max_length']} tokens of "
        f"{summary['text']}, {1 - config['visible_fraction']:.0%} masked, k = {config['k']}, "
        f"batches of {config['batch_size']}, {config['dtype']}; mean +- standard error"
    )
    return title + "\n" + table(summary["samplers"], HEADINGS)
