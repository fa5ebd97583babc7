"""Code infilling: problems read to the byte, pass@k against enumeration, controls that stop a wrong score, resuming."""

import gzip
import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import make_model
from datasets import Dataset
from scipy.stats import binomtest

from asarm.errors import ConfigError, DataFileError, SandboxError, TextError
from asarm.evals.code_config import CODE_BENCHMARKS, CodeInfillConfig
from asarm.evals.code_infill import alters, encode, evaluate, report
from asarm.evals.code_tasks import CodeProblem, empty_line, line_above, pass_statement, read_problems
from asarm.evals.execution import judge_controls, pass_at_k, wilson_interval
from asarm.evals.metrics import code_similarity
from asarm.evals.sandbox import Sandbox, Verdict
from asarm.runlog import read_lines
from asarm.tokenizer import TextTokenizer

CHECK = "def check(f):\n    assert f(2) == {}\n    assert f(0) == {}\n"
PROBLEMS = [
    {
        "task_id": f"T/{name}",
        "prompt": "def f(x):\n    y = x\n",
        "canonical_solution": line,
        "suffix": "    return y\n",
        "test": CHECK.format(*expected),
        "entry_point": "f",
    }
    for name, line, expected in (
        ("double", "    y = 2 * x\n", (4, 0)),
        ("square", "    y = x * x + 1\n", (5, 1)),
        ("branch", "    if x: y = 7\n", (7, 0)),
        ("minus", "    y = -x - 1\n", (-3, -1)),
    )
]


def write(path: Path, problems: list) -> str:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return str(path)


def settings(tmp_path, **more) -> CodeInfillConfig:
    file = write(tmp_path / "problems.jsonl", PROBLEMS)
    return CodeInfillConfig(**({"data_file": file, "output_dir": str(tmp_path / "out"), "workers": 2} | more))


@pytest.fixture
def executes():
    try:
        return Sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def test_problems_are_read_to_the_byte_and_errors_are_named(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(PROBLEMS[0]) + "\n\n")
    _, (problem,) = read_problems(CodeInfillConfig(data_file=str(path)))
    assert problem.program(problem.canonical_solution) == "def f(x):\n    y = x\n    y = 2 * x\n    return y\n"
    for problems, message in (
        ([PROBLEMS[0], {k: v for k, v in PROBLEMS[1].items() if k != "test"}], r"problem 2 lacks \['test'\]"),
        ([PROBLEMS[0], PROBLEMS[0]], "problem 2 repeats the task_id 'T/double'"),
        ([["no", "problem"]], "line 1: not a JSON object"),
        ([], "holds no problem"),
    ):
        with pytest.raises(DataFileError, match=message):
            read_problems(CodeInfillConfig(data_file=write(tmp_path / "bad.jsonl", problems)))


