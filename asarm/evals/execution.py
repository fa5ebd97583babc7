"""From completions to pass@k: programs in the sandbox, many at a time; the estimator; controls of the whole chain.

An evaluation of code that runs nothing, or that takes every exit for a pass, still prints a number. So every run also
executes completions whose verdicts are known, and reports no score unless they come out as they must: every published
solution passes, and an empty completion and ``pass`` fail about as often as they were found to.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

from .code_config import CODE_BENCHMARKS
from .code_tasks import CodeProblem, canonical, empty, pass_statement
from .sandbox import Sandbox, Verdict

Job = tuple[CodeProblem, str]  # with a completion

CONTROLS: dict[str, Callable[[CodeProblem], str]] = {
    "control: solution": canonical,
    "control: empty": empty,
    "control: pass": pass_statement,
}
PASS_BY_CHANCE = 0.25  # of a benchmark for which it was not measured
LINES_OF_A_FUNCTION = 6  # a function's problems stand together and pass or fail together: fewer independent ones
STANDARD_ERRORS = 4
NEVER_MORE = 0.9  # however few the problems are


def execute(jobs: list[Job], sandbox: Sandbox, workers: int) -> Iterator[tuple[Job, Verdict]]:
    """Run the programs, ``workers`` at a time, with a progress bar; yields each with its verdict as it ends."""

    def run(job: Job) -> Verdict:
        problem, completion = job
        return sandbox.run(problem.program(completion), problem.test, problem.entry_point)

    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(run, job): job for job in jobs}
        for future in tqdm(as_completed(futures), total=len(jobs), unit="program", desc="execute"):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Chance that of ``k`` samples drawn without replacement from ``n``, of which ``passed`` pass, at least one does:
    the unbiased estimate of pass@k from n samples (Chen et al. 2021)."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def wilson_interval(mean: float, n: int) -> tuple[float, float]:
    """95 % score interval (Wilson 1927) of a mean of ``n`` values in [0, 1]. It takes them for zeros and ones, which
    have the largest spread at a given mean: for values in between it is on the wide side."""
    z = 1.959964
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def judge_controls(benchmark: str | None, passed: dict[str, dict[str, bool]]) -> dict:
    """What the controls say, from verdicts by control and task; ``benchmark`` is None for a file of the user's.

    Returns ``controls``: of each its ``pass_rate``; of the solutions also ``failed``, the tasks; of the other two
    ``expected`` and ``highest``, the rate up to which they are as expected. And ``objections``, one line for each thing
    that is wrong.
    """
    known = {} if benchmark is None else CODE_BENCHMARKS[benchmark].pass_by_chance
    found, wrong = {}, []
    for control, by_task in passed.items():
        rate = sum(by_task.values()) / len(by_task)
        found[control] = {"pass_rate": rate, "programs": len(by_task)}
        if control == "control: solution":
            found[control]["failed"] = failed = [task for task, ok in by_task.items() if not ok]
            if failed:
                wrong.append(f"{len(failed)} of {len(by_task)} published solutions fail: {', '.join(failed[:5])}")
            continue
        expected = known.get(control, PASS_BY_CHANCE)
        independent = max(1.0, len(by_task) / LINES_OF_A_FUNCTION)
        highest = min(NEVER_MORE, expected + STANDARD_ERRORS * math.sqrt(expected * (1 - expected) / independent))
        found[control] |= {"expected": expected, "highest": highest}
        if rate > highest:
            wrong.append(
                f"{control.removeprefix('control: ')!r} passes {rate:.1%}, which should be at most {highest:.1%}"
            )
    return {"controls": found, "objections": wrong}
