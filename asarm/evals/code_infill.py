"""Code infilling: lines and spans of HumanEval's programs, filled in and, if the user allows it, executed (pass@k).

The model is told the true number of tokens of each gap, that of the published solution, as in the published protocol
(Guo & Ermon 2025). Completions are what was drawn, to the byte: nothing is cut off.

Two phases, each going on where it was stopped: completions (``records.jsonl``) and their verdicts (``verdicts.jsonl``).
A run may sample first, and be started again with ``--allow_code_execution``.
"""

import json
import math
import os
import re
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from ..density import require_memory_for_density
from ..infilling import InfillTask
from ..loading import trained_length
from ..runlog import write_atomic
from ..tokenizer import MaskedText, TextTokenizer
from .code_config import CodeInfillConfig
from .code_tasks import CodeProblem, empty_line, line_above, read_problems
from .execution import CONTROLS, execute, judge_controls, pass_at_k, wilson_interval
from .metrics import code_similarity
from .run import EvalRun, EvaluatedModel
from .sandbox import Limits, Sandbox
from .stats import mean_and_se, table, with_interval, with_se

GUESSERS = {"guess: empty line": empty_line, "guess: line above": line_above}
COST = {
    "gap_tokens": lambda r: r["masked"],
    "nfe_per_token": lambda r: r["nfe"] / max(r["masked"], 1),
    "log_prob_per_token": lambda r: r["log_prob"] / max(r["masked"], 1),
    "seconds_per_sequence": lambda r: r["seconds"],
}
LIKENESS = {key: (lambda r, key=key: r[key]) for key in ("exact_match", "edit_similarity")}
HEADINGS = {
    "exact_match": "exact match (%)",
    "edit_similarity": "edit similarity (%)",
    "gap_tokens": "gap (tokens)",
    "nfe_per_token": "NFE/token",
    "log_prob_per_token": "log-prob/token",
    "seconds_per_sequence": "s/sequence",
}
INDENTED = "def f(x):\n    return x\n"
WARNING = (
    "warning: --allow_code_execution runs programs that a model wrote. They run in a sandbox ({mode}; network: "
    "{network}, files: {files}), which is not proof against everything: see asarm/evals/sandbox.py"
)


def evaluate(config: CodeInfillConfig) -> dict:
    """Run, or go on with, the evaluation; returns what ``summary.json`` holds."""
    source, problems = read_problems(config)
    sandbox = open_sandbox(config) if config.allow_code_execution else None
    run = EvalRun(config)
    lengths = {}
    for evaluated in run.models():
        label = evaluated.prefix.strip() or config.model
        lengths[label] = fill(run, evaluated.without_special_tokens(), problems)
    for system, complete in (GUESSERS | CONTROLS).items():
        for problem in run.todo(system, problems):
            run.add(system, problem.index, described(problem, complete(problem)))
    if sandbox:
        record_verdicts(run, problems, sandbox)

    def summarise(records: dict[str, list[dict]]) -> dict:
        write_samples(run.folder, records)
        rows = {system: costs_and_likeness(of) for system, of in records.items() if system not in CONTROLS}
        summary = {"samplers": rows, "text": source, "num_texts": len(problems), "models": lengths, "execution": None}
        if sandbox:
            summary["execution"] = {"sandbox": sandbox.describe()} | add_scores(config, rows, records)
        return summary

    return run.finish(summarise)


def open_sandbox(config: CodeInfillConfig) -> Sandbox:
    """A sandbox that works, before any long work, and the warning."""
    sandbox = Sandbox(config.sandbox, Limits(cpu=config.timeout, wall=10.0 * config.timeout))
    print(WARNING.format(**sandbox.describe()), file=sys.stderr)
    return sandbox


def fill(run: EvalRun, evaluated: EvaluatedModel, problems: list[CodeProblem]) -> dict[str, int | None]:
    """Draw and record every problem's completions. Sample s of problem p has the index p * num_samples + s. Returns how
    long the rows of the model's training were (None: not known), and how many programs are longer; those are filled
    like the rest, or it would be another benchmark.

    Raises :class:`TextError` for a vocabulary without line breaks and indentation. One that changes some programs all
    the same (XLNet's, with its whitespace map) only shows the model changed text, and the records say so.
    """
    n, tokenizer = run.config.num_samples, evaluated.tokenizer
    tokenizer.check_lossless(INDENTED)
    encoded = [encode(tokenizer, problem) for problem in problems]
    require_memory_for_density(evaluated.model, run.config.batch_size, max(len(masked.ids) for masked in encoded))
    tasks = [InfillTask.of(masked, p * n + s) for p, masked in enumerate(encoded) for s in range(n)]
    changed = [alters(tokenizer, problem) for problem in problems]

    def describe(task: InfillTask, ids: list[int]) -> dict:
        p = task.index // n
        completion = tokenizer.decode_gap(ids, encoded[p].gaps[0])
        return {"altered": changed[p], **described(problems[p], completion)}

    run.decode(evaluated, tasks, describe)
    trained = trained_length(evaluated.model)
    return {
        "trained_length": trained,
        "longer": sum(len(masked.ids) > trained for masked in encoded) if trained else None,
    }


def alters(tokenizer: TextTokenizer, problem: CodeProblem) -> bool:
    """Whether the vocabulary changes any byte of the program."""
    parts = (problem.prompt, problem.canonical_solution, problem.suffix)
    return any(tokenizer.decode(tokenizer.encode(part)) != part for part in parts)


def encode(tokenizer: TextTokenizer, problem: CodeProblem) -> MaskedText:
    """The program's tokens, the solution's masked; each of the three parts is encoded by itself, as a user's text with
    a gap is."""
    return tokenizer.encode_gaps([problem.prompt, problem.suffix], [problem.canonical_solution])


