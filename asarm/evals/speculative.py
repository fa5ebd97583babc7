"""The speculative-decoding comparison (Guo & Ermon 2025, table 1).

The same masked sequences, every sampler: network calls, time and likelihood."""

import hashlib
import time
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from ..data.datasets import load_text
from ..data.packing import pack_all
from ..density import joint_log_prob, require_memory_for_density
from ..errors import DataFileError
from ..infilling import InfillTask, collate
from ..loading import load
from ..model import AnySubsetLM
from ..orders import random_visible
from ..rng import generator
from ..runlog import prepare_output_dir, provenance, write_json
from ..sampling.decoding import Completion, law_of
from ..sampling.sample import sample
from ..tokenizer import TextTokenizer
from .config import SpeculativeConfig
from .metrics import token_entropy
from .records import RecordLog
from .stats import mean_and_se

WARM_UP_TOKENS = 8
MEASURES = {  # summary key: (column heading, value of one record)
    "nfe_per_token": ("NFE/token", lambda r: r["nfe"] / r["masked"]),
    "aux_nfe_per_token": ("aux NFE/token", lambda r: r["aux_nfe"] / r["masked"]),
    "tokens_per_round": ("tokens/round", lambda r: r["masked"] / r["rounds"]),
    "seconds_per_sequence": ("s/sequence", lambda r: r["seconds"]),
    "log_prob_per_token": ("log-prob/token", lambda r: r["log_prob"] / r["masked"]),
    "entropy": ("entropy (bits)", lambda r: r["entropy"]),
}


def evaluate(config: SpeculativeConfig) -> dict:
    """Run, or go on with, the comparison; returns what ``summary.json`` holds."""
    out = prepare_output_dir(config.output_dir)
    text, documents = load_text(config.dataset, config.data_file, config.dataset_config, config.split)
    model, tokenizer = load(config.model, config.revision, config.tokenizer, config.dtype)
    require_memory_for_density(model, config.batch_size, config.max_length)
    tasks = masked_sequences(config, pack_all(documents, tokenizer, config.max_length))
    identity = {"text": text, "tasks": fingerprint(tasks), "weights": model.fingerprint()}
    log = RecordLog(out, asdict(config), identity)
    origin = provenance()
    bar = tqdm(total=len(tasks) * len(config.samplers), initial=len(log.records), unit="seq", desc="speculative")
    for name in config.samplers:
        bar.set_postfix_str(name)
        todo = [task for task in tasks if (name, task.index) not in log.records]
        run_sampler(config, name, model, tokenizer, todo, log, bar)
    bar.close()
    summary = summarise(config, log) | {"text": text, "num_sequences": len(tasks), "provenance": origin}
    write_json(out / "summary.json", summary)
    return summary


def masked_sequences(config: SpeculativeConfig, rows: list) -> list[InfillTask]:
    """The first ``num_sequences`` full rows, each with its own random visible subset."""
    full = [row for row in rows if len(row) == config.max_length] or rows
    if len(full) < config.num_sequences:
        raise DataFileError(
            f"the text makes {len(full)} sequences of {config.max_length} tokens and num_sequences is "
            f"{config.num_sequences}; give more text, or a smaller --num_sequences or --max_length"
        )
    tasks = []
    for index, row in enumerate(full[: config.num_sequences]):
        visible_N = random_visible(len(row), config.visible_fraction, generator(config.seed, "mask", index))
        tasks.append(InfillTask(row.tolist(), visible_N.tolist(), index))
    return tasks


def fingerprint(tasks: list[InfillTask]) -> str:
    """A short hash of the sequences and their masks."""
    return hashlib.sha256(repr([(t.ids, t.visible) for t in tasks]).encode()).hexdigest()[:16]


def run_sampler(
    config: SpeculativeConfig,
    name: str,
    model: AnySubsetLM,
    tokenizer: TextTokenizer,
    tasks: list[InfillTask],
    log: RecordLog,
    bar: tqdm,
) -> None:
    """Decode ``tasks`` batch by batch and record each sequence."""
    sampler = config.sampler_config(name)
    law = law_of(model, replace(sampler, greedy=False))  # a greedy law gives its one sequence probability 1
    for start in range(0, len(tasks), config.batch_size):
        batch = tasks[start : start + config.batch_size]
        ids_BN, order = collate(batch)
        indices = [task.index for task in batch]
        if start == 0:
            warm_up(model, batch, sampler)
        seconds, completion = timed(model, ids_BN, order, sampler, config.seed, indices)
        logp_B = joint_log_prob(model, completion.ids_BN, order, law).tolist()
        for b, task in enumerate(batch):
            ids = completion.ids_BN[b, : len(task.ids)].tolist()
            counts = {
                key: int(getattr(completion, f"{key}_B")[b])
                for key in ("nfe", "aux_nfe", "rounds", "proposed", "accepted")
            }
            log.add(
                {
                    "sampler": name,
                    "index": task.index,
                    "tokens": len(task.ids),
                    "masked": task.visible.count(False),
                    **counts,
                    "seconds": seconds / len(batch),
                    "log_prob": logp_B[b],
                    "entropy": token_entropy(ids),
                    "text": tokenizer.decode(ids),
                }
            )
        bar.update(len(batch))


def warm_up(model: AnySubsetLM, batch: list[InfillTask], sampler) -> None:
    """A short run that is not timed: first calls allocate memory and pick kernels."""
    short = [replace(t, visible=[i < len(t.ids) - WARM_UP_TOKENS for i in range(len(t.ids))]) for t in batch]
    ids_BN, order = collate(short)
    sample(model, ids_BN, order, sampler)


def timed(model: AnySubsetLM, *arguments) -> tuple[float, Completion]:
    """Seconds that sampling takes, the device's work included, and the completion."""
    synchronise = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    completion = sample(model, *arguments)
    synchronise()
    return time.perf_counter() - start, completion


def summarise(config: SpeculativeConfig, log: RecordLog) -> dict:
    """Means and standard errors over sequences, by sampler."""
    samplers = {}
    for name in config.samplers:
        records = log.of(name)
        row: dict[str, float | int | None] = {"sequences": len(records), "judge_ppl": None}
        for key, (_, value) in MEASURES.items():
            row[key], row[f"{key}_se"] = mean_and_se([value(r) for r in records])
        samplers[name] = row
    return {"samplers": samplers, "config": asdict(config)}


def table(summary: dict) -> str:
    """The summary as an aligned table, mean +- standard error."""
    header = ["sampler", *(heading for heading, _ in MEASURES.values())]
    rows = [
        [name, *(f"{row[key]:.3f} +- {row[f'{key}_se']:.3f}" for key in MEASURES)]
        for name, row in summary["samplers"].items()
    ]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    config = summary["config"]
    title = (
        f"{config['model']}: {summary['num_sequences']} sequences of {config['max_length']} tokens of "
        f"{summary['text']}, {1 - config['visible_fraction']:.0%} masked, k = {config['k']}, "
        f"batches of {config['batch_size']}, {config['dtype']}; mean +- standard error"
    )
    return "\n".join(
        [title, *("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [header, *rows])]
    )
