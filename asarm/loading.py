"""A model and its tokenizer by name."""

import os
from pathlib import Path

import torch
import yaml
from transformers import XLNetConfig
from transformers.utils import logging

from .drafter import load_draft_head
from .engine import warn_if_emulated
from .errors import CheckpointMismatchError, ModelNotFoundError, UserError, reason
from .network import Network
from .pretrained import find_file, load_plain, require_model
from .tokenizer import TextTokenizer

RECIPE = "training_config.yaml"  # of a model, beside its weights


def load(
    model: str,
    revision: str = "main",
    tokenizer: str | None = None,
    dtype: str = "float32",
    whitespace_map: str | None = None,
    document_end: str | None = None,
    draft_head: str | None = None,
) -> tuple[Network, TextTokenizer]:
    """Both, on the GPU where there is one; the tokenizer from ``tokenizer`` or from the model's own place, with the
    whitespace map and the document end that are stored there, unless they are given. ``draft_head`` (a folder or Hub
    id, @revision behind it or not) drafts for the model instead of its own."""
    logging.disable_progress_bar()
    loaded_tokenizer = load_tokenizer(model, revision, tokenizer, whitespace_map, document_end)
    loaded = load_network(model, revision, getattr(torch, dtype))
    check_vocabulary(loaded, loaded_tokenizer)
    warn_if_emulated(this_device(), loaded.dtype, "dtype float32")
    loaded.to(this_device()).eval()
    if draft_head is not None:
        load_draft_head(loaded, *name_and_revision(draft_head))
    return loaded, loaded_tokenizer


def load_network(name_or_path: str, revision: str, dtype: torch.dtype) -> Network:
    """That of :meth:`asarm.model.AnySubsetLM.from_pretrained`, which takes over where the short way does not lead to
    one: it knows other forms of checkpoint, and why there is none."""
    try:
        network = load_plain(Network, XLNetConfig, name_or_path, revision, dtype)
        network.revision = revision
        return network
    except (OSError, UserError):
        from .model import AnySubsetLM

        return AnySubsetLM.from_pretrained(name_or_path, revision=revision, dtype=dtype)


def this_device() -> torch.device:
    """The GPU of this process (of several on a machine, each its own), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def load_tokenizer(
    model: str | None,
    revision: str,
    tokenizer: str | None,
    whitespace_map: str | None = None,
    document_end: str | None = None,
) -> TextTokenizer:
    """``tokenizer`` if it is named, else the model's own at the model's revision."""
    if tokenizer:
        return TextTokenizer.from_pretrained(tokenizer, whitespace_map=whitespace_map, document_end=document_end)
    require_model(model, revision)  # of a model that does not exist, not the tokenizer is what is missing
    return TextTokenizer.from_pretrained(model, revision, whitespace_map, document_end)


def check_vocabulary(model: Network, tokenizer: TextTokenizer) -> None:
    """Raise :class:`CheckpointMismatchError` for a tokenizer with ids that the model does not have."""
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointMismatchError(
            f"the tokenizer has {len(tokenizer)} pieces, the model only {model.config.vocab_size}; "
            "give the model's own with --tokenizer"
        )


def name_and_revision(name: str) -> tuple[str, str]:
    """``id@revision`` as two; a folder's or an id's own revision is main."""
    path, _, revision = name.partition("@")
    return path, revision or "main"


def load_causal(kind: type, name: str, **settings):
    """``kind`` (an ``Auto`` class) of a causal language model: a folder, or a Hub id, if need be as id@revision."""
    path, revision = name_and_revision(name)
    try:
        return kind.from_pretrained(path, revision=revision, **settings)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"no causal language model {path!r} at revision {revision!r}: give a folder or a Hub id (with @revision) "
            f"that {kind.__name__} loads ({reason(error)})"
        ) from error


def read_recipe(name: str, revision: str = "main") -> str | None:
    """The settings of a model's training, where they lie beside its weights (``training_config.yaml``)."""
    found = find_file(name, RECIPE, revision)
    return None if found is None else found.read_text(encoding="utf-8")


def row_length(recipe: str | None) -> int | None:
    """Tokens in a row of the training that a recipe describes (``data.max_length``); None where it does not tell."""
    settings = yaml.safe_load(recipe or "")
    data = settings.get("data") if isinstance(settings, dict) else None
    return data.get("max_length") if isinstance(data, dict) else None


def trained_length(model: Network) -> int | None:
    """Tokens in a row of the training of a model that was loaded from a folder; None where nothing tells."""
    return row_length(read_recipe(model.name_or_path)) if Path(model.name_or_path).is_dir() else None
