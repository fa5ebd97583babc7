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
from ..tokenizer import split_at_gaps
from .nlp_tasks import NlpTask, resolve

SENTENCES = [f"InputSentence{i}" for i in range(1, 5)]
ENDINGS = {"1": "RandomFifthSentenceQuiz1", "2": "RandomFifthSentenceQuiz2"}
COLUMNS = {"InputStoryid", *SENTENCES, *ENDINGS.values(), "AnswerRightEnding"}
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


def read_items(task: NlpTask, data_file: str | None, limit: int | None) -> tuple[str, list[Item], list[Skipped]]:
    """Where they come from, the task's items, and the rows that are none; of the first ``limit`` rows."""
    name = data_file or _default_file(task)
    path = resolve_path(name)
    rows = (_csv_rows if path.suffix == ".csv" else iterate_records)(path)
    parse, items, skipped = resolve(task.parse), [], []
    for index, (where, row) in enumerate(islice(rows, limit)):
        try:
            items.append(parse(index, to_object(row, where)))
        except UserError as error:
            skipped.append(Skipped(index, str(error)))
    if not items:
        why = f"; the first row: {skipped[0].reason}" if skipped else ""
        raise DataFileError(f"{path} holds nothing for the task {task.name}{why}")
    return name, items, skipped


def _default_file(task: NlpTask) -> str:
    local = os.environ.get("ASARM_DATA_DIR")
    if task.sample_file and not (local and (Path(local) / task.data_file).is_file()):
        return str(SAMPLES / task.sample_file)
    return f"$ASARM_DATA_DIR/{task.data_file}"


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


def story_without_its_third_sentence(index: int, row: dict) -> GapItem:
    return _story(index, row, hidden=slice(2, 3))


def story_without_its_middle(index: int, row: dict) -> GapItem:
    """Without sentences 2 to 4."""
    return _story(index, row, hidden=slice(1, 4))


def _story(index: int, row: dict, hidden: slice) -> GapItem:
    name, sentences = _cloze_story(row) if "InputStoryid" in row else _plain_story(index, row)
    pieces = (" ".join(sentences[: hidden.start]), " " + " ".join(sentences[hidden.stop :]))
    return GapItem(index, name, pieces, (" " + " ".join(sentences[hidden]),))


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


def passage_without_its_last_word(index: int, row: dict) -> GapItem:
    word = " " + _text(row.get("continuation"), "continuation").strip()
    return GapItem(index, str(index), (_text(row.get("context"), "context").rstrip(), ""), (word,))


def choice_of_endings(index: int, row: dict) -> ChoiceItem:
    endings, label = row.get("endings"), str(row.get("label"))
    if not isinstance(endings, list) or len(endings) < 2:
        raise DataFileError(f"endings must be a list of two or more, got {endings!r}")
    if label not in map(str, range(len(endings))):
        raise DataFileError(f"label must be the number of an ending, 0 to {len(endings) - 1}, got {label!r}")
    endings = tuple(" " + _text(ending, "an ending").strip() for ending in endings)
    return ChoiceItem(index, str(index), _text(row.get("ctx"), "ctx").rstrip(), endings, int(label))


def masked_text(index: int, row: dict) -> GapItem:
    """``text`` with ``<mask>`` and ``<mask:n>``; a bare ``<mask>`` is as long as its reference, if there is one."""
    pieces, spans, lengths = split_at_gaps(_text(row.get("text"), "text"))
    references = row.get("references", [row["reference"]] if "reference" in row else [])
    if not isinstance(references, list) or (references and len(references) != len(lengths)):
        raise TextError(f"{len(lengths)} gap(s) need as many references, got {references!r}")
    spaces = (" " * span.startswith(" ") for span in spans)  # a gap swallows the space before it
    references = tuple(
        space + _text(r, "a reference").lstrip(" ") for space, r in zip(spaces, references, strict=False)
    )
    lengths = tuple(length or (None if references else 1) for length in lengths)
    return GapItem(index, str(row.get("id", index)), tuple(pieces), references, lengths)


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
