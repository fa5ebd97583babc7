"""Text sources by name: the project's samples, the development data, WikiText, any Hub data set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataFileError, UserError, reason
from .sources import Document, read_documents, split_raw, to_document

if TYPE_CHECKING:  # the library takes a second to import, and most text is local
    from datasets import IterableDataset

SAMPLES = Path(__file__).parents[2] / "eval_datasets" / "samples"
ENGLISH_VALID = "train/english-valid.jsonl.gz"
WIKITEXT_VALID = "eval/wikitext-2-raw/wiki.valid.raw"
WIKITEXT_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")
MAX_ROWS = 10_000  # of a Hub data set; an evaluation reads no more


def load_text(
    dataset: str = "auto",
    data_file: str | None = None,
    dataset_config: str | None = None,
    split: str = "validation",
    text_column: str = "text",
) -> tuple[str, list[Document]]:
    """Documents, and a line that says where they come from. ``data_file`` goes before ``dataset``; ``text_column`` is
    that of the file's records or of a Hub data set's."""
    local = os.environ.get("ASARM_DATA_DIR")
    if data_file is not None:
        return data_file, read_documents(data_file, text_column, wikitext=dataset == "wikitext")
    if dataset == "auto":
        dataset = "english-valid" if local and (Path(local) / ENGLISH_VALID).is_file() else "samples"
    if dataset == "samples":
        files = [str(SAMPLES / "stories.jsonl"), str(SAMPLES / "passages.jsonl")]
        return "eval_datasets/samples", [d for name in files for d in read_documents(name)]
    if dataset == "english-valid":
        name = f"$ASARM_DATA_DIR/{ENGLISH_VALID}"
        return name, read_documents(name)
    if dataset == "wikitext":
        if local and (Path(local) / WIKITEXT_VALID).is_file():
            return f"$ASARM_DATA_DIR/{WIKITEXT_VALID}", read_documents(str(Path(local) / WIKITEXT_VALID), wikitext=True)
        dataset, dataset_config = WIKITEXT_HUB
    return f"{dataset} ({split})", _from_hub(dataset, dataset_config, split, text_column)


def _from_hub(name: str, config: str | None, split: str, text_column: str) -> list[Document]:
    rows = open_hub(name, config, split, text_column=text_column)
    with explained(name, config, split):
        documents = [to_document(row, text_column, f"data set {name!r}") for row in rows.take(MAX_ROWS)]
    if name == WIKITEXT_HUB[0]:  # one line a row: put the articles together again
        lines = (d.text if d.text.endswith("\n") else d.text + "\n" for d in documents)
        documents = list(split_raw(lines, wikitext=True))
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise DataFileError(f"data set {name!r}, split {split!r}, holds no text")
    return documents


def open_hub(
    name: str,
    config: str | None,
    split: str,
    data_dir: str | None = None,
    revision: str | None = None,
    text_column: str = "text",
) -> IterableDataset:
    """A data set of the Hub (or a folder in its form), to be read as it is downloaded.

    The first row is read at once. Raises :class:`DataFileError` for one that does not exist, cannot be reached, is
    gated to this user, is empty, or lacks ``text_column``.
    """
    from datasets import load_dataset

    if not Path(name).is_dir():
        _require_access(name)
    with explained(name, config, split):
        rows = load_dataset(name, config, split=split, data_dir=data_dir, revision=revision, streaming=True)
        first = next(iter(rows), None)
    if first is None:
        raise DataFileError(f"data set {name!r}, split {split!r}, holds no row")
    if text_column not in first:
        raise DataFileError(
            f"data set {name!r} has no column {text_column!r}; it has {sorted(first)}: name the one that holds text"
        )
    to_document(first, text_column, f"data set {name!r}, first row")
    return rows


def _require_access(name: str) -> None:
    """Raise :class:`DataFileError` for a gated data set; what else may be wrong is left to its loading."""
    from huggingface_hub import auth_check
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError

    try:
        auth_check(name, repo_type="dataset")
    except GatedRepoError as error:
        known = error.response.status_code == 403
        who = "the account of your token has no access yet" if known else "no valid token was found"
        raise DataFileError(
            f"data set {name!r} is gated, and {who}: accept its terms at {ENDPOINT}/datasets/{name}, and give a token "
            "of that account with `hf auth login` or in the environment variable HF_TOKEN"
        ) from error
    except Exception:  # no such data set, no network, offline mode: loading says it, or succeeds without
        return


@contextmanager
def explained(name: str, config: str | None, split: str) -> Iterator[None]:
    """Errors of reading a data set as the user's: the library raises its own, the Hub's, Arrow's and the network's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise DataFileError(
            f"cannot read data set {name!r} (configuration {config!r}, split {split!r}): give a Hub id that exists and "
            f"a network that reaches it, or a local file ({reason(error)})"
        ) from error
