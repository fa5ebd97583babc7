"""What the evaluations fill in: packed rows with a random subset masked, and programs with one gap."""

import gzip
import json
from dataclasses import dataclass

import numpy as np

from ..data.sources import resolve_path
from ..errors import DataFileError
from ..infilling import InfillTask
from ..orders import random_visible
from ..rng import generator
from .config import CODE_BENCHMARKS, CodeInfillConfig


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


def read_code_gaps(config: CodeInfillConfig) -> tuple[str, list[TextGap]]:
    """The benchmark's gaps, and where they come from."""
    published = f"HumanEval-{CODE_BENCHMARKS[config.benchmark]}Infilling.jsonl.gz"
    name = config.data_file or f"$ASARM_DATA_DIR/eval/humaneval_infill/{published}"
    path = resolve_path(name)
    keys = ("task_id", "prompt", "canonical_solution", "suffix")
    gaps = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                record = json.loads(line)
                if missing := [key for key in keys if not isinstance(record.get(key), str)]:
                    raise DataFileError(
                        f"{path}, line {number} lacks {missing}; expected the published benchmark's form"
                    )
                gaps.append(TextGap(*(record[key] for key in keys)))
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataFileError(f"cannot read {path}: {error}") from error
    if not gaps:
        raise DataFileError(f"{path} holds no problem")
    return name, gaps
