"""The speculative-decoding comparison (Guo & Ermon 2025, table 1): the same masked sequences, every sampler.

Three steps, each going on where it was stopped: decode, let a judge read the texts, draw conclusions from the records.
What could go wrong is looked for before the first. How text becomes sequences, and what is measured, is the protocol's
(:mod:`asarm.evals.protocols`).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import yaml
from tqdm import tqdm

from ..data.datasets import load_text
from ..data.packing import pack_all
from ..density import require_memory_for_density
from ..errors import DataFileError, OutputDirError
from ..infilling import InfillTask
from ..loading import load
from ..runlog import read_lines
from ..samplers import REFERENCE
from ..tokenizer import TextTokenizer
from .config import SpeculativeConfig
from .judge import Judge
from .metrics import distinct, judge_nll_per_token, token_entropy
from .plots import draw_plots, model_of
from .protocols import PROTOCOLS, Protocol
from .records import by_key, by_system
from .run import EvalRun, EvaluatedModel, Loader
from .stats import ALPHA, FOUR_TESTS, aligned, compare, difference_tests, summarise_by_sampler, table, with_interval
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
    comparison, load_once = Comparison(config), lru_cache(maxsize=1)(load)  # for the check and for the run
    comparison.check(load_once)
    return comparison.run(load_once)


class Comparison:
    """A comparison in its folder, with its text and its judge; raises for what is wrong with these."""

    def __init__(self, config: SpeculativeConfig):
        self.config, rules = config, config.rules
        self.text, self.documents = load_text(
            config.dataset, config.data_file, config.dataset_config, config.split, as_rows=rules.as_rows
        )
        self.folder = EvalRun(config)
        self.judge = None if config.judge is None else Judge(config.judge, rules.judged_tokens)
        if self.judge is not None:
            self.readings = self.folder.second_phase("judge", {"judge_model": config.judge})

    def check(self, loader: Loader) -> None:
        """Raise whatever else would stop it later: models, draft heads, memory, too little text, another run in the
        folder. Nothing is drawn and nothing recorded."""
        for _ in self._prepared(loader):
            pass

    def run(self, loader: Loader) -> dict:
        """Do this process's share; returns what ``summary.json`` holds, where everything is done."""
        config, used = self.config, {}
        for evaluated, tasks in self._prepared(loader):
            self.folder.decode(evaluated, tasks, describer(config.rules, evaluated.tokenizer))
            used[evaluated.prefix] = len(tasks)
        if self.judge is not None:
            self._judge_texts()

        def conclude(records: dict[str, list[dict]]) -> dict:
            rows = summarise(records, config)
            draw_plots(self.folder.folder, records, rows, config.margin)
            numbers = {"num_sequences": used[""], "num_sequences_wanted": config.wanted}
            return {"samplers": rows, "text": self.text, **numbers}

        return self.folder.finish(conclude)

    def _prepared(self, loader: Loader) -> Iterator[tuple[EvaluatedModel, list[InfillTask]]]:
        """Each model, ready to decode, with its sequences."""
        config = self.config
        for evaluated in self.folder.models(loader):
            tasks = masked_sequences(config, pack_all(self.documents, evaluated.tokenizer, config.max_length))
            require_memory_for_density(evaluated.model, config.batch_size, config.max_length)
            self.folder.ready(evaluated, tasks)
            yield evaluated, tasks

    def _judge_texts(self) -> None:
        """Let the judge read what this process has decoded and not yet given it."""
        judge, batch_size = self.judge, self.config.batch_size
        todo = [r for r in self.folder.own_records() if (r["sampler"], r["index"]) not in self.readings.records]
        for r in todo:  # a text without a token is an error now, not hours later
            judge.require_tokens(r["text"], f"{r['sampler']}, sequence {r['index']}")
        for start in tqdm(range(0, len(todo), batch_size), desc="judge", unit="batch"):
            batch = todo[start : start + batch_size]
            for record, (tokens, nll) in zip(batch, judge.score([r["text"] for r in batch], batch_size), strict=True):
                reading = {"judge_tokens": tokens, "judge_nll": nll}
                if self.config.rules.entropy_by_judge:
                    reading["entropy"] = judge.entropy(record["text"])
                self.readings.add({"sampler": record["sampler"], "index": record["index"], **reading})


