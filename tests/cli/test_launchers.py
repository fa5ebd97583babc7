"""The launchers: as bash runs them, and as sbatch does, from a copy in another folder. Under a real Slurm:
scripts/slurm_smoke.sh."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import mostly_slow

from asarm.cli import COMMANDS, EVALS, _make_config, build_parser

ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(ROOT.glob("_run_*.sh"))
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def environment(**extra):
    """The running interpreter's environment as the active one; nothing is installed."""
    prefix = Path(sys.prefix)
    return os.environ | {
        "VIRTUAL_ENV": str(prefix),
        "PATH": f"{prefix / 'bin'}:{os.environ['PATH']}",
        "ASARM_NO_INSTALL": "1",
        **extra,
    }


@pytest.mark.parametrize("path", [*LAUNCHERS, *ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_shell_files_parse(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.name)
def test_a_launcher_is_short_strict_and_a_batch_script(path):
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH ")
    assert "set -euo pipefail" in text and '"$@"' in text
    assert "#SBATCH --output=logs/" in text and (ROOT / "logs" / ".gitkeep").is_file()
    assert text.count("\n") < 30 and os.access(path, os.X_OK)
    assert "#SBATCH --requeue\n" in text and "#SBATCH --open-mode=append\n" in text
    assert ("--signal=B:USR1" in text) == (path.name == "_run_training.sh")  # who answers it with a checkpoint


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.name)
@pytest.mark.parametrize("how", ["bash", "sbatch"])
def test_a_launcher_forwards_its_arguments(path, how, tmp_path):
    script, extra = path, {}
    if how == "sbatch":  # Slurm runs a copy from its spool folder and says where the job was submitted
        script, extra = tmp_path / "slurm_script", {"SLURM_SUBMIT_DIR": str(ROOT)}
        shutil.copy(path, script)

    def launch(argument):
        command = ["bash", str(script), argument]
        env = environment(**extra)
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)

    done = launch("--help")
    assert done.returncode == 0, done.stderr
    assert "--output_dir" in done.stdout
    failed = launch("--nonsense")
    assert failed.returncode == 2 and "nonsense" in failed.stderr


def test_a_copy_that_cannot_find_the_repository_says_so(tmp_path):
    shutil.copy(LAUNCHERS[0], tmp_path / "slurm_script")
    done = subprocess.run(
        ["bash", str(tmp_path / "slurm_script")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode != 0 and "run the launcher from the repository" in done.stderr


def test_set_up_installs_once(tmp_path):
    """With a pip that only writes down what it is asked: the first call installs, the second does not."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python"
    fake.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    env = environment(VIRTUAL_ENV=str(tmp_path), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", ASARM_NO_INSTALL="0")
    for _ in range(2):
        assert subprocess.run(["bash", str(ROOT / "scripts" / "setup.sh")], env=env, check=False).returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert calls.count("pip install") == 2 and "requirements.txt" in calls and "--editable" in calls


# What stands in for Python: it writes down its arguments, then ends with END, or when a signal comes, with 75.
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
if [ -n "${END:-}" ]; then exit "$END"; fi
trap 'kill $!; exit 75' USR1 TERM
sleep 60 &
echo ready
wait
"""
# What stands in for Slurm: it writes down what is asked, and says that the job is in STATE.
SLURM = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $1" in
    squeue*) echo "$STATE" ;;
    "scontrol show") printf 'first\\nsecond\\n' ;;
    srun*) while [ "$1" != python ]; do shift; done; exec "$@" ;;
