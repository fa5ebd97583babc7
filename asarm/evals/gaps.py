"""Filling the gaps of texts, with any-subset models and with left-to-right ones; scoring what was hidden.

A gap is as long as its reference, in each model's own tokens, unless the task says how long.
"""

import time
from dataclasses import dataclass, replace

from tqdm import tqdm

from ..config import SamplerConfig
from ..density import joint_log_prob, require_memory_for_density
from ..errors import TextError
from ..infilling import InfillTask, collate, without_special_tokens
from ..sampling.decoding import law_of
from ..tokenizer import TextTokenizer
from .causal import CausalLM, CausalTask
from .metrics import rouge
from .nlp_items import GapItem, Skipped, fitting
from .nlp_tasks import NlpTask, resolve
from .run import EvalRun, EvaluatedModel


@dataclass(frozen=True)
class EncodedItem:
    """A text with gaps in a model's tokens; ``altered`` where the vocabulary does not keep what is around the gaps."""

    item: GapItem
    task: InfillTask
    gaps: list[range]
    altered: bool

    @property
    def length(self) -> int:
        return len(self.task.ids)


def encode_item(tokenizer: TextTokenizer, item: GapItem) -> EncodedItem:
    """Each piece and each reference is encoded by itself, as a user's text with a gap is."""
    references = item.references or (0,) * len(item.lengths)
    gaps = [length or reference for length, reference in zip(item.lengths, references, strict=True)]
    masked = tokenizer.encode_gaps(item.pieces, gaps)
    if not all(masked.gaps):
        raise TextError("the gap is empty: its reference has no token")
    return EncodedItem(item, InfillTask.of(masked, item.index), masked.gaps, not _keeps(tokenizer, item.pieces))


def _keeps(tokenizer: TextTokenizer, texts: tuple[str, ...]) -> bool:
    try:
        for text in texts:
            tokenizer.check_lossless(text)
    except TextError:
        return False
    return True


