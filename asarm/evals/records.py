"""Per-sequence records: appended as they come, read back to go on after a stop, merged over processes."""

import hashlib
import json
from itertools import groupby
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


def prompt_spans(visible: list[bool]) -> dict[str, list[list[int]]]:
    """Which positions are given, as a record has it: spans [start, stop) of the ``given`` positions, or of the
    ``masked`` ones where those are fewer."""
    spans: dict[bool, list[list[int]]] = {True: [], False: []}
    end = 0
    for given, run in groupby(visible):
        start, end = end, end + len(list(run))
        spans[given].append([start, end])
    return {"given": spans[True]} if len(spans[True]) <= len(spans[False]) else {"masked": spans[False]}


def visible_of(record: dict) -> list[bool]:
    """Which of a record's ``ids`` were given; the others were drawn."""
    ((kind, spans),) = record["prompt"].items()
    visible = [kind == "masked"] * len(record["ids"])
    for start, stop in spans:
        visible[start:stop] = [kind == "given"] * (stop - start)
    return visible


class RecordLog:
    """The records of one run, keyed by (sampler, index): ``records.jsonl``, and ``records-IofN.jsonl`` of each shard
    while several processes are at work. A later phase has files of its own (``stem``) with the same keys.

    A folder is a run's from the first record on, so that a start that failed leaves it to the next. Its ``config.yaml``
    then holds the settings, and its folder ``identity`` what they only name (text, weights: :meth:`identify`); whoever
    comes with others is refused; a setting that the folder does not know, because it is newer, had its default there. A
    torn last line, as a kill leaves it, is cut off.
    """

    def __init__(self, folder: Path, config: dict, shard: Shard, stem: str = "records", defaults: dict | None = None):
        self.folder, self.config, self.stem, self.defaults = folder, config, stem, defaults or {}
        self.path = folder / f"{stem}{shard.suffix}.jsonl"
        self.identities: dict[str, dict] = {}
        self.noted = False  # whether the folder says what this process knows of the run
        self._check()
        cut_torn_line(self.path)
        self.records: dict[Key, dict] = {}
        self.reload()

    def _check(self) -> None:
        """Raise :class:`OutputDirError` if the folder is another run's."""
        path = self.folder / "config.yaml"
        if path.exists():
            there = yaml.safe_load(path.read_text(encoding="utf-8"))
            check_same(self.folder, self.defaults | there, self.config)
            for name in self.identities:
                self._check_identity(name)

    def _check_identity(self, name: str) -> None:
        path = self._identity_path(name)
        if path.exists():
            check_same(self.folder, json.loads(path.read_text(encoding="utf-8"))[name], self.identities[name])

    def _identity_path(self, name: str) -> Path:
        return self.folder / "identity" / f"{fingerprint(name)}.json"  # one each: nobody overwrites what another noted

    def _note(self) -> None:
        """Make the folder this run's, unless another process of another run was first."""
        self._check()
        write_atomic(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        (self.folder / "identity").mkdir(exist_ok=True)
        for name, identity in self.identities.items():
            if not create_json(self._identity_path(name), {name: identity}):
                self._check_identity(name)
        self.noted = True

    def identify(self, name: str, identity: dict) -> None:
        """Say what the setting ``name`` stands for: checked now, noted with the next record."""
        self.identities[name] = identity
        self.noted = False
        self._check()

    def add(self, record: dict) -> None:
        if not self.noted:
            self._note()
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
        self._note()
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