def masked_sequences(config: SpeculativeConfig, rows: list) -> list[InfillTask]:
    """The first full rows, as many as are wanted or there are, each with its own part of the tokens given.

    Warns where there are fewer than are wanted; raises :class:`DataFileError` where there is none.
    """
    full = [row for row in rows if len(row) == config.max_length]
    if not full and not config.rules.drops_short_row:
        full = rows
    if not full:
        raise DataFileError(
            f"the text makes no sequence of {config.max_length} tokens; give more text, or a smaller --max_length"
        )
    if len(full) < config.wanted:
        warnings.warn(
            f"{len(full)} of {config.wanted} sequences: the text makes no more of {config.max_length} tokens, and all "
            "of them are used",
            stacklevel=2,
        )
    tasks = mask_rows(full[: config.wanted], config.visible_fraction, config.seed, config.rules.given)
    if config.order == "left-to-right":
        tasks = [replace(task, visible=sorted(task.visible, reverse=True)) for task in tasks]
    return tasks


def describer(rules: Protocol, tokenizer: TextTokenizer) -> Callable[[InfillTask, list[int]], dict]:
    """What a record says of a sequence, besides its costs."""

    def describe(task: InfillTask, ids: list[int]) -> dict:
        text = tokenizer.decode(ids) if rules.spells_special_tokens else plain_text(tokenizer, ids)
        entropy = {} if rules.entropy_by_judge else {"entropy": token_entropy(ids)}
        return {**entropy, "distinct_1": distinct(ids, 1), "distinct_2": distinct(ids, 2), "text": text}

    return describe


def plain_text(tokenizer: TextTokenizer, ids: list[int]) -> str:
    """What a reader gets, and the judge: special tokens (separators of documents, as a rule) are line breaks."""
    runs = groupby(ids, key=lambda i: i in tokenizer.special_ids)
    return "\n".join(tokenizer.decode(list(run)) for special, run in runs if not special)


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
        for name in others if reference and config.rules.tested else ():
            rows[name]["tests"] = {
                key: difference_tests(*([measures[key](r) for r in of] for of in (records[name], reference)))
                for key in config.rules.tested
            }
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
    number, wanted = summary["num_sequences"], summary["num_sequences_wanted"]
    title = (
        f"{config['model']}: {number} sequences{f' ({wanted} asked for)' * (number < wanted)} of "
        f"{config['max_length']} tokens of {summary['text']}, {1 - config['visible_fraction']:.0%} masked, "
        f"{config['order']}, k = {config['k']}, batches of {config['batch_size']}, {config['dtype']}, protocol "
        f"{config['protocol']}; mean [95 % bootstrap interval over sequences]"
    )
    parts = [title, table(rows, headings, with_interval)]
    for key, label in COMPARED.items():
        found = {name: row["versus_sequential"][key] for name, row in rows.items() if key in row["versus_sequential"]}
        if found:
            parts += ["", f"{label}, difference from {REFERENCE}:", comparison_table(found)]
    for key in PROTOCOLS[config["protocol"]].tested:
        found = {name: row["tests"][key] for name, row in rows.items() if "tests" in row}
        if found:
            parts += ["", f"{HEADINGS.get(key, 'PPL')}, p-values that it differs from {REFERENCE}:", tests_table(found)]
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


def tests_table(found: dict[str, dict]) -> str:
    lines = [["sampler", *(name.replace("_", " ") for name in FOUR_TESTS)]]
    lines += [
        [name, *("-" if p is None else f"{p:.2g}" for p in (row[test] for test in FOUR_TESTS))]
        for name, row in found.items()
    ]
    return aligned(lines)
