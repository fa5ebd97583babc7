"""The code infilling evaluation: programs with a gap, filled and compared with what was there.

The model is told the true number of tokens of each gap, as in the published protocol (Guo & Ermon 2025).
"""

import json
import re
from pathlib import Path

from ..density import require_memory_for_density
from ..errors import TextError
from ..infilling import InfillTask
from ..runlog import write_atomic
from ..tokenizer import TextTokenizer
from .config import CodeInfillConfig
from .metrics import code_similarity
from .run import EvalRun
from .stats import summarise_by_sampler, table
from .tasks import TextGap, read_code_gaps

QUALITY = {"exact_match": "exact match", "edit_similarity": "edit similarity"}
COST = {
    "gap_tokens": lambda r: r["masked"],
    "nfe_per_token": lambda r: r["nfe"] / r["masked"],
    "log_prob_per_token": lambda r: r["log_prob"] / r["masked"],
    "seconds_per_sequence": lambda r: r["seconds"],
}
HEADINGS = {
    "gap_tokens": "gap (tokens)",
    "nfe_per_token": "NFE/token",
    "log_prob_per_token": "log-prob/token",
    "seconds_per_sequence": "s/sequence",
}


def evaluate(config: CodeInfillConfig) -> dict:
    """Run, or go on with, an infilling evaluation; returns what ``summary.json`` holds."""
    text, gaps = read_code_gaps(config)
    gaps = gaps[: config.limit]
    run = EvalRun(config)
    for candidate in run.candidates():
        tokenizer = candidate.tokenizer
        tasks = [encode_gap(tokenizer, gap, index) for index, gap in enumerate(gaps)]
        require_memory_for_density(candidate.model, config.batch_size, max(len(task.ids) for task in tasks))

        def describe(task: InfillTask, ids: list[int], tokenizer=tokenizer) -> dict:
            gap = gaps[task.index]
            start, length = task.visible.index(False), task.visible.count(False)
            completion = tokenizer.decode_gap(ids, range(start, start + length))
            scores = code_similarity(gap.reference, completion)
            return {"name": gap.name, **scores, "completion": completion, "reference": gap.reference}

        run.decode(candidate.without_special_tokens(), tasks, describe)

    def summarise(records: dict[str, list[dict]]) -> dict:
        write_samples(run.folder, records)
        measures = COST | {key: (lambda r, key=key: r[key]) for key in QUALITY}
        return {"samplers": summarise_by_sampler(records, measures), "text": text, "num_texts": len(gaps)}

    return run.finish(summarise)


def encode_gap(tokenizer: TextTokenizer, gap: TextGap, index: int) -> InfillTask:
    """The text's tokens, the reference's masked; each of the three parts is encoded by itself, as a user's text with
    a gap is."""
    parts = [tokenizer.encode(part) for part in (gap.prefix, gap.reference, gap.suffix)]
    for part in (gap.prefix, gap.reference, gap.suffix):
        tokenizer.check_lossless(part)
    if not parts[1]:
        raise TextError(f"{gap.name}: the gap is empty, there is nothing to fill in")
    visible = [True] * len(parts[0]) + [False] * len(parts[1]) + [True] * len(parts[2])
    return InfillTask(parts[0] + parts[1] + parts[2], visible, index)


def write_samples(folder: Path, records: dict[str, list[dict]]) -> None:
    """``samples-SAMPLER.jsonl``: task_id and completion, as the benchmark's own evaluator reads them."""
    for name, of_sampler in records.items():
        samples = [{"task_id": record["name"], "completion": record["completion"]} for record in of_sampler]
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_atomic(folder / f"samples-{re.sub(r'[^A-Za-z0-9+:.-]+', '_', name)}.jsonl", text)


def report(summary: dict) -> str:
    """What was measured, and the table."""
    config = summary["config"]
    title = (
        f"{config['model']}, {config['benchmark']}: {summary['num_texts']} texts of "
        f"{summary['text']}, k = {config['k']}, batches of {config['batch_size']}, {config['dtype']}; the model is "
        "told the true length of the gap; mean +- standard error"
    )
    return title + "\n" + table(summary["samplers"], HEADINGS | QUALITY)
