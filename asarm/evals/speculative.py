"""The speculative-decoding comparison (Guo & Ermon 2025, table 1).

The same masked sequences, every sampler: network calls, time and likelihood."""

from dataclasses import asdict, replace

from ..data.datasets import load_text
from ..data.packing import pack_all
from ..density import require_memory_for_density
from ..drafter import drafter_of
from ..errors import DataFileError
from ..infilling import InfillTask
from ..loading import load
from ..model import AnySubsetLM
from ..runlog import prepare_output_dir, provenance, write_json
from ..sampling.sample import ROUNDS
from .config import SpeculativeConfig
from .decode import record_samplers
from .metrics import token_entropy
from .records import RecordLog, fingerprint
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
    out = prepare_output_dir(config.output_dir)
    text, documents = load_text(config.dataset, config.data_file, config.dataset_config, config.split)
    model, tokenizer = load(config.model, config.revision, config.tokenizer, config.dtype, config.whitespace_map)
    if not config.samplers:
        config = replace(config, samplers=all_samplers(model))
    require_memory_for_density(model, config.batch_size, config.max_length)
    tasks = masked_sequences(config, pack_all(documents, tokenizer, config.max_length))
    identity = {"text": text, "tasks": fingerprint(tasks), "weights": model.fingerprint()}
    log = RecordLog(out, asdict(config), identity)
    origin = provenance()

    def describe(task: InfillTask, ids: list[int]) -> dict:
        return {"entropy": token_entropy(ids), "text": tokenizer.decode(ids)}

    samplers = {name: config.sampler_config(name) for name in config.samplers}
    record_samplers(model, tasks, samplers, config, log, describe)
    rows = summarise_by_sampler({name: log.of(name) for name in config.samplers}, MEASURES)
    summary = {
        "samplers": {name: row | {"judge_ppl": None} for name, row in rows.items()},
        "config": asdict(config),
        "text": text,
        "num_sequences": len(tasks),
        "provenance": origin,
    }
    write_json(out / "summary.json", summary)
    return summary


def all_samplers(model: AnySubsetLM) -> list[str]:
    """Every sampler that the model has what it takes for."""
    return [name for name in ROUNDS if not name.startswith("assd-head") or drafter_of(model) is not None]


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
