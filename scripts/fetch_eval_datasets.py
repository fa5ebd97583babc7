"""Fetch the evaluations' data sets that are missing, and verify all of them against eval_datasets/MANIFEST.json.

python scripts/fetch_eval_datasets.py --output_dir data && export ASARM_DATA_DIR=$PWD/data

A file gets its name only when its sha256 is the manifest's: what was downloaded is verified first, as published, and
then as the evaluations read it. A file that is there with another sha256 is reported and left alone.
"""

import hashlib
import http.client
import io
import json
import os
import re
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import uuid4

from jsonargparse import CLI

from asarm.errors import DataFileError, UserError, reason
from asarm.runlog import prepare_output_dir

MANIFEST = Path(__file__).parents[1] / "eval_datasets" / "MANIFEST.json"
TIMEOUT = 60  # seconds without an answer


def main(output_dir: str | None = None, names: str | None = None, manifest: str = str(MANIFEST)) -> int:
    """Fetch what is missing and verify the rest; the exit status is 0 if every data set asked for is there.

    Args:
        output_dir: folder that ASARM_DATA_DIR names, or shall name (default: ASARM_DATA_DIR).
        names: only these data sets, separated by commas.
        manifest: what to fetch, and its hashes.
    """
    try:
        root, entries = _settings(output_dir, names, manifest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failures = 0
    for entry in entries:
        try:
            print(f"{entry['name']}: {provide(entry, root)}")
        except UserError as error:
            failures += 1
            print(f"{entry['name']}: {error}", file=sys.stderr)
    return int(failures > 0)


def _settings(output_dir: str | None, names: str | None, manifest: str) -> tuple[Path, list[dict]]:
    folder = output_dir or os.environ.get("ASARM_DATA_DIR")
    if not folder:
        raise UserError("where to? give --output_dir, or set ASARM_DATA_DIR")
    entries = {entry["name"]: entry for entry in json.loads(Path(manifest).read_text(encoding="utf-8"))["datasets"]}
    wanted = names.split(",") if names else list(entries)
    if unknown := set(wanted) - set(entries):
        raise UserError(f"unknown data set(s) {', '.join(sorted(unknown))}; there are {', '.join(entries)}")
    return Path(folder).expanduser(), [entries[name] for name in wanted]


def provide(entry: dict, root: Path) -> str:
    """Make sure that the entry's file is in ``root`` with the entry's sha256; returns what was done."""
    path = root / entry["path"]
    if path.exists():
        if sha256(path.read_bytes()) != entry["sha256"]:
            raise DataFileError(f"{path} has another sha256 than the manifest: left alone; move it away to fetch it")
        return f"there, verified ({path})"
    if "download" not in entry:
        raise DataFileError(f"{path} is missing and cannot be downloaded: {entry['on_request']}")
    data = download(entry["download"])
    if sha256(data) != entry["sha256"]:
        raise DataFileError(f"what came from {entry['download']['url']} has another sha256 than the manifest")
    prepare_output_dir(str(path.parent))
    partial = path.with_name(f"{path.name}.partial-{uuid4().hex}")
    partial.write_bytes(data)
    os.replace(partial, path)
    return f"fetched, verified ({path})"


def download(source: dict) -> bytes:
    """The bytes at ``url``, verified as published where the manifest gives their sha256, in the evaluations' form."""
    try:
        with urllib.request.urlopen(source["url"], timeout=TIMEOUT) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:  # unreachable, refused, not found, torn off
        raise DataFileError(f"cannot download {source['url']}: {reason(error)}") from error
    if "sha256" in source and sha256(data) != source["sha256"]:
        raise DataFileError(f"{source['url']} has another sha256 than the manifest")
    return CONVERTERS[source["convert"]](data) if "convert" in source else data


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def convert_lambada(data: bytes) -> bytes:
    """``text`` split before its last word."""
    pairs = [json.loads(line)["text"].rsplit(" ", 1) for line in data.splitlines()]
    return json_lines([dict(zip(("context", "continuation"), pair, strict=True)) for pair in pairs], ensure_ascii=False)


def convert_hellaswag(data: bytes) -> bytes:
    """The activity in front of the context; WikiHow's ``[header]`` and other marks stripped, as lm-evaluation-harness
    does."""

    def plain(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    rows = []
    for record in map(json.loads, data.splitlines()):
        context = plain(f"{record['activity_label']}: {record['ctx']}")
        rows.append({"ctx": context, "endings": [plain(e) for e in record["endings"]], "label": str(record["label"])})
    return json_lines(rows)


def convert_wikitext(data: bytes, split: str = "valid") -> bytes:
    """One split's text out of the archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(f"wikitext-2-raw/wiki.{split}.raw")


def json_lines(rows: list[dict], **options) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


CONVERTERS: dict[str, Callable[[bytes], bytes]] = {
    "lambada": convert_lambada,
    "hellaswag": convert_hellaswag,
    "wikitext": convert_wikitext,
    "wikitext-test": partial(convert_wikitext, split="test"),
}

if __name__ == "__main__":
    sys.exit(CLI(main, as_positional=False))