esac
"""


class Machine:
    """A folder of stand-ins first on the PATH, and what they were called with."""

    def __init__(self, folder: Path):
        self.calls = folder / "calls"
        self.calls.touch()
        (folder / "bin").mkdir()
        for name, text in {"python": PYTHON, "squeue": SLURM, "scontrol": SLURM, "srun": SLURM}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.path = f"{folder / 'bin'}:{os.environ['PATH']}"

    def start(self, *arguments: str, launcher: str = "_run_training.sh", **extra: str) -> subprocess.Popen:
        env = environment(CALLS=str(self.calls), PATH=self.path, ASARM_PROCESSES="1") | extra
        command = ["bash", str(ROOT / launcher), *arguments]
        return subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
        )

    def run(self, *arguments: str, **extra: str) -> tuple[int, list[str]]:
        """Exit status of a launcher whose program ends by itself, and all calls."""
        process = self.start(*arguments, **{"END": "0"} | extra)
        process.communicate(timeout=300)
        return process.returncode, self.calls.read_text().splitlines()

    def stop(self, number: int, **extra: str) -> tuple[int, list[str]]:
        """The same of one that gets a signal while its program runs."""
        process = self.start(**extra)
        while "ready" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=300)
        return process.returncode, self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_reaches_python_and_its_status_comes_back(machine, number):
    assert machine.stop(number) == (75, ["-m asarm train"])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda n: n.name)
def test_a_job_that_stopped_at_a_checkpoint_is_requeued(machine, number):
    status, calls = machine.stop(number, SLURM_JOB_ID="7", STATE="RUNNING")
    assert status == 75 and calls[-1] == "scontrol requeue 7"


def test_a_job_that_is_being_cancelled_is_not_requeued(machine):
    status, calls = machine.stop(signal.SIGTERM, SLURM_JOB_ID="7", STATE="COMPLETING")
    assert status == 75 and not any("requeue" in call for call in calls)


@pytest.mark.parametrize(("end", "requeued"), [("0", 0), ("1", 0), ("2", 0), ("137", 0), ("143", 0), ("138", 1)])
def test_no_other_end_is_requeued_but_that_by_usr1_before_the_first_step(machine, end, requeued):
    status, calls = machine.run(END=end, SLURM_JOB_ID="7", STATE="RUNNING")
    assert status == int(end) and calls.count("scontrol requeue 7") == requeued


def test_usr1_while_the_environment_is_set_up_requeues(machine):
    """Nothing runs yet that could answer it."""
    (Path(machine.path.split(":")[0]) / "nvidia-smi").symlink_to("/bin/true")  # then Python is asked to count GPUs
    process = machine.start(ASARM_PROCESSES="", SLURM_JOB_ID="7", STATE="RUNNING")
    while "-c import torch" not in machine.calls.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    for child in psutil.Process(process.pid).children(recursive=True):  # the count ends
        child.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 138 and "scontrol requeue 7" in machine.calls.read_text()


def test_only_a_restarted_training_job_resumes(machine):
    assert machine.run("--seed", "1", SLURM_RESTART_COUNT="0")[1][-1] == "-m asarm train --seed 1"
    assert machine.run("--seed", "1", SLURM_RESTART_COUNT="2")[1][-1] == "-m asarm train --seed 1 --resume auto"
    evaluation = machine.run(launcher="_run_speculative_decoding.sh", SLURM_RESTART_COUNT="2")
    assert evaluation[1][-1] == "-m asarm eval speculative"


def test_several_nodes_meet_at_the_first(machine):
    job = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "[a-b]", "SLURM_CPUS_PER_TASK": "8"}
    status, calls = machine.run("--seed", "1", ASARM_PROCESSES="4", **job)
    assert status == 0
    assert "scontrol show hostnames [a-b]" in calls
    srun, launch = calls[-2:]
    assert srun.startswith("srun --nodes=2 --ntasks=2 --cpus-per-task=8 ") and srun.endswith(launch)
    assert "--num_machines 2 --num_processes 8 --main_process_ip first --main_process_port 22345 " in launch
    assert "--num_cpu_threads_per_process 2 " in launch, "eight for four processes"
    assert launch.endswith(" -m asarm train --seed 1")


def test_several_processes_on_one_machine_need_no_slurm(machine):
    calls = machine.run(ASARM_PROCESSES="2")[1]
    assert len(calls) == 1 and "--num_machines 1 --num_processes 2 " in calls[0] and "accelerate_launch.py" in calls[0]


WORKER = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
pathlib.Path(f"ready-{rank}-of-{os.environ['WORLD_SIZE']}").touch()
while True:
    time.sleep(0.05)
    if pathlib.Path("fail").exists() and rank == "1":
        sys.exit(3)
"""


