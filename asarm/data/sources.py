"""Documents from files: JSON lines, Parquet, plain text, WikiText; compressed with gzip or Zstandard or not at all."""

import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataFileError

WIKITEXT_TITLE = re.compile(r"^ = (?!=).+ = $")
FORMS = "JSON lines (.jsonl), Parquet (.parquet) or text (any other name), all but Parquet also compressed (.gz, .zst)"


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


def read_documents(name: str, text_column: str = "text", wikitext: bool = False) -> list[Document]:
    """All documents of a file (:func:`iterate_documents`); raises :class:`DataFileError` also where there is none."""
    documents = list(iterate_documents(resolve_path(name), text_column, wikitext))
    if not documents:
        raise DataFileError(f"data file {name!r} holds no text")
    return documents


def iterate_documents(
    path: Path, text_column: str = "text", wikitext: bool = False, piece: int | None = None
) -> Iterator[Document]:
    """The documents of a file, one after another; those without text are left out.

    JSON lines and Parquet: a record with ``text_column`` (and optionally ``source``) each. Any other file is raw text:
    one document, or with ``wikitext`` one per article, split at its top-level `` = Title = `` headings; with ``piece``
    one for so many characters, up to the end of a line. Raises :class:`DataFileError` for a file that is unreadable,
    cut off or malformed.
    """
    documents = _documents(path, text_column) if _holds_records(path) else _raw_documents(path, wikitext, piece)
    yield from (document for document in documents if document.text.strip())


def _holds_records(path: Path) -> bool:
    if ".json" in path.suffixes:
        raise DataFileError(f"{path} is not read as raw text: give {FORMS}")
    return path.suffix == ".parquet" or ".jsonl" in path.suffixes


def _documents(path: Path, text_column: str) -> Iterator[Document]:
    for where, record in iterate_records(path, (text_column, "source")):
        yield to_document(to_object(record, where), text_column, where)


def _raw_documents(path: Path, wikitext: bool, piece: int | None) -> Iterator[Document]:
    with _named_errors(path), _open_text(path) as file:
        yield from split_raw(file, wikitext, piece)


def to_document(record: dict, text_column: str, where: str) -> Document:
    """A record as a document, a null as one without text; raises :class:`DataFileError` where the column is missing or
    holds something else."""
    if not isinstance(record.get(text_column, 0), str | None):
        raise DataFileError(f'{where}: expected an object with a string "{text_column}", got {str(record)[:60]!r}')
    return Document(record[text_column] or "", str(record.get("source", "")))


def iterate_records(path: Path, columns: tuple[str, ...] = ()) -> Iterator[tuple[str, dict | str]]:
    """The rows of a Parquet file, or the lines of any other, each after its place in words; lines are for
    :func:`to_object` to read, empty ones are left out.

    Of a Parquet file's columns those in ``columns`` are read, of which it must have the first, or all. Raises
    :class:`DataFileError` for a file that is unreadable or cut off.
    """
    with _named_errors(path):
        if path.suffix == ".parquet":
            for number, record in enumerate(_parquet_rows(path, columns), 1):
                yield f"{path}, row {number}", record
        else:
            with _open_text(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}, line {number}", line


def to_object(record: dict | str, where: str) -> dict:
    """A record of :func:`iterate_records`; raises :class:`DataFileError` for a line that is not a JSON object."""
    if isinstance(record, dict):
        return record
    try:
        value = json.loads(record)
    except json.JSONDecodeError as error:
        raise DataFileError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataFileError(f"{where}: not a JSON object: {record[:60]!r}")
    return value


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict]:
    file = pq.ParquetFile(path)
    there = file.schema_arrow.names
    if columns and columns[0] not in there:
        raise DataFileError(f"{path} has no column {columns[0]!r}; it has {there}: name one with data.text_column")
    for batch in file.iter_batches(batch_size=256, columns=[c for c in there if not columns or c in columns]):
        yield from batch.to_pylist()


def _open_text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(pa.input_stream(str(path), compression="detect"), encoding="utf-8")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataFileError(f"cannot read data file {str(path)!r}: {error}") from error


def split_raw(file: Iterable[str], wikitext: bool, piece: int | None = None) -> Iterator[Document]:
    """Raw lines as one document, as WikiText's articles, or as documents of about ``piece`` characters."""
    lines, size = [], 0
    for line in file:
        begins_article = wikitext and WIKITEXT_TITLE.match(line.rstrip("\n"))
        if begins_article or (piece is not None and size >= piece):
            yield Document("".join(lines).strip(), "wikitext" if wikitext else "raw")
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield Document("".join(lines).strip(), "wikitext" if wikitext else "raw")
