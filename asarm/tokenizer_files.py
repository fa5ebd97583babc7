"""The files of a tokenizer: where they are, and what is stored with it.

``tokenizer_config.json`` beside ``tokenizer.json`` holds the whitespace map and the document end with which a model was
trained, and what ``AutoTokenizer`` of transformers needs (which knows neither of the two).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from .embedded import resolve_model
from .errors import ModelNotFoundError, reason

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ROLES = {"bos": "<s>", "eos": "</s>"} | {name: f"<{name}>" for name in ("unk", "sep", "cls", "pad", "mask")}


def find_tokenizer(name_or_path: str | Path, revision: str) -> tuple[Path, dict[str, str]]:
    """``tokenizer.json`` of an embedded model, a local folder or a Hub id, and what of ``whitespace_map`` and
    ``document_end`` is stored with it."""
    folder = Path(resolve_model(name_or_path, revision))
    if not folder.is_dir():
        file, settings = _download(str(name_or_path), revision)
    elif (folder / TOKENIZER).is_file():
        file, settings = folder / TOKENIZER, folder / TOKENIZER_CONFIG
    else:
        raise ModelNotFoundError(f"{folder} has no {TOKENIZER}; name a folder or Hub id that has, with --tokenizer")
    return file, _read_settings(settings) if settings is not None and settings.is_file() else {}


def write_settings(
    folder: Path, special_tokens: Iterable[str], document_end: str, whitespace_map: str | None, max_length: int | None
) -> None:
    """Write ``tokenizer_config.json``. ``special_tokens`` are those that the vocabulary has, ``max_length`` is the
    number of tokens in a row of the model's training, where it is known."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{role}_token": token for role, token in ROLES.items() if token in special_tokens}
    settings |= {} if max_length is None else {"model_max_length": max_length}
    settings |= {"document_end": document_end} | ({} if whitespace_map is None else {"whitespace_map": whitespace_map})
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_settings(file: Path) -> dict[str, str]:
    """What :func:`write_settings` stored; other programs' files hold none of it."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {key: value for key, value in stored.items() if key in ("whitespace_map", "document_end")}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelNotFoundError(f"{file} cannot be read ({reason(error)})") from error


def _download(name: str, revision: str) -> tuple[Path, Path | None]:
    """``tokenizer.json`` and, where there is one, ``tokenizer_config.json`` of a Hub id."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(name, TOKENIZER, revision=revision))
    except Exception as error:  # the hub raises its own, requests' and plain OSErrors
        raise ModelNotFoundError(
            f"no {TOKENIZER} for {name!r} at revision {revision!r}: give --tokenizer with a folder or a Hub id that "
            f"has one (xlnet/xlnet-base-cased, for instance) ({reason(error)})"
        ) from error
    try:
        return file, Path(hf_hub_download(name, TOKENIZER_CONFIG, revision=revision))
    except EntryNotFoundError:  # not there, or not in the cache of a machine without a network
        return file, None