ENDS = [("USR1", 75), ("INT", 9), ("fail", 3), ("kill", 128 + signal.SIGKILL)]


@pytest.mark.parametrize(("what", "status"), mostly_slow(ENDS, quick=[("USR1", 75)]))
def test_accelerate_launch_passes_signals_on_and_gives_the_status_back(tmp_path, what, status):
    """With two real processes; one that fails or is killed ends the other. Ctrl-C reaches every process of the
    terminal, which is nothing to them: the launcher sends a SIGTERM after it."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, str(ROOT / "scripts" / "accelerate_launch.py"), "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", "0", "-m", "worker"]
    env = environment(PYTHONPATH=str(tmp_path))
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, process_group=0)
    for rank in range(2):
        while not (tmp_path / f"ready-{rank}-of-2").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    if what == "USR1":
        process.send_signal(signal.SIGUSR1)
    elif what == "INT":
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
    elif what == "kill":
        os.kill(workers[0], signal.SIGKILL)
    else:
        (tmp_path / "fail").touch()
    process.communicate(timeout=300)
    assert process.returncode == status
    assert len(workers) == 2 and not any(map(psutil.pid_exists, workers))


@pytest.mark.slow
def test_two_processes_without_a_gpu_are_one_run(tmp_path):
    command = ["bash", str(ROOT / "_run_training.sh"), "--config", "configs/train/smoke.yaml", "--optimizer.steps", "2"]
    env = environment(ASARM_PROCESSES="2", CUDA_VISIBLE_DEVICES="")
    subprocess.run([*command, "--output_dir", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, check=True)
    assert json.loads((tmp_path / "provenance.json").read_text())["processes"] == 2
    assert (tmp_path / "final" / "model.safetensors").exists()


LAUNCHED = {launcher.name: re.search(r'asarm_launch (.*) "', launcher.read_text())[1].split() for launcher in LAUNCHERS}


def settings_of(command: list[str], options: list[str]):
    """What a command makes of its options, read and checked as the command line does it."""
    commands = EVALS if command[0] == "eval" else COMMANDS
    parser = build_parser("asarm", "", commands)
    parsed = parser.instantiate(parser.parse_args([command[-1], *options]))
    return _make_config(commands[command[-1]][0], vars(parsed[command[-1]]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_opens_with_a_command_that_reads_it(path):
    """Its head names the command; that command's settings are filled from it and pass their checks."""
    head = path.read_text().split("\noutput_dir:")[0]
    words = next(line for line in head.splitlines() if str(path.relative_to(ROOT)) in line).split()
    command = next((LAUNCHED[word] for word in words if word in LAUNCHED), None) or [words[words.index("asarm") + 1]]
    settings_of(command, ["--config", str(path)])


def printed_evaluations() -> list[tuple[list[str], list[str]]]:
    """Command and options of every evaluation in a block of shell commands of the README and the documents."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for number, word in enumerate(words):
                    if word in LAUNCHED and LAUNCHED[word][0] == "eval":
                        found.append((LAUNCHED[word], words[number + 1 :]))
                    elif words[number : number + 2] == ["asarm", "eval"]:
                        found.append((words[number + 1 : number + 3], words[number + 3 :]))
    return found


def test_no_two_printed_evaluations_want_the_same_folder(monkeypatch):
    """Each runs as printed, whichever ran before it; a second one in the same folder would be refused."""
    monkeypatch.chdir(ROOT)
    runs = {}
    for command, options in printed_evaluations():
        config = settings_of(command, options)
        if getattr(config, "replot", None) is None:
            assert runs.setdefault(config.output_dir, config) == config, (command, options)
    assert len(runs) >= 14
