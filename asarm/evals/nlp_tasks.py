"""What the natural-language evaluations work on: stories, last words, choices of endings, texts with masks.

A row of a file that cannot be used is skipped, with its number and the reason; items and skipped rows together are the
file's rows. Whatever is wrong with the file as a whole is a :class:`~asarm.errors.DataFileError`.
"""

import csv
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..data.datasets import SAMPLES
from ..data.sources import iterate_records, resolve_path, to_object
from ..errors import DataFileError, TextError, UserError
from ..tokenizer import GAP, gap_length, require_gap

DATA_FILES = {
    "rocstories-1of5": "eval/rocstories/cloze_test_val__spring2016.csv",
    "rocstories-3of5": "eval/rocstories/cloze_test_val__spring2016.csv",
    "lambada": "eval/lambada/lambada_openai.jsonl",
    "hellaswag": "eval/hellaswag/hellaswag_val.jsonl",
}
SENTENCES = [f"InputSentence{i}" for i in range(1, 5)]
ENDINGS = {"1": "RandomFifthSentenceQuiz1", "2": "RandomFifthSentenceQuiz2"}
COLUMNS = {"InputStoryid", *SENTENCES, *ENDINGS.values(), "AnswerRightEnding"}
HIDDEN = {"rocstories-1of5": (2, 3), "rocstories-3of5": (1, 4)}
SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+(?=\S)")


@dataclass(frozen=True)
class GapItem:
    """A text with gaps: ``pieces`` is what is given around them, one more than there are gaps.

    A gap is as long as ``lengths`` says, or as its reference where that is None. A reference has the space before it.
    """

    index: int
    name: str
    pieces: tuple[str, ...]
    references: tuple[str, ...]
    lengths: tuple[int | None, ...] = (None,)


@dataclass(frozen=True)
class ChoiceItem:
    """A context, possible continuations (each with the space before it), and which of them is right."""

    index: int
    name: str
    context: str
    endings: tuple[str, ...]
    label: int


Item = GapItem | ChoiceItem


@dataclass(frozen=True)
class Skipped:
    """A row or item that takes no part, and why."""

    index: int
    reason: str


def read_items(task: str, data_file: str | None, limit: int | None) -> tuple[str, list[Item], list[Skipped]]:
    """Where they come from, the task's items, and the rows that are none; of the first ``limit`` rows."""
    name = data_file or _default_file(task)
    path = resolve_path(name)
    rows = (_csv_rows if path.suffix == ".csv" else iterate_records)(path)
    items, skipped = [], []
    for index, (where, row) in enumerate(islice(rows, limit)):
        try:
            items.append(PARSERS[task](index, to_object(row, where)))
        except UserError as error:
            skipped.append(Skipped(index, str(error)))
    if not items:
        why = f"; the first row: {skipped[0].reason}" if skipped else ""
        raise DataFileError(f"{path} holds nothing for the task {task}{why}")
    return name, items, skipped


def _default_file(task: str) -> str:
    file = DATA_FILES[task]
    local = os.environ.get("ASARM_DATA_DIR")
    if task in HIDDEN and not (local and (Path(local) / file).is_file()):
        return str(SAMPLES / "stories.jsonl")
    return f"$ASARM_DATA_DIR/{file}"


