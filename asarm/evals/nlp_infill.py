"""Natural-language infilling and left-to-right evaluations: stories, last words, choices of endings, texts with masks.

Every system works on the same texts in one run: the model and further ones with each sampler, left-to-right models that
see only what precedes the gap, and guessers. A gap's length is that of the reference, in each model's own tokens, as in
the published protocol (Guo & Ermon 2025).
"""

import math
from collections import defaultdict

from ..errors import TextError
from ..loading import trained_length
from .causal import CausalLM
from .config import NlpInfillConfig
from .gaps import fill, fill_causal, guess_fills
from .multiple_choice import choose, choose_causal, guess_choices
from .nlp_items import Item, read_items
from .nlp_tasks import NLP_TASKS, NlpTask
from .run import EvalRun
from .stats import interval, mean_and_se, table, with_interval


def evaluate(config: NlpInfillConfig) -> dict:
    """Run, or go on with, the evaluation; returns what ``summary.json`` holds."""
    task = NLP_TASKS[config.task]
    source, items, not_read = read_items(task, config.data_file, config.limit)
    run = EvalRun(config)
    models = evaluate_all(run, task, items)

    def summarise(records: dict[str, list[dict]]) -> dict:
        return {
            "samplers": {system: summary_row(task, of_system) for system, of_system in records.items()},
            "text": source,
            "protocol": task.protocol,
            "num_rows": len(items) + len(not_read),
            "num_texts": len(items),
            "skipped_rows": [vars(row) for row in not_read],
            "models": models,
        }

    return run.finish(summarise)


def evaluate_all(run: EvalRun, task: NlpTask, items: list[Item]) -> dict[str, dict]:
    """Left-to-right models, any-subset models, guessers, on the same texts; returns for each model how long a text it
    takes (None: not known) and which it left out."""
    config, found = run.config, {}
    choosing = (guess_choices, choose_causal, choose)
    guess, causal, model = choosing if task.choices else (guess_fills, fill_causal, fill)
    for name in config.causal_lm:
        lm = CausalLM.from_pretrained(name, config.dtype)
        run.log.identify(lm.system, {"weights": lm.fingerprint})
        max_length = min((n for n in (config.max_length, lm.max_length) if n), default=None)
        skipped = causal(run, task, lm, items, max_length)
        found[lm.system] = {"max_length": max_length, "skipped": [vars(s) for s in skipped]}
    for evaluated in run.models():
        max_length = config.max_length or trained_length(evaluated.model)
        skipped = model(run, task, evaluated.without_special_tokens(), items, max_length)
        if not evaluated.prefix and len(skipped) == len(items):
            raise TextError(f"{config.model} can be asked none of {len(items)} texts; the first: {skipped[0].reason}")
        label = evaluated.prefix.strip() or config.model
        found[label] = {"max_length": max_length, "skipped": [vars(s) for s in skipped]}
    guess(run, task, items)
    return found


def measures(task: NlpTask, record: dict) -> dict[str, float]:
    """What a record contributes to its system's row."""
    found = {key: record[key] for key in task.headings if key in record}
    if "masked" in record:
        found["gap_tokens"] = record["masked"]
        found |= {f"{key}_per_token": record[key] / record["masked"] for key in ("nfe", "log_prob") if key in record}
    if "seconds" in record:
        found["seconds_per_sequence"] = record["seconds"]
    return found


def summary_row(task: NlpTask, records: list[dict]) -> dict:
    """Means over texts (of a text's mean over trials) with standard errors and 95 % intervals."""
    row = {"sequences": len(records), "lossless": all(r.get("lossless", True) for r in records)}
    row["altered"] = sum(r.get("altered", False) for r in records)
    of_text: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for key, value in measures(task, record).items():
            of_text[key][record.get("row", record["index"])].append(value)
    for key, by_text in of_text.items():
        values = [math.fsum(of_trials) / len(of_trials) for of_trials in by_text.values()]
        row["texts"] = len(values)
        row[key], row[f"{key}_se"] = mean_and_se(values)
        row[f"{key}_low"], row[f"{key}_high"] = interval(values)
    if "word_log_prob" in row:
        row["perplexity"] = math.exp(-row["word_log_prob"])
    return row


def report(summary: dict) -> str:
    """What was measured, the table, and what took no part."""
    config = summary["config"]
    task, rows = NLP_TASKS[config["task"]], summary["samplers"]
    trials = f", {config['trials']} trials" if config["trials"] > 1 else ""
    title = (
        f"{config['model']}, {task.name}: {summary['num_texts']} texts of {summary['text']}{trials}, "
        f"k = {config['k']}, batches of {config['batch_size']}, {config['dtype']}; {summary['protocol']}; "
        "mean [95 % interval over texts]"
    )
    headings = {key: text for key, text in task.headings.items() if any(key in row for row in rows.values())}
    lines = [title, table(rows, headings, lambda row, key: with_interval(row, key) if key in row else "-")]
    for name, row in rows.items():
        if "perplexity" in row:
            lines.append(f"{name}: perplexity of the word {row['perplexity']:.2f}")
        if row["altered"]:
            lines.append(f"{name}: the vocabulary changes what is given in {row['altered']} of {row['sequences']}")
    lines.append(
        f"{summary['num_rows']} rows in the file: {summary['num_texts']} texts{_left_out(summary['skipped_rows'])}"
    )
    for label, of_model in summary["models"].items():
        known = of_model["max_length"]
        length = (
            f"of at most {known} tokens"
            if known
            else "of any length (how long those of its training were is not known)"
        )
        lines.append(f"{label}: texts {length}{_left_out(of_model['skipped'])}")
    return "\n".join(lines)


def _left_out(skipped: list[dict]) -> str:
    if not skipped:
        return ", none skipped"
    return f", {len(skipped)} skipped and listed in summary.json (row {skipped[0]['index']}: {skipped[0]['reason']})"
