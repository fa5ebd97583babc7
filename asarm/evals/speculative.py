"""The speculative-decoding comparison (Guo & Ermon 2025, table 1): the same masked sequences, every sampler.

Three steps, each going on where it was stopped: decode, let a judge read the texts, draw conclusions from the records.
"""

import math
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import yaml
from tqdm import tqdm

from ..data.datasets import load_text
from ..data.packing import pack_all
from ..density import require_memory_for_density
from ..errors import DataFileError, OutputDirError
from ..infilling import InfillTask
from ..runlog import read_lines
from ..samplers import REFERENCE
from ..tokenizer import TextTokenizer
from .config import SpeculativeConfig
from .judge import Judge
from .metrics import distinct, judge_nll_per_token, token_entropy
from .plots import draw_plots, model_of
from .records import by_key, by_system
from .run import EvalRun
from .stats import ALPHA, aligned, compare, summarise_by_sampler, table, with_interval
from .tasks import mask_rows

MEASURES = {
    "nfe_per_token": lambda r: r["nfe"] / r["masked"],
    "aux_nfe_per_token": lambda r: r["aux_nfe"] / r["masked"],
    "tokens_per_round": lambda r: r["masked"] / r["rounds"],
    "seconds_per_sequence": lambda r: r["seconds"],
    "log_prob_per_token": lambda r: r["log_prob"] / r["masked"],
    "entropy": lambda r: r["entropy"],
    "distinct_1": lambda r: r["distinct_1"],
    "distinct_2": lambda r: r["distinct_2"],
}
JUDGED = {
    "judge_nll_per_token": judge_nll_per_token,
    "judge_ppl": lambda r: math.exp(judge_nll_per_token(r)),
}
HEADINGS = {
    "nfe_per_token": "NFE/token",
    "aux_nfe_per_token": "aux NFE/token",
    "tokens_per_round": "tokens/round",
    "seconds_per_sequence": "s/sequence",
    "log_prob_per_token": "log-prob/token",
    "entropy": "entropy (bits)",
    "distinct_2": "distinct-2",
}
COMPARED = {
    "log_prob_per_token": "log-probability (nats/token)",
    "judge_nll_per_token": "judge's negative log-likelihood (nats/token)",
    "entropy": "entropy (bits)",
}


def evaluate(config: SpeculativeConfig) -> dict:
    """Run, or go on with, the comparison; returns what ``summary.json`` holds."""
    text, documents = load_text(config.dataset, config.data_file, config.dataset_config, config.split)
    run = EvalRun(config)
    judge = None if config.judge is None else Judge(config.judge)
    for evaluated in run.models():
        require_memory_for_density(evaluated.model, config.batch_size, config.max_length)
        tasks = masked_sequences(config, pack_all(documents, evaluated.tokenizer, config.max_length))

        def describe(task: InfillTask, ids: list[int], tokenizer=evaluated.tokenizer) -> dict:
            repetition = {"entropy": token_entropy(ids), "distinct_1": distinct(ids, 1), "distinct_2": distinct(ids, 2)}
            return {**repetition, "text": plain_text(tokenizer, ids)}

        run.decode(evaluated, tasks, describe)
    if judge is not None:
        judge_texts(run, judge, config.batch_size)

    def conclude(records: dict[str, list[dict]]) -> dict:
        rows = summarise(records, config)
        draw_plots(run.folder, records, rows, config.margin)
        return {"samplers": rows, "text": text, "num_sequences": len(tasks)}

    return run.finish(conclude)


def masked_sequences(config: SpeculativeConfig, rows: list) -> list[InfillTask]:
    """The first ``num_sequences`` full rows, each with its own part of the tokens given."""
    full = [row for row in rows if len(row) == config.max_length] or rows
    if len(full) < config.num_sequences:
        raise DataFileError(
            f"the text makes {len(full)} sequences of {config.max_length} tokens and num_sequences is "
            f"{config.num_sequences}; give more text, or a smaller --num_sequences or --max_length"
        )
    tasks = mask_rows(full[: config.num_sequences][: config.limit], config.visible_fraction, config.seed)
    if config.order == "left-to-right":
        tasks = [replace(task, visible=sorted(task.visible, reverse=True)) for task in tasks]
    return tasks


def plain_text(tokenizer: TextTokenizer, ids: list[int]) -> str:
    """What a reader gets, and the judge: special tokens (separators of documents, as a rule) are line breaks."""
    runs = groupby(ids, key=lambda i: i in tokenizer.special_ids)
    return "\n".join(tokenizer.decode(list(run)) for special, run in runs if not special)


