"""Text sources by name: the project's samples, the development data, WikiText, any Hub data set."""

import os
from pathlib import Path

from ..errors import DataFileError, reason
from .sources import Document, read_documents, split_raw

SAMPLES = Path(__file__).parents[2] / "eval_datasets" / "samples"
ENGLISH_VALID = "train/english-valid.jsonl.gz"
WIKITEXT_VALID = "eval/wikitext-2-raw/wiki.valid.raw"
WIKITEXT_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")
MAX_ROWS = 10_000  # of a Hub data set; an evaluation reads no more


def load_text(
    dataset: str = "auto", data_file: str | None = None, dataset_config: str | None = None, split: str = "validation"
) -> tuple[str, list[Document]]:
    """Documents, and a line that says where they come from. ``data_file`` goes before ``dataset``."""
    local = os.environ.get("ASARM_DATA_DIR")
    if data_file is not None:
        return data_file, read_documents(data_file, wikitext=dataset == "wikitext")
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
    return f"{dataset} ({split})", _from_hub(dataset, dataset_config, split)


def _from_hub(name: str, config: str | None, split: str) -> list[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        texts = [row["text"] for row in rows.take(MAX_ROWS)]
    except KeyError as error:
        raise DataFileError(f"data set {name!r} has no column {error}; it needs a text column") from error
    except Exception as error:  # the library raises its own, the hub's and the network's
        raise DataFileError(
            f"cannot load data set {name!r} (configuration {config!r}, split {split!r}): give samples, english-valid, "
            "wikitext, a Hub id that exists and a network that reaches it, or a local file with --data_file "
            f"({reason(error)})"
        ) from error
    if name == WIKITEXT_HUB[0]:  # one line a row: put the articles together again
        lines = (text if text.endswith("\n") else text + "\n" for text in texts)
        documents = list(split_raw(lines, wikitext=True))
    else:
        documents = [Document(text, name) for text in texts]
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise DataFileError(f"data set {name!r}, split {split!r}, holds no text")
    return documents
