"""Per-sequence records: appended as they come, read back to go on after a stop."""

import json
from pathlib import Path

import yaml

from ..errors import OutputDirError
from ..runlog import append_line, write_atomic

FREE_KEYS = {
    "output_dir",
    "batch_size",
    "json",
}  # settings that may differ when a run goes on: the records do not depend on them


class RecordLog:
    """``records.jsonl`` of one run, keyed by (sampler, index).

    Opening it checks that the folder holds no other run: ``config.yaml`` there must agree. A torn last line, as a
    kill leaves it, is cut off.
    """

    def __init__(self, folder: Path, config: dict):
        self.path = folder / "records.jsonl"
        config_path = folder / "config.yaml"
        if config_path.exists():
            _check_same_run(folder, yaml.safe_load(config_path.read_text(encoding="utf-8")) or {}, config)
        write_atomic(config_path, yaml.safe_dump(config, sort_keys=False))
        self.records: dict[tuple[str, int], dict] = {}
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                write_atomic(self.path, whole)
            for line in whole.splitlines():
                record = json.loads(line)
                self.records[record["sampler"], record["index"]] = record

    def add(self, record: dict) -> None:
        append_line(self.path, record)
        self.records[record["sampler"], record["index"]] = record

    def of(self, sampler: str) -> list[dict]:
        return [record for (name, _), record in sorted(self.records.items()) if name == sampler]


def _check_same_run(folder: Path, there: dict, config: dict) -> None:
    changed = [key for key in config if key not in FREE_KEYS and there.get(key) != config[key]]
    if changed:
        detail = ", ".join(f"{key}: {there.get(key)!r} there, {config[key]!r} now" for key in changed)
        raise OutputDirError(f"{folder} holds a run with other settings ({detail}); choose another --output_dir")
