"""Per-sequence records: appended as they come, read back to go on after a stop."""

import hashlib
import json
from pathlib import Path

import yaml

from ..errors import OutputDirError
from ..runlog import append_line, read_lines, write_atomic, write_json

FREE_KEYS = {"output_dir", "json"}  # settings that may differ when a run goes on


def fingerprint(value: object) -> str:
    """A short hash of what a run works on (its tasks, say)."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


class RecordLog:
    """``records.jsonl`` of one run, keyed by (sampler, index).

    Opening it checks that the folder holds no other run: its ``config.yaml`` must agree, and its ``identity.json``,
    which holds what the settings only name (text, weights). A torn last line, as a kill leaves it, is cut off.
    """

    def __init__(self, folder: Path, config: dict, identity: dict):
        self.path = folder / "records.jsonl"
        config_path, identity_path = folder / "config.yaml", folder / "identity.json"
        if config_path.exists() and identity_path.exists():
            there = yaml.safe_load(config_path.read_text(encoding="utf-8"))
            _check_same_run(folder, there | json.loads(identity_path.read_text(encoding="utf-8")), config | identity)
        write_atomic(config_path, yaml.safe_dump(config, sort_keys=False))
        write_json(identity_path, identity)
        self.records = {(r["sampler"], r["index"]): r for r in read_lines(self.path)}

    def add(self, record: dict) -> None:
        append_line(self.path, record)
        self.records[record["sampler"], record["index"]] = record

    def of(self, sampler: str) -> list[dict]:
        return [record for (name, _), record in sorted(self.records.items()) if name == sampler]


def _check_same_run(folder: Path, there: dict, now: dict) -> None:
    changed = [key for key in now if key not in FREE_KEYS and there.get(key) != now[key]]
    if changed:
        detail = ", ".join(f"{key}: {there.get(key)!r} there, {now[key]!r} now" for key in changed)
        raise OutputDirError(f"{folder} holds a run with other settings ({detail}); choose another --output_dir")