def described(problem: CodeProblem, completion: str) -> dict:
    """What a record says of a completion."""
    reference = problem.canonical_solution
    likeness = code_similarity(reference, completion)
    return {"name": problem.task_id, **likeness, "completion": completion, "reference": reference}


def record_verdicts(run: EvalRun, problems: list[CodeProblem], sandbox: Sandbox) -> None:
    """Execute this process's share of the completions that have no verdict; equal programs are run once."""
    log = run.second_phase("verdicts", {"mode": sandbox.mode, "limits": asdict(sandbox.limits)})
    by_name = {problem.task_id: problem for problem in problems}
    waiting = defaultdict(list)
    for record in run.own_records():
        if (key := (record["sampler"], record["index"])) not in log.records:
            waiting[by_name[record["name"]], record["completion"]].append(key)
    for job, verdict in execute(list(waiting), sandbox, run.config.workers or len(os.sched_getaffinity(0))):
        for system, index in waiting[job]:
            log.add({"sampler": system, "index": index, **asdict(verdict)})


def costs_and_likeness(records: list[dict]) -> dict:
    """Means over problems (of a problem's mean over its samples) with standard errors; costs only of what was drawn."""
    row = {"sequences": len(records), "lossless": all(record.get("lossless", True) for record in records)}
    for key, measure in (LIKENESS | COST if "nfe" in records[0] else LIKENESS).items():
        by_problem = defaultdict(list)
        for record in records:
            by_problem[record["name"]].append(measure(record))
        row[key], row[f"{key}_se"] = mean_and_se([math.fsum(v) / len(v) for v in by_problem.values()])
    return row | {"altered": len({record["name"] for record in records if record.get("altered")})}


def add_scores(config: CodeInfillConfig, rows: dict[str, dict], records: dict[str, list[dict]]) -> dict:
    """Judge the controls and, unless they show that something is wrong, add pass@k to the rows."""
    passed = {system: verdicts_by_task(of_system) for system, of_system in records.items()}
    controls = {name: {task: all(v) for task, v in passed[name].items()} for name in CONTROLS}
    judged = judge_controls(None if config.data_file else config.benchmark, controls)
    if not judged["objections"]:
        for system, row in rows.items():
            row |= scores(passed[system], [k for k in config.pass_k if k == 1 or system not in GUESSERS])
    timed_out = sum(record["outcome"] == "timed out" for of_system in records.values() for record in of_system)
    return judged | {"timed_out": timed_out}


def verdicts_by_task(records: list[dict]) -> dict[str, list[bool]]:
    verdicts = defaultdict(list)
    for record in records:
        verdicts[record["name"]].append(record["passed"])
    return verdicts


def scores(passed: dict[str, list[bool]], pass_k: list[int]) -> dict:
    """pass@k in percent, with its 95 % interval over problems."""
    row = {}
    for k in pass_k:
        mean = math.fsum(pass_at_k(len(v), sum(v), k) for v in passed.values()) / len(passed)
        low, high = wilson_interval(mean, len(passed))
        row |= {f"pass@{k}": 100 * mean, f"pass@{k}_low": 100 * low, f"pass@{k}_high": 100 * high}
    return row


def write_samples(folder: Path, records: dict[str, list[dict]]) -> None:
    """``samples-SYSTEM.jsonl``: task_id and completion, as the benchmark's own evaluator reads them."""
    for system, of_system in records.items():
        samples = [{"task_id": record["name"], "completion": record["completion"]} for record in of_system]
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_atomic(folder / f"samples-{re.sub(r'[^A-Za-z0-9+.-]+', '_', system)}.jsonl", text)


def report(summary: dict) -> str:
    """What was measured, the table, and what the controls say."""
    config, execution = summary["config"], summary["execution"]
    title = (
        f"{config['model']}, {config['benchmark']}: {summary['num_texts']} problems of {summary['text']}, "
        f"{config['num_samples']} sample(s) each, k = {config['k']}, batches of {config['batch_size']}, "
        f"{config['dtype']}; the model is told the length of the published solution in tokens; mean +- standard error, "
        "pass@k with its 95 % interval"
    )
    rows = summary["samplers"]
    headings = {f"pass@{k}": f"pass@{k} (%)" for k in config["pass_k"]} | HEADINGS
    headings = {key: text for key, text in headings.items() if any(key in row for row in rows.values())}
    lines = [title, table(rows, headings, cell)]
    lines += [
        f"{system}: the vocabulary changes {row['altered']} programs" for system, row in rows.items() if row["altered"]
    ]
    lines += [
        f"warning: {model} was trained on {of['trained_length']} tokens at a time, and {of['longer']} of "
        f"{summary['num_texts']} programs are longer"
        for model, of in summary["models"].items()
        if of["longer"]
    ]
    if execution is None:
        return "\n".join([*lines, "no pass@k: nothing was executed; --allow_code_execution does that"])
    lines += [f"no pass@k: the controls are not as expected: {problem}" for problem in execution["objections"]]
    controls = [f"{name} {of['pass_rate']:.1%}" for name, of in execution["controls"].items()]
    sandbox = execution["sandbox"]
    lines.append(
        f"passing: {', '.join(controls)}; sandbox: {sandbox['mode']} (network: {sandbox['network']}), "
        f"{execution['timed_out']} programs timed out"
    )
    return "\n".join(lines)


def cell(row: dict, key: str) -> str:
    if key not in row:
        return "-"
    return with_interval(row, key) if key.startswith("pass@") else with_se(row, key)
