"""A model as a folder that asarm and transformers load: by training, and by a command that copies one."""

import os
from pathlib import Path

import torch
from transformers import XLNetConfig

from .command_config import ExportConfig
from .draft_head import DraftHead, find_draft_head
from .errors import OutputDirError
from .loading import RECIPE, check_vocabulary, load_tokenizer, read_recipe, row_length
from .model import AnySubsetLM
from .runlog import prepare_output_dir, whole_folder
from .tokenizer import TextTokenizer


def write_description(folder: Path, config: XLNetConfig, tokenizer: TextTokenizer, recipe: str | None) -> None:
    """What makes weights a model: its configuration, its tokenizer and, where it is known, the recipe of its training
    (a YAML text)."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder, row_length(recipe))
    if recipe is not None:
        (folder / RECIPE).write_text(recipe, encoding="utf-8")


def write_model(
    folder: Path, model: AnySubsetLM, tokenizer: TextTokenizer, recipe: str | None, head: DraftHead | None = None
) -> None:
    """A model, in the type that it has, with all that belongs to it, into a folder that is there."""
    write_description(folder, model.config, tokenizer, recipe)
    model.save_pretrained(folder)
    if head is not None:
        head.save_pretrained(folder)


def export(config: ExportConfig) -> Path:
    """Write any model that loads, with its draft head if it has one, into a new folder; returns the folder.

    Raises :class:`OutputDirError` for a folder that is not empty, and what loading raises.
    """
    folder = Path(os.path.expanduser(os.path.expandvars(config.output_dir)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputDirError(f"output_dir {str(folder)!r} is not an empty folder; name a new one")
    name, revision = config.model, config.revision
    tokenizer = load_tokenizer(name, revision, config.tokenizer, config.whitespace_map, config.document_end)
    model = AnySubsetLM.from_pretrained(name, revision=revision, dtype=getattr(torch, config.dtype))
    check_vocabulary(model, tokenizer)
    head = find_draft_head(name, model, revision)
    prepare_output_dir(str(folder))
    with whole_folder(folder) as partial:
        write_model(partial, model, tokenizer, read_recipe(name, revision), head)
    return folder