def _csv_rows(path: Path) -> list[tuple[str, dict]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFileError(f"cannot read {path}: {error}") from error
    if missing := COLUMNS - set(reader.fieldnames or ()):
        raise DataFileError(f"{path} lacks the columns {sorted(missing)} of the Story Cloze Test")
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataFileError(f"{key} must be a text that is not empty, got {value!r}")
    return value


def _story(task: str) -> Callable[[int, dict], GapItem]:
    first, last = HIDDEN[task]

    def parse(index: int, row: dict) -> GapItem:
        name, sentences = _cloze_story(row) if "InputStoryid" in row else _plain_story(index, row)
        pieces = (" ".join(sentences[:first]), " " + " ".join(sentences[last:]))
        return GapItem(index, name, pieces, (" " + " ".join(sentences[first:last]),))

    return parse


def _cloze_story(row: dict) -> tuple[str, list[str]]:
    """Of the Story Cloze Test: four sentences, two endings, and which of them is right."""
    if None in row or None in row.values():
        raise DataFileError("the row has not as many cells as the header")
    if row["AnswerRightEnding"] not in ENDINGS:
        raise DataFileError(f"AnswerRightEnding must be 1 or 2, got {row['AnswerRightEnding']!r}")
    columns = [*SENTENCES, ENDINGS[row["AnswerRightEnding"]]]
    return row["InputStoryid"], [_text(row[column], column).strip() for column in columns]


def _plain_story(index: int, row: dict) -> tuple[str, list[str]]:
    text = _text(row.get("text"), "text")
    sentences = [sentence.strip() for sentence in split_sentences(text)]
    if len(sentences) != 5:
        raise DataFileError(f"{len(sentences)} sentences instead of 5: {text[:60]!r}")
    return str(row.get("id", index)), sentences


def split_sentences(text: str) -> list[str]:
    """At white space after a full stop, question or exclamation mark; together they are the text."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def _last_word(index: int, row: dict) -> GapItem:
    word = " " + _text(row.get("continuation"), "continuation").strip()
    return GapItem(index, str(index), (_text(row.get("context"), "context").rstrip(), ""), (word,))


def _choice(index: int, row: dict) -> ChoiceItem:
    endings, label = row.get("endings"), str(row.get("label"))
    if not isinstance(endings, list) or len(endings) < 2:
        raise DataFileError(f"endings must be a list of two or more, got {endings!r}")
    if label not in map(str, range(len(endings))):
        raise DataFileError(f"label must be the number of an ending, 0 to {len(endings) - 1}, got {label!r}")
    endings = tuple(" " + _text(ending, "an ending").strip() for ending in endings)
    return ChoiceItem(index, str(index), _text(row.get("ctx"), "ctx").rstrip(), endings, int(label))


def _masked_text(index: int, row: dict) -> GapItem:
    """``text`` with ``<mask>`` and ``<mask:n>``; a bare ``<mask>`` is as long as its reference, if there is one."""
    text = _text(row.get("text"), "text")
    require_gap(text)
    gaps = list(GAP.finditer(text))
    references = row.get("references", [row["reference"]] if "reference" in row else [])
    if not isinstance(references, list) or (references and len(references) != len(gaps)):
        raise TextError(f"{len(gaps)} gap(s) need as many references, got {references!r}")
    lengths = tuple(gap_length(gap) or (None if references else 1) for gap in gaps)
    spaces = (" " * gap[0].startswith(" ") for gap in gaps)  # a gap swallows the space before it
    references = tuple(
        space + _text(r, "a reference").lstrip(" ") for space, r in zip(spaces, references, strict=False)
    )
    bounds = [0, *(bound for gap in gaps for bound in gap.span()), len(text)]
    pieces = tuple(text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True))
    return GapItem(index, str(row.get("id", index)), pieces, references, lengths)


PARSERS: dict[str, Callable[[int, dict], Item]] = {
    **{task: _story(task) for task in HIDDEN},
    "lambada": _last_word,
    "hellaswag": _choice,
    "infill-file": _masked_text,
}


def fitting(items: list[Item], encode: Callable, max_length: int | None) -> tuple[list, list[Skipped]]:
    """The items in a model's tokens, and those that it cannot be asked: longer than ``max_length``, say."""
    found, skipped = [], []
    for item in items:
        try:
            encoded = encode(item)
            if max_length and encoded.length > max_length:
                raise TextError(f"{encoded.length} tokens are more than max_length {max_length}")
            found.append(encoded)
        except UserError as error:
            skipped.append(Skipped(item.index, str(error)))
    return found, skipped
