"""Per-sequence records: appended as they come, read back to go on after a stop, merged over processes."""

import hashlib
import json
from pathlib import Path

import yaml

from ..errors import OutputDirError
from ..runlog import append_line, create_json, cut_torn_line, read_lines, write_atomic
from .shards import Shard

# settings that may differ when a run goes on
FREE_KEYS = {"output_dir", "json", "shard", "judge", "pass_k", "allow_code_execution", "sandbox", "workers"}
Key = tuple[str, int]  # system, index


def fingerprint(value: object) -> str:
    """A short hash of what a run works on (its tasks, say)."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


class RecordLog:
    """The records of one run, keyed by (sampler, index): ``records.jsonl``, and ``records-IofN.jsonl`` of each shard
    while several processes are at work. A later phase has files of its own (``stem``) with the same keys.

    Opening it checks that the folder holds no other run: its ``config.yaml`` must agree, and its folder ``identity``
    (:meth:`identify`) holds what the settings only name (text, weights). A torn last line, as a kill leaves it, is cut
    off.
    """

    def __init__(self, folder: Path, config: dict, shard: Shard, stem: str = "records"):
        self.folder, self.stem = folder, stem
        self.path = folder / f"{stem}{shard.suffix}.jsonl"
        config_path = folder / "config.yaml"
        if config_path.exists():
            check_same(folder, yaml.safe_load(config_path.read_text(encoding="utf-8")), config)
        write_atomic(config_path, yaml.safe_dump(config, sort_keys=False))
        cut_torn_line(self.path)
        self.records: dict[Key, dict] = {}
        self.reload()

    def identify(self, name: str, identity: dict) -> None:
        """Check, or note in a new run, what the setting ``name`` stands for."""
        path = self.folder / "identity" / f"{fingerprint(name)}.json"  # one each: nobody overwrites what another noted
        path.parent.mkdir(exist_ok=True)
        if not create_json(path, {name: identity}):
            check_same(self.folder, json.loads(path.read_text(encoding="utf-8"))[name], identity)

    def add(self, record: dict) -> None:
        append_line(self.path, record)
        self.records[record["sampler"], record["index"]] = record

    def reload(self) -> None:
        """Read what all processes have recorded."""
        while True:
            try:
                paths = sorted(self.folder.glob(f"{self.stem}*.jsonl"))
                found = [record for path in paths for record in read_lines(path)]
                break
            except FileNotFoundError:  # another process has merged the files since they were listed
                continue
        self.records = by_key(found)

    def merge(self, keys: list[Key]) -> None:
        """Once all ``keys`` are recorded: one file, in their order. Any number of processes may do so at once."""
        shards = list(self.folder.glob(f"{self.stem}-*of*.jsonl"))
        self.records = {key: self.records[key] for key in keys}
        lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in self.records.values())
        write_atomic(self.folder / f"{self.stem}.jsonl", "".join(lines))
        for path in shards:
            path.unlink(missing_ok=True)


def by_key(records: list[dict]) -> dict[Key, dict]:
    return {(record["sampler"], record["index"]): record for record in records}


def by_system(*phases: dict[Key, dict]) -> dict[str, list[dict]]:
    """Each system's records, with what every phase says of them, in the first phase's order."""
    systems: dict[str, list[dict]] = {}
    for key in phases[0]:
        joined = {name: value for phase in phases for name, value in phase[key].items()}
        systems.setdefault(key[0], []).append(joined)
    return systems


def check_same(folder: Path, there: dict, now: dict) -> None:
    """Raise :class:`OutputDirError` where what was found in the folder is not what it is now, free settings apart."""
    changed = [key for key in now if key not in FREE_KEYS and there.get(key) != now[key]]
    if changed:
        detail = ", ".join(f"{key}: {there.get(key)!r} there, {now[key]!r} now" for key in changed)
        raise OutputDirError(f"{folder} holds a run with other settings ({detail}); choose another --output_dir")
