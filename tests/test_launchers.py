"""The launchers: as bash runs them, and as sbatch does, from a copy in another folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted(ROOT.glob("_run_*.sh"))


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
