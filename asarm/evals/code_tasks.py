"""The HumanEval infilling benchmark (Bavarian et al. 2022): programs with a gap, and the tests they must pass."""

from dataclasses import dataclass
from pathlib import Path

from ..data.sources import iterate_records, resolve_path, to_object
from ..errors import DataFileError
from .code_config import CODE_BENCHMARKS, CodeInfillConfig

FOLDER = "$ASARM_DATA_DIR/eval/humaneval_infill"
KEYS = ("task_id", "prompt", "canonical_solution", "suffix", "test", "entry_point")


@dataclass(frozen=True)
class CodeProblem:
    """``prompt`` + ``canonical_solution`` + ``suffix`` is the program, to the byte; ``test`` defines ``check``, to be
    called with the program's ``entry_point``."""

    index: int
    task_id: str
    prompt: str
    canonical_solution: str
    suffix: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        return self.prompt + completion + self.suffix

    @property
    def indentation(self) -> str:
        """Of the solution's first line, or of the gap's place where it begins within a line."""
        line = self.prompt.rpartition("\n")[2] + self.canonical_solution.partition("\n")[0]
        return line[: len(line) - len(line.lstrip())]


def read_problems(config: CodeInfillConfig) -> tuple[str, list[CodeProblem]]:
    """The file's name, and the first ``limit`` problems of the published file or of any records of its form."""
    name = config.data_file or f"{FOLDER}/{CODE_BENCHMARKS[config.benchmark].file}"
    path = resolve_path(name)
    records = [to_object(record, where) for where, record in iterate_records(path)]
    if not records:
        raise DataFileError(f"{path} holds no problem")
    return name, _checked(path, records)[: config.limit]


def _checked(path: Path, records: list[dict]) -> list[CodeProblem]:
    problems, seen = [], set()
    for number, record in enumerate(records, 1):
        values = [record.get(key) for key in KEYS]
        if missing := [key for key, value in zip(KEYS, values, strict=True) if not isinstance(value, str)]:
            raise DataFileError(f"{path}, problem {number} lacks {missing}; expected the published benchmark's form")
        problem = CodeProblem(number - 1, *values)
        if problem.task_id in seen:
            raise DataFileError(f"{path}, problem {number} repeats the task_id {problem.task_id!r}")
        seen.add(problem.task_id)
        problems.append(problem)
    return problems


def empty(problem: CodeProblem) -> str:
    """Nothing at all."""
    return ""


def pass_statement(problem: CodeProblem) -> str:
    """``pass``, where the solution stands."""
    return f"{problem.indentation[len(_begun(problem)) :]}pass\n"


def empty_line(problem: CodeProblem) -> str:
    """An empty line (or, where the gap begins within a line, that line's end)."""
    return "\n"


def line_above(problem: CodeProblem) -> str:
    """The last line that is not empty before the gap, again."""
    lines = [line for line in problem.prompt.split("\n")[:-1] if line.strip()]
    return lines[-1] + "\n" if lines else "\n"


def canonical(problem: CodeProblem) -> str:
    """The published solution."""
    return problem.canonical_solution


def _begun(problem: CodeProblem) -> str:
    """What of the gap's first line the prompt holds."""
    return problem.prompt.rpartition("\n")[2]