def test_problems_are_read_from_every_form_of_file(tmp_path):
    """And a damaged one is named."""
    lines = "".join(json.dumps(problem) + "\n" for problem in PROBLEMS).encode()
    packed = gzip.compress(lines, mtime=0)
    (tmp_path / "p.jsonl").write_bytes(lines)
    (tmp_path / "p.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines, asbytes=True))
    Dataset.from_list(PROBLEMS).to_parquet(str(tmp_path / "p.parquet"))
    plain, *others = (
        read_problems(CodeInfillConfig(data_file=str(tmp_path / name)))[1]
        for name in ("p.jsonl", "p.jsonl.zst", "p.parquet")
    )
    assert len(plain) == 4 and others == [plain, plain]
    for name, content in (("cut.jsonl.gz", packed[:-9]), ("bad.jsonl.gz", packed[:20] + b"xxxx" + packed[24:])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataFileError, match=f"cannot read data file .*{name}"):
            read_problems(CodeInfillConfig(data_file=str(tmp_path / name)))


def test_what_a_guesser_writes():
    problem = CodeProblem(0, "T", "def f(x):\n    if x:\n\n", "        return 1\n", "", "", "f")
    guesses = [guess(problem) for guess in (empty_line, line_above, pass_statement)]
    assert guesses == ["\n", "    if x:\n", "        pass\n"]
    within = CodeProblem(0, "T", "def f(x):\n    y =", " 1\n    return", " y\n", "", "f")
    assert [guess(within) for guess in (line_above, pass_statement)] == ["def f(x):\n", "pass\n"]


@pytest.mark.parametrize(("n", "passed"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_one_that_passes(n, passed):
    verdicts = [True] * passed + [False] * (n - passed)
    for k in range(1, n + 1):
        choices = list(itertools.combinations(verdicts, k))
        assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("passed", "n"), [(0, 12), (3, 12), (399, 1033), (5, 5)])
def test_wilson_interval_is_that_of_scipy(passed, n):
    expected = binomtest(passed, n).proportion_ci(method="wilson")
    assert wilson_interval(passed / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_likeness_against_hand_worked_cases():
    assert code_similarity("return x\n", "return x\n") == {"exact_match": 100.0, "edit_similarity": 100.0}
    assert code_similarity("abcd", "abxd") == {"exact_match": 0.0, "edit_similarity": 75.0}


def test_nothing_is_executed_unless_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Sandbox, "__init__", lambda *_: pytest.fail("a sandbox was opened"))
    summary = evaluate(settings(tmp_path))
    assert summary["execution"] is None and "nothing was executed" in report(summary)
    assert not any("pass@1" in row for row in summary["samplers"].values())


def test_samples_first_then_verdicts_and_scores(tmp_path, executes):
    config = settings(tmp_path, num_samples=3, pass_k=[1, 3], samplers=["assd"])
    evaluate(config)
    drawn = read_lines(tmp_path / "out" / "records.jsonl")
    summary = evaluate(replace(config, allow_code_execution=True))
    assert read_lines(tmp_path / "out" / "records.jsonl") == drawn, "nothing is drawn again"
    completions = {(r["sampler"], r["index"]): r for r in drawn}
    verdicts = {(r["sampler"], r["index"]): r for r in read_lines(tmp_path / "out" / "verdicts.jsonl")}
    assert completions.keys() == verdicts.keys() and len(verdicts) == 4 * 3 + 4 * 5
    tests = {problem["task_id"]: problem for problem in PROBLEMS}
    for key, record in completions.items():
        assert verdicts[key]["passed"] == passes_plainly(tests[record["name"]], record["completion"]), record
    row = summary["samplers"]["assd"]
    of_problem = [[verdicts["assd", 3 * p + s]["passed"] for s in range(3)] for p in range(4)]
    assert row["pass@1"] == pytest.approx(100 * sum(map(sum, of_problem)) / 12)
    assert row["pass@3"] == pytest.approx(100 * sum(map(any, of_problem)) / 4)
    assert row["pass@3_low"] <= row["pass@3"] <= row["pass@3_high"]
    assert "pass@3" not in summary["samplers"]["guess: line above"], "a guess is one sample"
    assert summary["execution"]["controls"]["control: solution"]["pass_rate"] == 1
    assert "sandbox: " in report(summary)
    samples = read_lines(tmp_path / "out" / "samples-assd.jsonl")
    assert [s["completion"] for s in samples] == [completions["assd", i]["completion"] for i in range(12)]
    assert {s["task_id"] for s in samples} == set(tests)


def passes_plainly(problem: dict, completion: str) -> bool:
    """The published suite's way: one program, executed here. For completions that are known to be harmless."""
    program = problem["prompt"] + completion + problem["suffix"] + "\n" + problem["test"] + "\ncheck(f)"
    try:
        exec(program, {})
    except Exception:
        return False
    return True


def test_an_empty_span_is_filled_with_nothing(tmp_path):
    """Some of the random spans are empty, and the model is told so."""
    whole = {"prompt": "def f(x):\n    return 2", "canonical_solution": "", "suffix": " * x\n", "task_id": "T/empty"}
    file = write(tmp_path / "empty.jsonl", [PROBLEMS[0] | whole, PROBLEMS[1]])
    summary = evaluate(settings(tmp_path, data_file=file, samplers=["assd", "sequential"]))
    first, second = (r for r in read_lines(tmp_path / "out" / "records.jsonl") if r["sampler"] == "sequential")
    assert first["completion"] == "" and first["exact_match"] == 100 and second["completion"] != ""
    assert summary["samplers"]["sequential"]["gap_tokens"] == second["masked"] / 2


def test_a_solution_that_fails_stops_the_score(tmp_path, executes):
    broken = [PROBLEMS[0] | {"canonical_solution": "    y = 3 * x\n"}, *PROBLEMS[1:]]
    config = settings(tmp_path, allow_code_execution=True, data_file=write(tmp_path / "broken.jsonl", broken))
    summary = evaluate(config)
    assert summary["execution"]["objections"] == ["1 of 4 published solutions fail: T/double"]
    assert not any("pass@1" in row for row in summary["samplers"].values())
    assert "no pass@k: the controls are not as expected: 1 of 4" in report(summary)


def test_an_evaluator_that_passes_everything_reports_no_score(tmp_path, monkeypatch, executes):
    monkeypatch.setattr(Sandbox, "run", lambda *_: Verdict(True, "passed", "", 0.0))
    monkeypatch.setattr(Sandbox, "_problem", lambda self: None)  # it would notice at once
    summary = evaluate(settings(tmp_path, allow_code_execution=True))
    assert "passes 100.0%, which should be at most" in summary["execution"]["objections"][0]
    assert not any("pass@1" in row for row in summary["samplers"].values())


def test_controls_allow_for_what_passes_by_chance():
    def judged(passing: int, n: int = 1033) -> list[str]:
        verdicts = {f"T/{i}": i < passing for i in range(n)}
        return judge_controls("single-line", {"control: empty": verdicts})["objections"]

    assert judged(27) == [] and judged(0) == [] and judged(60) == []
    assert judged(100) and judged(1033)
    assert judged(2, 10) == [] and judged(10, 10)


@pytest.mark.slow
def test_a_kill_in_the_middle_loses_only_the_programs_in_flight(tmp_path, executes):
    slow = [
        p | {"task_id": f"{p['task_id']}/{i}", "test": "import time\ntime.sleep(0.1)\n" + p["test"]}
        for p in PROBLEMS
        for i in range(2)
    ]
    config = settings(tmp_path, allow_code_execution=True, data_file=write(tmp_path / "slow.jsonl", slow))
    command = [sys.executable, "-m", "asarm", "eval", "code-infill", "--allow_code_execution", "--workers=2"]
    command += [f"--data_file={config.data_file}", f"--output_dir={config.output_dir}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log = tmp_path / "out" / "verdicts.jsonl"
    while not log.exists() or len(read_lines(log)) < 8:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_lines(log)
    assert 8 <= len(before) < 8 * 6
    summary = evaluate(config)
    after = {(r["sampler"], r["index"]): r for r in read_lines(log)}
    assert all(after[r["sampler"], r["index"]] == r for r in before), "what was recorded stays"
    assert summary["complete"] and len(after) == 8 * 6 and summary["execution"]["objections"] == []


@pytest.mark.slow
def test_shards_share_the_execution(tmp_path, executes):
    config = settings(tmp_path, allow_code_execution=True, num_samples=2)
    parts = [evaluate(replace(config, shard=f"{i}/2")) for i in range(2)]
    whole = evaluate(replace(config, output_dir=str(tmp_path / "whole")))
    assert [part["complete"] for part in parts] == [False, True]
    for name, row in whole["samplers"].items():
        same = {key: value for key, value in row.items() if "seconds" not in key}
        assert same == {key: parts[1]["samplers"][name][key] for key in same}


@pytest.mark.parametrize(
    "wrong",
    [{"pass_k": [2]}, {"num_samples": 0}, {"sandbox": "trust"}, {"timeout": 0}, {"benchmark": "x"}, {"workers": 0}],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CodeInfillConfig(**wrong)


def test_a_vocabulary_without_line_breaks_is_refused(tmp_path, data_dir):
    xlnet = str(data_dir / "tokenizers" / "xlnet-base-cased")
    make_model(32000, mask_token_id=6, spread=0.02).save_pretrained(tmp_path / "model")
    with pytest.raises(TextError, match="does not keep the text"):
        evaluate(settings(tmp_path, model=str(tmp_path / "model"), tokenizer=xlnet))


def test_a_vocabulary_that_changes_some_programs_is_reported(tmp_path, monkeypatch):
    """And the program that is executed, and the record's reference, are the published ones."""
    whole = TextTokenizer.encode_batch
    monkeypatch.setattr(
        TextTokenizer, "encode_batch", lambda self, texts: whole(self, [t.replace("*", "+") for t in texts])
    )
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, text: self.encode_batch([text])[0])
    summary = evaluate(settings(tmp_path))
    altered = {
        r["name"]: r["altered"] for r in read_lines(tmp_path / "out" / "records.jsonl") if r["sampler"] == "assd"
    }
    assert altered == {"T/double": True, "T/square": True, "T/branch": False, "T/minus": False}
    assert "assd: the vocabulary changes 2 programs" in report(summary)


def test_programs_longer_than_a_model_was_trained_on_are_filled_and_counted(tmp_path):
    """By the embedded model of programs; of a baseline without a recipe it is not known."""
    make_model(8192, mask_token_id=6, spread=0.02).save_pretrained(tmp_path / "model")
    long = PROBLEMS[0] | {"task_id": "T/long", "prompt": "def f(x):\n    y = x\n" * 99}
    settings_ = {"data_file": write(tmp_path / "long.jsonl", [*PROBLEMS, long]), "samplers": ["parallel"]}
    baseline = {"baselines": [str(tmp_path / "model")], "tokenizer": "tiny-code"}
    summary = evaluate(settings(tmp_path, **settings_, **baseline))
    unknown = {"trained_length": None, "longer": None}
    assert summary["models"] == {
        "tiny-code": {"trained_length": 512, "longer": 1},
        str(tmp_path / "model"): unknown,
    }
    assert all(row["sequences"] == 5 for row in summary["samplers"].values())
    warnings = [line for line in report(summary).splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: tiny-code was trained on 512 tokens at a time, and 1 of 5 programs are longer"]


def test_how_many_programs_the_map_of_the_published_checkpoint_changes(data_dir):
    """What exactly is lost is counted in test_tokenizer.py."""
    xlnet = TextTokenizer.from_pretrained(data_dir / "tokenizers" / "xlnet-base-cased", whitespace_map="code")
    _, problems = read_problems(CodeInfillConfig())
    assert sum(alters(xlnet, problem) for problem in problems) == 599
    assert sum(xlnet.decode(xlnet.encode(p.canonical_solution)) != p.canonical_solution for p in problems) == 33


@pytest.mark.usefixtures("data_dir")
def test_how_many_programs_are_longer_than_the_rows_of_tiny_codes_training():
    tokenizer = TextTokenizer.from_pretrained("tiny-code")
    assert sum(len(encode(tokenizer, problem).ids) > 512 for problem in read_problems(CodeInfillConfig())[1]) == 51


@pytest.mark.parametrize(("benchmark", "count"), [("single-line", 1033), ("multi-line", 5815)])
def test_the_published_problems_survive_the_vocabulary_to_the_byte(data_dir, benchmark, count):
    name, problems = read_problems(CodeInfillConfig(benchmark=benchmark))
    assert name.endswith(CODE_BENCHMARKS[benchmark].file) and len(problems) == count
    texts = sorted(
        {part for problem in problems[:1033] for part in (problem.prompt, problem.canonical_solution, problem.suffix)}
    )
    for model in ("tiny-code", "tiny-english"):
        tokenizer = TextTokenizer.from_pretrained(model)
        assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
        task = encode(tokenizer, problems[7])
        assert task.visible.count(False) == len(tokenizer.encode(problems[7].canonical_solution))


@pytest.mark.usefixtures("data_dir")
def test_published_solutions_pass_and_wrong_ones_fail(executes):
    """The last problem of each of 16 functions (every solution is executed in an evaluation, as a control)."""
    by_function = {p.entry_point: p for p in read_problems(CodeInfillConfig())[1]}
    for problem in list(by_function.values())[::10]:
        for completion, passes in ((problem.canonical_solution, True), ("    return object()\n", False)):
            program = problem.program(completion)
            assert executes.run(program, problem.test, problem.entry_point).passed == passes, problem.task_id