def judge_texts(run: EvalRun, judge: Judge, batch_size: int) -> None:
    """Let the judge read what this process has decoded and not yet given it."""
    log = run.second_phase("judge", {"judge_model": judge.name})
    todo = [r for r in run.own_records() if (r["sampler"], r["index"]) not in log.records]
    for start in tqdm(range(0, len(todo), batch_size), desc="judge", unit="batch"):
        batch = todo[start : start + batch_size]
        for record, (tokens, nll) in zip(batch, judge.score([r["text"] for r in batch], batch_size), strict=True):
            key = {"sampler": record["sampler"], "index": record["index"]}
            log.add(key | {"judge_tokens": tokens, "judge_nll": nll})


def summarise(records: dict[str, list[dict]], config: SpeculativeConfig) -> dict:
    """Means, intervals, and each sampler against the same model's ``sequential``, from the records alone."""
    judged = config.judge is not None
    measures = MEASURES | (JUDGED if judged else {})
    rows = summarise_by_sampler(records, measures, config.seed)
    for name, row in rows.items():
        row |= {"k": records[name][0]["k"], "versus_sequential": {}} | ({} if judged else {"judge_ppl": None})
    for model in dict.fromkeys(map(model_of, records)):
        reference = records.get(model + REFERENCE)
        others = [name for name in records if model_of(name) == model and name != model + REFERENCE]
        for key in COMPARED if reference else ():
            if key not in measures:
                continue
            value = measures[key]
            differences = {
                name: [value(r) - value(s) for r, s in zip(records[name], reference, strict=True)] for name in others
            }
            for name, found in compare(differences, config.margin, config.seed).items():
                rows[name]["versus_sequential"][key] = found
    return rows


def replot(folder: Path) -> list[Path]:
    """Draw the figures of a finished run from its records; returns the files."""
    if not (folder / "summary.json").exists():
        raise OutputDirError(f"{folder} holds no finished run (no summary.json); finish it first, or name another")
    config = SpeculativeConfig(**yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    phases = [folder / "records.jsonl", *([folder / "judge.jsonl"] if config.judge else [])]
    records = by_system(*(by_key(read_lines(path)) for path in phases))
    return draw_plots(folder, records, summarise(records, config), config.margin)


def report(summary: dict) -> str:
    """What was measured, the table, and what the comparison with ``sequential`` shows."""
    config, rows = summary["config"], summary["samplers"]
    headings = HEADINGS | ({"judge_ppl": f"PPL of {config['judge']}"} if config["judge"] else {})
    title = (
        f"{config['model']}: {summary['num_sequences']} sequences of {config['max_length']} tokens of "
        f"{summary['text']}, {1 - config['visible_fraction']:.0%} masked, {config['order']}, k = {config['k']}, "
        f"batches of {config['batch_size']}, {config['dtype']}; mean [95 % bootstrap interval over sequences]"
    )
    parts = [title, table(rows, headings, with_interval)]
    for key, label in COMPARED.items():
        found = {name: row["versus_sequential"][key] for name, row in rows.items() if key in row["versus_sequential"]}
        if found:
            parts += ["", f"{label}, difference from {REFERENCE}:", comparison_table(found)]
    if any(row["versus_sequential"] for row in rows.values()):
        parts += [
            "",
            f"Paired by sequence. equivalent: within +-{config['margin']:g} (two one-sided t-tests); different: not "
            f"shown equivalent, and the paired t-test rejects equality; undecided is no evidence of either. p-values "
            f"with Holm's correction over the samplers, alpha {ALPHA:g}. power: of the equivalence test, if the true "
            "difference is 0; detectable: the difference that the paired test finds with a chance of 80 %; needed: "
            "sequences for a power of 80 %.",
        ]
    return "\n".join(parts)


def comparison_table(found: dict[str, dict]) -> str:
    lines = [
        ["sampler", "verdict", "difference [95 %]", "p equivalent", "p different", "power", "detectable", "needed"]
    ]
    for name, row in found.items():
        lines.append(
            [
                name,
                row["verdict"],
                with_interval(row, "difference"),
                f"{row['p_equivalent']:.2g}",
                f"{row['p_different']:.2g}",
                f"{row['power']:.2f}",
                f"{row['detectable']:.3f}",
                str(row["sequences_needed"]),
            ]
        )
    return aligned(lines)
