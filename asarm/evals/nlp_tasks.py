"""The natural-language tasks by name: one record each, which is all that the evaluation knows of a task.

Imports nothing heavy: the command line checks names with it. A new task is a function that reads a row of its file
(:mod:`asarm.evals.nlp_items`), what is measured of a fill, and a :func:`register` call.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConfigError

TOLD_LENGTH = "each model is told the gap's true length in its own tokens"
COST = {
    "gap_tokens": "gap (tokens)",
    "nfe_per_token": "NFE/token",
    "log_prob_per_token": "log-prob/token",
    "seconds_per_sequence": "s/text",
}
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rouge_mean": "mean"}
WORD = {"exact_match": "% right", "word_log_prob": "log-prob of the word"}
CHOICE = {
    "accuracy_sum": "% right, by sum",
    "accuracy_token": "per token",
    "accuracy_byte": "per byte",
    "accuracy_guess": "of a guess",
}


@dataclass(frozen=True)
class NlpTask:
    """A task as the evaluation sees it. Functions may be given as ``module:function``, imported when they are used.

    Args:
        name: on the command line.
        protocol: what is hidden and how it is asked for, said in every report.
        parse: (index, row of the file) -> :class:`~asarm.evals.nlp_items.GapItem`, or ``ChoiceItem`` with ``choices``;
            raises a ``UserError`` for a row that cannot be used.
        headings: measure -> column of the table, in order. The costs of sampling are measured for every task.
        measure: (item, fills) -> what a record says of the fills; not used with ``choices``.
        guessers: label -> (items, seed) -> a guess for each item: the text of its gap, or the number of an ending.
        data_file: the task's file in ASARM_DATA_DIR; None where the user has to name one.
        sample_file: of eval_datasets/samples, used where ASARM_DATA_DIR does not have ``data_file``.
        choices: an ending is chosen by its joint log-probability, instead of a gap filled.
        scores_reference: what was hidden is scored too, and whether greedy decoding gives it.
    """

    name: str
    protocol: str
    parse: str | Callable
    headings: dict[str, str]
    measure: str | Callable | None = None
    guessers: dict[str, str | Callable] = field(default_factory=dict)
    data_file: str | None = None
    sample_file: str | None = None
    choices: bool = False
    scores_reference: bool = False


def resolve(function: str | Callable) -> Callable:
    """A function of a record, imported if need be."""
    return pkgutil.resolve_name(function) if isinstance(function, str) else function


NLP_TASKS: dict[str, NlpTask] = {}


def register(task: NlpTask) -> None:
    """Make a task known by its name to ``eval nlp-infill``."""
    if task.name in NLP_TASKS:
        raise ConfigError(f"there is a task {task.name!r} already; give the new one another name")
    NLP_TASKS[task.name] = task


_ITEMS, _MEASURES, _GUESSERS = "asarm.evals.nlp_items:", "asarm.evals.gaps:", "asarm.evals.guessers:"


def _story(name: str, hidden: str, parse: str) -> NlpTask:
    """A story of five sentences, some of them hidden."""
    return NlpTask(
        name,
        protocol=f"{hidden} hidden; {TOLD_LENGTH}",
        parse=_ITEMS + parse,
        headings=ROUGE | COST,
        measure=_MEASURES + "rouge_of_fills",
        guessers={
            "guess: sentence before": _GUESSERS + "sentence_before",
            "guess: all given sentences": _GUESSERS + "all_sentences",
            "guess: next story's": _GUESSERS + "next_story",
        },
        data_file="eval/rocstories/cloze_test_val__spring2016.csv",
        sample_file="stories.jsonl",
    )


for _task in (
    _story("rocstories-1of5", "sentence 3", "story_without_its_third_sentence"),
    _story("rocstories-3of5", "sentences 2-4", "story_without_its_middle"),
    NlpTask(
        "lambada",
        protocol=f"the last word hidden; {TOLD_LENGTH}",
        parse=_ITEMS + "passage_without_its_last_word",
        headings=WORD | COST,
        measure=_MEASURES + "word_of_fills",
        guessers={
            "guess: most frequent word": _GUESSERS + "frequent_word",
            "guess: word of the context": _GUESSERS + "context_word",
        },
        data_file="eval/lambada/lambada_openai.jsonl",
        scores_reference=True,
    ),
    NlpTask(
        "hellaswag",
        protocol="the ending with the highest joint log-probability",
        parse=_ITEMS + "choice_of_endings",
        headings=CHOICE | {"seconds_per_sequence": "s/text"},
        guessers={
            "guess: random": _GUESSERS + "random_ending",
            "guess: longest": _GUESSERS + "longest_ending",
            "guess: shortest": _GUESSERS + "shortest_ending",
        },
        data_file="eval/hellaswag/hellaswag_val.jsonl",
        choices=True,
    ),
    NlpTask(
        "infill-file",
        protocol="gaps as long as the file says, or as their references",
        parse=_ITEMS + "masked_text",
        headings=ROUGE | COST,
        measure=_MEASURES + "filled_text",
    ),
):
    register(_task)