def fill(
    run: EvalRun, task: NlpTask, evaluated: EvaluatedModel, items: list[GapItem], max_length: int | None
) -> list[Skipped]:
    """Fill with each of the model's samplers, and score what was hidden if the task does. Returns what was left out."""
    tokenizer, config, n_rows = evaluated.tokenizer, run.config, rows_of(items)
    encoded, skipped = fitting(items, lambda item: encode_item(tokenizer, item), max_length)
    if not encoded:
        return skipped
    require_memory_for_density(evaluated.model, config.batch_size, max(e.length for e in encoded))
    by_index = {e.item.index: e for e in encoded}

    def describe(of: InfillTask, ids: list[int]) -> dict:
        e = by_index[of.index % n_rows]
        fills = [tokenizer.decode_gap(ids, gap) for gap in e.gaps]
        return described(task, e.item, fills) | {"trial": of.index // n_rows, "altered": e.altered}

    run.decode(evaluated, in_trials([e.task for e in encoded], config.trials, n_rows), describe)
    if task.scores_reference:
        score_references(run, evaluated, [e.task for e in encoded])
    return skipped


def fill_causal(
    run: EvalRun, task: NlpTask, model: CausalLM, items: list[GapItem], max_length: int | None
) -> list[Skipped]:
    """The same with a left-to-right model, which is given only what precedes the gap."""
    config, by_index, n_rows = run.config, {item.index: item for item in items}, rows_of(items)
    tasks, skipped = fitting(items, lambda item: causal_task(model, item), max_length)
    if not tasks:
        return skipped
    law = model.law(temperature=config.temperature, greedy=config.greedy, top_k=config.top_k, top_p=config.top_p)
    todo = run.todo(model.system, in_trials(tasks, config.trials, n_rows))
    drawn = model.generate(todo, law, config.seed, config.batch_size)
    for of, ids, seconds in tqdm(drawn, total=len(todo), desc=model.system):
        record = described(task, by_index[of.index % n_rows], [model.decode(ids)])
        cost = {"masked": len(ids), "nfe": len(ids), "seconds": seconds, "trial": of.index // n_rows}
        run.add(model.system, of.index, record | cost)
    if task.scores_reference:
        todo = run.todo(f"{model.system} greedy", tasks)
        for of, log_prob, right, seconds in tqdm(model.score(todo, config.batch_size), total=len(todo)):
            record_score(run, f"{model.system} greedy", of.index, len(of.continuation), log_prob, right, seconds)
    return skipped


def causal_task(model: CausalLM, item: GapItem) -> CausalTask:
    if len(item.lengths) > 1:
        raise TextError("a left-to-right model fills one gap, not several")
    return model.task(item.index, item.pieces[0], item.lengths[0] or item.references[0])


def rows_of(items: list[GapItem]) -> int:
    """How far apart the indices of two trials of a text are; the same for every model."""
    return items[-1].index + 1


def in_trials(tasks: list, trials: int, n_rows: int) -> list:
    """Every task in every trial; the first trial's random numbers are those of a run that has no other."""
    return [replace(task, index=task.index + trial * n_rows) for trial in range(trials) for task in tasks]


def described(task: NlpTask, item: GapItem, fills: list[str]) -> dict:
    """A record's texts, and what the task measures of them."""
    texts = {"completion": "".join(fills), "reference": "".join(item.references)}
    return {"name": item.name, "row": item.index} | texts | resolve(task.measure)(item, fills)


def rouge_of_fills(item: GapItem, fills: list[str]) -> dict[str, float]:
    """ROUGE of what fills the gaps, where there are references."""
    return rouge("".join(item.references), "".join(fills)) if item.references else {}


def word_of_fills(item: GapItem, fills: list[str]) -> dict[str, float]:
    """Whether the word is right."""
    return {"exact_match": 100.0 * ("".join(fills).strip() == "".join(item.references).strip())}


def filled_text(item: GapItem, fills: list[str]) -> dict[str, str | float]:
    """The whole text, and ROUGE of what fills its gaps."""
    filled = "".join(a + b for a, b in zip(item.pieces, [*fills, ""], strict=True))
    return {"filled": filled} | rouge_of_fills(item, fills)


def score_references(run: EvalRun, evaluated: EvaluatedModel, tasks: list[InfillTask]) -> None:
    """The log-probability of what was hidden, and whether greedy decoding gives it: all in one pass, because each of
    its tokens is then the most likely one after those before it."""
    greedy = law_of(evaluated.model, without_special_tokens(SamplerConfig(greedy=True), evaluated.tokenizer))
    system, size = f"{evaluated.prefix}greedy", run.config.batch_size
    todo = run.todo(system, tasks)
    for start in tqdm(range(0, len(todo), size), desc=system):
        batch, began = todo[start : start + size], time.perf_counter()
        ids_BN, order = collate(batch)
        logp_B = joint_log_prob(evaluated.model, ids_BN, order).tolist()
        right_B = joint_log_prob(evaluated.model, ids_BN, order, greedy).isfinite().tolist()
        seconds = (time.perf_counter() - began) / len(batch)
        for task, log_prob, right in zip(batch, logp_B, right_B, strict=True):
            record_score(run, system, task.index, task.visible.count(False), log_prob, right, seconds)


def record_score(
    run: EvalRun, system: str, index: int, tokens: int, log_prob: float, right: bool, seconds: float
) -> None:
    scores = {"word_log_prob": log_prob, "exact_match": 100.0 * right}
    run.add(system, index, {"row": index, "masked": tokens, "seconds": seconds, **scores})


def guess_fills(run: EvalRun, task: NlpTask, items: list[GapItem]) -> None:
    """Record what can be had without a model."""
    for system, guesser in task.guessers.items():
        guesses = dict(zip((item.index for item in items), resolve(guesser)(items, run.config.seed), strict=True))
        for item in run.todo(system, items):
            run.add(system, item.index, described(task, item, [guesses[item.index]]))
