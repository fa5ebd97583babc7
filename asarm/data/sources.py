"""Documents from files: JSON lines, Parquet, plain text, WikiText; compressed with gzip or Zstandard or not at all."""

import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataFileError

WIKITEXT_TITLE = re.compile(r"^ = (?!=).+ = $")
FORMS = (
    "text (.txt, .raw, any other ending), JSON lines (.jsonl) or Parquet (.parquet), the first two also as .gz, .zst"
)


@dataclass(frozen=True)
class Document:
    text: str
    source: str = ""


def find_files(names: Iterable[str]) -> list[Path]:
    """The files that ``names`` stand for, in order; ``~``, environment variables and wildcards (``**`` too) are
    expanded. Raises :class:`DataFileError` for a name without a file, and for a file that is named twice."""
    found = []
    for name in names:
        expanded = os.path.expanduser(os.path.expandvars(name))
        if "$" in expanded:
            raise DataFileError(
                f"data file {name!r} names an environment variable that is not set; set it or give a path"
            )
        is_pattern = glob.has_magic(expanded) and not os.path.exists(expanded)
        paths = sorted(glob.glob(expanded, recursive=True)) if is_pattern else [expanded]
        paths = [Path(path) for path in paths if os.path.isfile(path)]
        if not paths:
            raise DataFileError(f"no data file {expanded!r}; give {FORMS}")
        found += paths
    if twice := sorted({str(path) for path in found if found.count(path) > 1}):
        raise DataFileError(f"{twice} are named more than once; name each file once (data.source_weights repeats text)")
    return found


def resolve_path(name: str) -> Path:
    """The one file that ``name`` stands for."""
    found = find_files([name])
    if len(found) > 1:
        raise DataFileError(f"{name!r} stands for {len(found)} files; name one")
    return found[0]


def read_documents(name: str, wikitext: bool = False) -> list[Document]:
    """All documents of a file (:func:`iterate_documents`); raises :class:`DataFileError` also where there is none."""
    documents = list(iterate_documents(resolve_path(name), wikitext=wikitext))
    if not documents:
        raise DataFileError(f"data file {name!r} holds no text")
    return documents


def iterate_documents(path: Path, text_column: str = "text", wikitext: bool = False) -> Iterator[Document]:
    """The documents of a file, one after another; those without text are left out.

    JSON lines and Parquet: a record with ``text_column`` (and optionally ``source``) each. Any other file is raw text:
    one document, or with ``wikitext`` one per article, split at its top-level `` = Title = `` headings. Raises
    :class:`DataFileError` for a file that is unreadable, cut off or malformed.
    """
    try:
        yield from (d for d in _all_documents(path, text_column, wikitext) if d.text.strip())
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataFileError(f"cannot read data file {str(path)!r}: {error}") from error


def _all_documents(path: Path, text_column: str, wikitext: bool) -> Iterator[Document]:
    if path.suffix == ".parquet":
        for number, record in enumerate(_parquet_records(path, text_column), 1):
            yield to_document(record, text_column, f"{path}, row {number}")
        return
    with io.TextIOWrapper(pa.input_stream(str(path), compression="detect"), encoding="utf-8") as file:
        if ".jsonl" in path.suffixes:
            yield from _json_lines(file, path, text_column)
        else:
            yield from split_raw(file, wikitext)


def to_document(record: object, text_column: str, where: str) -> Document:
    """A record as a document, a null as one without text; raises :class:`DataFileError` where the column is missing or
    holds something else."""
    if not isinstance(record, dict) or not isinstance(record.get(text_column, 0), str | None):
        raise DataFileError(f'{where}: expected an object with a string "{text_column}", got {str(record)[:60]!r}')
    return Document(record[text_column] or "", str(record.get("source", "")))


def _parquet_records(path: Path, text_column: str) -> Iterator[dict]:
    file = pq.ParquetFile(path)
    columns = file.schema_arrow.names
    if text_column not in columns:
        raise DataFileError(f"{path} has no column {text_column!r}; it has {columns}: name one with data.text_column")
    for batch in file.iter_batches(batch_size=256, columns=[c for c in (text_column, "source") if c in columns]):
        yield from batch.to_pylist()


def _json_lines(file: Iterable[str], path: Path, text_column: str) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataFileError(f"{path}, line {number}: not JSON ({error})") from error
            yield to_document(record, text_column, f"{path}, line {number}")


def split_raw(file: Iterable[str], wikitext: bool) -> Iterator[Document]:
    """Raw lines as one document, or as WikiText's articles."""
    lines: list[str] = []
    for line in file:
        if wikitext and WIKITEXT_TITLE.match(line.rstrip("\n")):
            yield Document("".join(lines).strip(), "wikitext")
            lines = []
        lines.append(line)
    yield Document("".join(lines).strip(), "wikitext" if wikitext else "raw")
