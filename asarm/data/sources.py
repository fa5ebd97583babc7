"""Documents from files: JSONL(.gz), plain text, WikiText."""

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataFileError

WIKITEXT_TITLE = re.compile(r"^ = (?!=).+ = $")


@dataclass(frozen=True)
class Document:
    text: str
    source: str = ""


def resolve_path(name: str) -> Path:
    """``name`` with ``~`` and environment variables expanded; raises :class:`DataFileError` where there is no such
    file."""
    expanded = os.path.expanduser(os.path.expandvars(name))
    if "$" in expanded:
        raise DataFileError(f"data file {name!r} names an environment variable that is not set; set it or give a path")
    path = Path(expanded)
    if not path.is_file():
        raise DataFileError(
            f"no data file {expanded!r}; give a text (.txt, .raw) or JSON lines (.jsonl, .jsonl.gz) file"
        )
    return path


def read_documents(name: str, wikitext: bool = False) -> list[Document]:
    """All documents of a file.

    JSON lines: an object with ``text`` (and optionally ``source``) a line. Any other file is raw text: one document,
    or with ``wikitext`` one per article, split at its top-level `` = Title = `` headings. Raises
    :class:`DataFileError` for a file that is unreadable, malformed or empty.
    """
    path = resolve_path(name)
    json_lines = ".jsonl" in path.suffixes
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            documents = list(_json_lines(file, path) if json_lines else split_raw(file, wikitext))
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DataFileError(f"cannot read data file {str(path)!r}: {error}") from error
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise DataFileError(f"data file {str(path)!r} holds no text")
    return documents


def _json_lines(file, path: Path) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataFileError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataFileError(f'{path}, line {number}: expected an object with a string "text", got {line[:60]!r}')
        yield Document(record["text"], str(record.get("source", "")))


def split_raw(file: Iterable[str], wikitext: bool) -> Iterator[Document]:
    """Raw lines as one document, or as WikiText's articles."""
    lines: list[str] = []
    for line in file:
        if wikitext and WIKITEXT_TITLE.match(line.rstrip("\n")):
            yield Document("".join(lines).strip(), "wikitext")
            lines = []
        lines.append(line)
    yield Document("".join(lines).strip(), "wikitext" if wikitext else "raw")
