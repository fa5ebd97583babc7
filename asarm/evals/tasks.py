"""What the evaluations fill in: packed rows with a random subset masked, and texts with one gap."""

import csv
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.datasets import SAMPLES
from ..data.sources import read_documents, resolve_path
from ..errors import DataFileError
from ..infilling import InfillTask
from ..orders import random_visible
from ..rng import generator
from .config import NlpInfillConfig

ROCSTORIES = "eval/rocstories/cloze_test_val__spring2016.csv"
SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+(?=\S)")


def mask_rows(rows: list[np.ndarray], visible_fraction: float, seed: int) -> list[InfillTask]:
    """Packed rows as tasks, each with its own random visible subset."""
    tasks = []
    for index, row in enumerate(rows):
        visible_N = random_visible(len(row), visible_fraction, generator(seed, "mask", index))
        tasks.append(InfillTask(row.tolist(), visible_N.tolist(), index))
    return tasks


@dataclass(frozen=True)
class TextGap:
    """A text with one gap: ``prefix`` + ``reference`` + ``suffix`` is the original, to the byte."""

    name: str
    prefix: str
    reference: str
    suffix: str


def read_nlp_gaps(config: NlpInfillConfig) -> tuple[str, list[TextGap]]:
    """The task's gaps, and where they come from. The gap takes the space before its first sentence with it."""
    local = os.environ.get("ASARM_DATA_DIR")
    default = Path(local or "") / ROCSTORIES
    if config.data_file is None and not (local and default.is_file()):
        name = str(SAMPLES / "stories.jsonl")
    else:
        name = config.data_file or str(default)
    stories = _read_csv(name) if name.endswith(".csv") else _read_sentences(name)
    first, last = {"rocstories-1of5": (2, 3), "rocstories-3of5": (1, 4)}[config.task]
    gaps = []
    for story, sentences in stories:
        gap = " " + " ".join(sentences[first:last])
        gaps.append(TextGap(story, " ".join(sentences[:first]), gap, " " + " ".join(sentences[last:])))
    return name, gaps


def _read_csv(name: str) -> list[tuple[str, list[str]]]:
    """The Story Cloze Test's CSV: four sentences, two endings, and which of them is right."""
    columns = [*(f"InputSentence{i}" for i in range(1, 5)), "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"]
    path = resolve_path(name)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := {"InputStoryid", "AnswerRightEnding", *columns} - set(reader.fieldnames or ()):
            raise DataFileError(f"{path} lacks the columns {sorted(missing)} of the Story Cloze Test")
        stories = []
        for number, row in enumerate(reader, 2):
            if row["AnswerRightEnding"] not in ("1", "2") or not all((row[c] or "").strip() for c in columns):
                raise DataFileError(
                    f"{path}, line {number}: an empty sentence, or an AnswerRightEnding other than 1 and 2"
                )
            ending = row[f"RandomFifthSentenceQuiz{row['AnswerRightEnding']}"]
            sentences = [*(row[c] for c in columns[:4]), ending]
            stories.append((row["InputStoryid"], [s.strip() for s in sentences]))
    if not stories:
        raise DataFileError(f"{path} holds no story")
    return stories


def _read_sentences(name: str) -> list[tuple[str, list[str]]]:
    stories = []
    for number, document in enumerate(read_documents(name), 1):
        ends = [m.end() for m in SENTENCE_END.finditer(document.text)]
        bounds = zip([0, *ends], [*ends, len(document.text)], strict=True)
        sentences = [document.text[a:b].strip() for a, b in bounds]
        if len(sentences) != 5:
            raise DataFileError(
                f"{name}, story {number} has {len(sentences)} sentences instead of 5: {document.text[:60]!r}"
            )
        stories.append((f"story-{number:03d}", sentences))
    return stories


READERS: dict[type, Callable[..., tuple[str, list[TextGap]]]] = {NlpInfillConfig: read_nlp_gaps}
