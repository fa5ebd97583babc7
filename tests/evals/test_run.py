"""The frame of all evaluations: shards, several systems in one run, merging, partial runs."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
from conftest import make_model

from asarm.config import SamplerConfig
from asarm.errors import ConfigError, OutputDirError
from asarm.evals.config import SpeculativeConfig
from asarm.evals.records import RecordLog
from asarm.evals.shards import Shard
from asarm.evals.speculative import evaluate
from asarm.runlog import read_lines
from asarm.tokenizer import TextTokenizer

SMALL = {
    "dataset": "samples",
    "num_sequences": 5,
    "max_length": 24,
    "samplers": ["assd", "parallel:3"],
    "batch_size": 2,
}
ARRAY_JOB = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"}


def array(task: int, tasks: list[int], step: int = 1) -> dict[str, str]:
    """What Slurm tells a job of an array of ``tasks``."""
    values = {"ID": task, "COUNT": len(tasks), "MIN": min(tasks), "MAX": max(tasks), "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def records(folder) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_lines(folder / "records.jsonl")]


@pytest.mark.parametrize(
    ("setting", "environment", "shard"),
    [
        (None, {}, (0, 1)),
        ("1/3", {"RANK": "0", "WORLD_SIZE": "8"}, (1, 3)),
        (None, {"RANK": "2", "WORLD_SIZE": "8"}, (2, 8)),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}, (2, 3)),
        (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        (None, {"SLURM_ARRAY_TASK_ID": "3"}, (0, 1)),
        (None, array(14, [*range(0, 15, 2)], 2), (7, 8)),
        (None, array(5, [3, 5, 7], 2), (1, 3)),
        (None, array(9, [9]), (0, 1)),
        ("1/2", array(5, [3, 5]), (1, 2)),
        (None, ARRAY_JOB | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2)),
        (None, ARRAY_JOB | {"RANK": "0", "WORLD_SIZE": "4", "SLURM_NTASKS": "1"}, (4, 8)),
        (None, ARRAY_JOB | {"RANK": "3", "WORLD_SIZE": "4", "SLURM_NTASKS": "1"}, (7, 8)),
    ],
)
def test_a_shard_comes_from_the_setting_or_from_whoever_started_the_process(setting, environment, shard):
    assert Shard.of(setting, environment) == Shard(*shard)


@pytest.mark.parametrize("setting", ["2/2", "0/0", "1", "a/b", "-1/2"])
def test_a_shard_that_does_not_exist_is_refused(setting):
    with pytest.raises(ConfigError, match="shard"):
        Shard.of(setting, {})


@pytest.mark.parametrize("tasks", [[3, 5], [1, 2, 3, 7]])
def test_jobs_of_an_array_with_gaps_are_told_to_name_their_shard(tasks):
    for task in tasks:
        with pytest.raises(ConfigError, match=f"job {task} of an array of {len(tasks)} .* has no gaps.*--shard"):
            Shard.of(None, array(task, tasks))


def test_shards_hold_every_item_once():
    items = list(range(11))
    taken = [item for index in range(4) for item in Shard(index, 4).take(items)]
    assert sorted(taken) == items


@pytest.mark.usefixtures("without_figures")
def test_processes_that_share_a_run_leave_what_one_process_leaves(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    one = evaluate(SpeculativeConfig(output_dir=str(whole), **SMALL))
    first = evaluate(SpeculativeConfig(output_dir=str(shared), shard="0/2", **SMALL))
    assert not first["complete"] and (first["recorded"], first["expected"]) == (6, 10)
    assert not (shared / "summary.json").exists(), "a partial run has no summary"
    second = evaluate(SpeculativeConfig(output_dir=str(shared), shard="1/2", **SMALL))
    assert second["complete"] and records(shared) == records(whole)
    assert sorted(path.name for path in shared.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in SMALL["samplers"]:
        of_one, of_two = one["samplers"][name], second["samplers"][name]
        assert {k: v for k, v in of_one.items() if "seconds" not in k} == {
            k: v for k, v in of_two.items() if "seconds" not in k
        }
    again = evaluate(SpeculativeConfig(output_dir=str(shared), shard="0/2", **SMALL))
    assert again["samplers"] == second["samplers"], "nothing is left to do, and nothing is lost"


@pytest.mark.slow
def test_processes_at_the_same_time(tmp_path):
    """Both may come to the end at once; what is left is complete whoever is last. All have one thread, as whatever a
    test starts: on some processors the last digits of a log-probability depend on their number."""
    settings = [f"--{k}={','.join(v) if isinstance(v, list) else v}" for k, v in SMALL.items()]
    command = [sys.executable, "-m", "asarm", "eval", "speculative", "--output_dir", str(tmp_path / "out"), *settings]
    processes = [subprocess.Popen([*command, f"--shard={i}/2"], stdout=subprocess.PIPE, text=True) for i in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("NFE/token" in output for output in outputs) >= 1
    evaluate(SpeculativeConfig(output_dir=str(tmp_path / "whole"), **SMALL))
    assert records(tmp_path / "out") == records(tmp_path / "whole")


@pytest.mark.parametrize("phase", ["records", "judge"])
def test_of_two_runs_that_start_in_one_folder_the_first_to_record_has_it(tmp_path, phase):
    """Both found it empty; shards of the first are welcome, and the other one's settings and models are not."""
    first, second, shard, model = (
        RecordLog(tmp_path, {"k": k}, Shard(i, 4), phase) for i, k in enumerate((5, 4, 5, 5))
    )
    for log, weights in ((first, "a"), (shard, "a"), (model, "b")):
        log.identify("model", {"weights": weights})
    record = {"sampler": "assd", "index": 0}
    first.add(record)
    shard.add(record)
    for log, message in ((second, "k: 5 there, 4 now"), (model, "weights: 'a' there, 'b' now")):
        with pytest.raises(OutputDirError, match=message):
            log.add(record)
        assert not log.path.exists()
    (noted,) = (tmp_path / "identity").iterdir()
    assert json.loads(noted.read_text()) == {"model": {"weights": "a"}}


