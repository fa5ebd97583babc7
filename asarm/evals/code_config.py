"""Settings of code infilling; like :mod:`asarm.config`, it imports nothing heavy."""

from dataclasses import dataclass, field

from ..command_config import WORDS
from ..config import require
from .config import InfillEvalConfig


@dataclass(frozen=True)
class CodeBenchmark:
    """A published benchmark: its file, and the share of its problems that pass with a completion that knows nothing
    (lines that the tests do not miss, such as a branch that they never take), by control."""

    file: str
    pass_by_chance: dict[str, float] = field(default_factory=dict)


CODE_BENCHMARKS = {
    "single-line": CodeBenchmark(
        "HumanEval-SingleLineInfilling.jsonl.gz",
        {"control: empty": 27 / 1033, "control: pass": 37 / 1033},  # measured on the whole file (docs/code_infill.md)
    ),
    "multi-line": CodeBenchmark("HumanEval-MultiLineInfilling.jsonl.gz"),
    "random-span": CodeBenchmark("HumanEval-RandomSpanInfilling.jsonl.gz"),
    "random-span-light": CodeBenchmark("HumanEval-RandomSpanInfillingLight.jsonl.gz"),
}
SANDBOXES = ("auto", "bwrap", "namespaces", "process")


@dataclass(frozen=True, kw_only=True)
class CodeInfillConfig(InfillEvalConfig):
    """Infill lines and spans of HumanEval's programs: pass@k, exact match, edit similarity.

    Args:
        model: embedded name (tiny-code), folder or Hub id.
        output_dir: receives config.yaml, records.jsonl and summary.json; a run that was stopped goes on there
            (default: runs/code_infill/BENCHMARK).
        benchmark: single-line, multi-line, random-span or random-span-light.
        data_file: JSON lines, compressed or not, or Parquet of the benchmark's form (default: the published file in
            ASARM_DATA_DIR/eval/humaneval_infill).
        num_samples: completions of each problem.
        pass_k: report pass@k for these k, from num_samples samples.
        allow_code_execution: run the completed programs against their tests, in a sandbox. Without it nothing is
            executed, and there is no pass@k.
        sandbox: auto, bwrap, namespaces or process; see asarm/evals/sandbox.py for what each holds.
        timeout: CPU seconds that a program may take (and ten times as many by the clock).
        workers: programs executed at the same time (default: one a core).
    """

    model: str = "tiny-code"
    output_dir: str | None = None
    benchmark: str = "single-line"
    data_file: str | None = None
    num_samples: int = 1
    pass_k: list[int] = field(default_factory=lambda: [1], metadata=WORDS)
    allow_code_execution: bool = False
    sandbox: str = "auto"
    timeout: int = 3
    workers: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.benchmark in CODE_BENCHMARKS, "benchmark", self.benchmark, f"one of {', '.join(CODE_BENCHMARKS)}")
        self.default_output_dir(f"runs/code_infill/{self.benchmark}")
        require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        for k in self.pass_k:
            require(1 <= k <= self.num_samples, "pass_k", k, f"from 1 to num_samples, which is {self.num_samples}")
        require(self.sandbox in SANDBOXES, "sandbox", self.sandbox, f"one of {', '.join(SANDBOXES)}")
        require(self.timeout >= 1, "timeout", self.timeout, "at least 1 (whole seconds)")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "at least 1")
