"""Choosing between endings by their joint log-probability given the context (HellaSwag; Zellers et al. 2019).

Three ways to make endings of different lengths comparable: the sum, per token and per byte.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from ..density import joint_log_prob, require_memory_for_density
from ..errors import TextError
from ..infilling import InfillTask, collate
from .causal import CausalLM, CausalTask
from .nlp_items import ChoiceItem, Skipped, fitting
from .nlp_tasks import NlpTask, resolve
from .run import EvalRun, EvaluatedModel


@dataclass(frozen=True)
class ChoiceTask:
    """A choice in a model's tokens: the context with each ending, and the number of tokens of each ending."""

    item: ChoiceItem
    sequences: list[InfillTask] | list[CausalTask]
    tokens: list[int]
    length: int

    @property
    def index(self) -> int:
        return self.item.index


def choose(
    run: EvalRun, task: NlpTask, evaluated: EvaluatedModel, items: list[ChoiceItem], max_length: int | None
) -> list[Skipped]:
    """Choose with an any-subset model: the ending is masked at the end, so its ascending order is left to right.
    Returns what was left out."""
    model = evaluated.model

    def encode(item: ChoiceItem) -> ChoiceTask:
        masked = [evaluated.tokenizer.encode_gaps([item.context, ""], [ending]) for ending in item.endings]
        tokens = [len(m.gaps[0]) for m in masked]
        if not all(tokens):
            raise TextError("an ending has no token in this vocabulary")
        return ChoiceTask(item, [InfillTask.of(m) for m in masked], tokens, max(len(m.ids) for m in masked))

    def log_probs(tasks: list[InfillTask]) -> list[float]:
        return joint_log_prob(model, *collate(tasks)).tolist()

    tasks, skipped = fitting(items, encode, max_length)
    if tasks:
        require_memory_for_density(
            model, max(run.config.batch_size, len(tasks[0].tokens)), max(t.length for t in tasks)
        )
        record_choices(run, f"{evaluated.prefix}joint", tasks, log_probs)
    return skipped


def choose_causal(
    run: EvalRun, task: NlpTask, model: CausalLM, items: list[ChoiceItem], max_length: int | None
) -> list[Skipped]:
    """The same with a left-to-right model."""

    def encode(item: ChoiceItem) -> ChoiceTask:
        sequences = [model.task(item.index, item.context, ending) for ending in item.endings]
        tokens = [len(task.continuation) for task in sequences]
        return ChoiceTask(item, sequences, tokens, max(task.length for task in sequences))

    def log_probs(tasks: list[CausalTask]) -> list[float]:
        return [log_prob for _, log_prob, *_ in model.score(tasks, len(tasks))]

    tasks, skipped = fitting(items, encode, max_length)
    if tasks:
        record_choices(run, model.system, tasks, log_probs)
    return skipped


def record_choices(
    run: EvalRun, system: str, tasks: list[ChoiceTask], log_probs: Callable[[list], list[float]]
) -> None:
    """Score the endings of every choice that is left to do; as many choices at a time as make up a batch."""
    size = max(1, run.config.batch_size // len(tasks[0].sequences))
    todo = run.todo(system, tasks)
    with tqdm(total=len(todo), unit="choice", desc=system) as bar:
        for start in range(0, len(todo), size):
            batch, began = todo[start : start + size], time.perf_counter()
            scores = iter(log_probs([sequence for task in batch for sequence in task.sequences]))
            seconds = (time.perf_counter() - began) / len(batch)
            for task in batch:
                record = chosen(task.item, [next(scores) for _ in task.sequences], task.tokens)
                run.add(system, task.index, record | {"seconds": seconds})
            bar.update(len(batch))


def chosen(item: ChoiceItem, log_probs: list[float], tokens: list[int]) -> dict:
    """The ending that each way to compare prefers (the first of equals), and whether it is the right one."""
    sizes = {
        "sum": [1] * len(log_probs),
        "token": tokens,
        "byte": [len(ending.strip().encode()) for ending in item.endings],
    }
    record = {"label": item.label, "log_probs": log_probs, "tokens": tokens, "bytes": sizes["byte"]}
    for way, size in sizes.items():
        values = [log_prob / n for log_prob, n in zip(log_probs, size, strict=True)]
        choice = values.index(max(values))
        record |= {f"choice_{way}": choice, f"accuracy_{way}": 100.0 * (choice == item.label)}
    return record


def guess_choices(run: EvalRun, task: NlpTask, items: list[ChoiceItem]) -> None:
    """Record what can be had without a model."""
    for system, guesser in task.guessers.items():
        choices = dict(zip((item.index for item in items), resolve(guesser)(items, run.config.seed), strict=True))
        for item in run.todo(system, items):
            choice = choices[item.index]
            record = {"label": item.label, "choice": choice, "accuracy_guess": 100.0 * (choice == item.label)}
            run.add(system, item.index, record)