@pytest.mark.usefixtures("without_figures")
def test_a_baseline_runs_beside_the_model_with_the_samplers_it_has(tmp_path):
    folder = tmp_path / "baseline"
    vocab_size = len(TextTokenizer.from_pretrained("tiny-english"))
    make_model(vocab_size, mask_token_id=6, spread=0.02).save_pretrained(folder)
    config = SpeculativeConfig(
        output_dir=str(tmp_path / "out"),
        baselines=[str(folder)],
        tokenizer="tiny-english",
        **SMALL | {"samplers": ["sequential", "assd-head:4"]},
    )
    summary = evaluate(config)
    assert list(summary["samplers"]) == ["sequential", "assd-head:4", f"{folder} sequential"]
    own, baseline = summary["samplers"]["sequential"], summary["samplers"][f"{folder} sequential"]
    assert own["log_prob_per_token"] > baseline["log_prob_per_token"] + 1, "random weights know no English"
    noted = [json.loads(path.read_text()) for path in (tmp_path / "out" / "identity").iterdir()]
    assert [name for names in noted for name in names if name == f"{folder} model"]


def in_threads(calls: list) -> list[str]:
    """Call all at the same time; what each came to: ``done``, or why it was refused."""
    together = Barrier(len(calls))

    def outcome(call) -> str:
        together.wait()
        try:
            call()
        except OutputDirError as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def begin(folder, shard: int, name: str, weights: object) -> None:
    """What a process does up to its first record."""
    log = RecordLog(folder, {}, Shard(shard, 8))
    log.identify(name, {"weights": weights})
    log.add({"sampler": "assd", "index": shard})


def test_processes_that_start_together_lose_nobodys_identity(tmp_path):
    assert in_threads([partial(begin, tmp_path, i, f"model {i}", i) for i in range(8)]) == ["done"] * 8
    refused = in_threads([partial(begin, tmp_path, i, f"model {i}", "other") for i in range(8)])
    assert all(f"weights: {i} there, 'other' now" in why for i, why in enumerate(refused))


def test_of_processes_that_start_together_with_other_weights_one_goes_on(tmp_path):
    outcomes = in_threads([partial(begin, tmp_path, i, "model", i) for i in range(8)])
    assert outcomes.count("done") == 1
    kept = outcomes.index("done")
    assert all(f"weights: {kept} there, {i} now" in outcomes[i] for i in range(8) if i != kept)


def test_a_sampler_may_name_its_own_k():
    assert SamplerConfig.named("assd+one-pass:8", k=5) == SamplerConfig("assd", k=8, one_pass=True)
    assert SamplerConfig.named("assd", k=5).k == 5
    for name in ("assd:x", "assd:0", "assd:1.5"):
        with pytest.raises(ConfigError, match="k must be"):
            SamplerConfig.named(name)
