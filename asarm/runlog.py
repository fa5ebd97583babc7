"""What a run leaves behind: folders and files that are whole or absent, records line by line, provenance."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from .errors import OutputDirError


def prepare_output_dir(name: str) -> Path:
    """Create the folder and prove that it can be written, before any long work starts."""
    path = Path(os.path.expanduser(os.path.expandvars(name)))
    probe = path / f".write-test-{uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OutputDirError(
            f"cannot write to output_dir {str(path)!r}: {error}; choose another with --output_dir"
        ) from error
    return path


def write_atomic(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old contents or the new ones."""
    os.replace(_write_beside(path, text), path)


def write_json(path: Path, value: object) -> None:
    write_atomic(path, _as_json(value))


def create_json(path: Path, value: object) -> bool:
    """Write a file as a whole unless there is one; whether there was none, which of several processes one is told."""
    partial = _write_beside(path, _as_json(value))
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def _as_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _write_beside(path: Path, text: str) -> Path:
    """The text on the disk, to be put at ``path``, under a name that no other call has; process numbers repeat from
    machine to machine."""
    partial = path.with_name(f"{path.name}.partial-{uuid4().hex}")
    with open(partial, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return partial


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``final``, and the place of what had it, when it is complete and on the
    disk."""
    partial = final.with_name(f".partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in (path for path in partial.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    removed = _without_name(final) if final.exists() else None
    os.replace(partial, final)
    if removed is not None:
        shutil.rmtree(removed)


def restore_folder(final: Path) -> None:
    """Give a folder its name back that a kill in :func:`whole_folder` left without it, before the new one had it."""
    removed = _removed(final)
    if final.exists():
        shutil.rmtree(removed, ignore_errors=True)
    elif removed.exists():
        os.replace(removed, final)


def remove_folder(folder: Path) -> None:
    """Remove a folder, which has no longer its name while only a part of it is there."""
    shutil.rmtree(_without_name(folder))


def _removed(folder: Path) -> Path:
    return folder.with_name(f".removed-{folder.name}")


def _without_name(folder: Path) -> Path:
    shutil.rmtree(_removed(folder), ignore_errors=True)
    os.replace(folder, _removed(folder))
    return _removed(folder)


def append_line(path: Path, record: dict) -> None:
    """Append one JSON record and hand it to the operating system."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The JSON records of a file, without a last line that is not complete (torn by a kill, or being written)."""
    return [json.loads(line) for line in _whole_lines(path.read_bytes()).split(b"\n") if line]


def cut_torn_line(path: Path) -> None:
    """Make a file that a kill may have cut short fit to be appended to. There need be no file."""
    if path.exists():
        data = path.read_bytes()
        if (whole := _whole_lines(data)) != data:
            write_atomic(path, whole.decode())


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def provenance() -> dict:
    """Commit, versions, machine and command of this run."""
    import torch
    import transformers

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        commit = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "commit": commit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }
