"""A model and its tokenizer by name."""

import torch
from transformers.utils import logging

from .errors import CheckpointMismatchError
from .model import AnySubsetLM
from .tokenizer import TextTokenizer


def load(
    model: str, revision: str = "main", tokenizer: str | None = None, dtype: str = "float32"
) -> tuple[AnySubsetLM, TextTokenizer]:
    """Both, on the GPU where there is one; the tokenizer from ``tokenizer`` or from the model's own place."""
    logging.disable_progress_bar()
    loaded_tokenizer = TextTokenizer.from_pretrained(tokenizer or model, revision if tokenizer is None else "main")
    loaded = AnySubsetLM.from_pretrained(model, revision=revision, dtype=getattr(torch, dtype))
    if len(loaded_tokenizer) > loaded.config.vocab_size:
        raise CheckpointMismatchError(
            f"the tokenizer {tokenizer or model!r} has {len(loaded_tokenizer)} pieces, the model {model!r} only "
            f"{loaded.config.vocab_size}; give the model's own with --tokenizer"
        )
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval(), loaded_tokenizer
