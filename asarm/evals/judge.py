"""Generative perplexity: what a causal language model, the judge, makes of the texts.

Every token of a text is scored exactly once, the first after the judge's begin-of-text token where it has one. A text
longer than the judge's window is read in windows that overlap by half, each scoring only what the one before did not.
A text of which no token is scored has no perplexity: an error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import TextError
from ..loading import load_causal, this_device
from .metrics import token_entropy


@dataclass(frozen=True)
class Window:
    """Tokens ``ids`` of text number ``text``; those from ``first`` on are scored, given all before them."""

    text: int
    ids: list[int]
    first: int


def windows(text: int, ids: list[int], length: int) -> Iterator[Window]:
    """Windows of at most ``length`` tokens that score every token but the first once, with at least half a window of
    context wherever so much precedes it."""
    start, scored = 0, 1
    while scored < len(ids):
        end = min(start + length, len(ids))
        yield Window(text, ids[start:end], scored - start)
        start, scored = end - length // 2, end


class Judge:
    """A causal language model by name: a folder, or a Hub id, with ``@revision`` or without.

    A name that leads nowhere is an error at once; the weights are loaded when the first text is scored. With
    ``longest`` a text is cut after so many of the judge's tokens, decoded, and encoded again (the cut may part a word).
    """

    def __init__(self, name: str, longest: int | None = None):
        self.name, self.longest = name, longest
        self.tokenizer = load_causal(AutoTokenizer, name)
        config = load_causal(AutoConfig, name)
        known = self.tokenizer.model_max_length
        self.window_length = min(known, getattr(config, "max_position_embeddings", known))

    @cached_property
    def model(self) -> torch.nn.Module:
        return load_causal(AutoModelForCausalLM, self.name, dtype=torch.float32).to(this_device()).eval()

    def tokens(self, text: str) -> list[int]:
        """A text's own ids, all of them."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def encode(self, text: str) -> list[int]:
        """What is read of a text: the first id is given, the others are scored."""
        ids = self.tokens(text)
        if self.longest is not None and len(ids) > self.longest:
            ids = self.tokens(self.tokenizer.decode(ids[: self.longest], clean_up_tokenization_spaces=False))
        return [*([] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]), *ids]

    def reads(self, text: str) -> bool:
        """Whether a text has a token to score."""
        return len(self.encode(text)) > 1

    def require_tokens(self, text: str, name: str) -> None:
        """Raise :class:`TextError`, with the text's ``name``, where no token would be scored."""
        if not self.reads(text):
            raise TextError(
                f"the judge {self.name} reads no token of {name}, {text[:60]!r}, which therefore has no perplexity; "
                "leave the judge out, or let longer texts be drawn"
            )

    def entropy(self, text: str) -> float:
        """Entropy in bits of the frequencies of the text's tokens, all of them."""
        return token_entropy(self.tokens(text))

    def score(self, texts: list[str], batch_size: int) -> list[tuple[int, float]]:
        """For each text the number of scored tokens and their summed negative log-likelihood (nats).

        Raises :class:`TextError` for a text of which no token is scored.
        """
        for number, text in enumerate(texts, 1):
            self.require_tokens(text, f"text {number}")
        todo = [w for number, text in enumerate(texts) for w in windows(number, self.encode(text), self.window_length)]
        tokens, nll = [0] * len(texts), [0.0] * len(texts)
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            for window, value in zip(batch, self._nll(batch), strict=True):
                tokens[window.text] += len(window.ids) - window.first
                nll[window.text] += value
        return list(zip(tokens, nll, strict=True))

    @torch.no_grad()
    def _nll(self, batch: list[Window]) -> list[float]:
        """Summed negative log-likelihood of each window's scored tokens."""
        length, device = max(len(window.ids) for window in batch), self.model.device
        ids_BN = torch.zeros(len(batch), length, dtype=torch.long)
        given_BN, scored_BN = torch.zeros_like(ids_BN), torch.zeros(len(batch), length, dtype=torch.bool)
        for b, window in enumerate(batch):
            ids_BN[b, : len(window.ids)] = torch.tensor(window.ids)
            given_BN[b, : len(window.ids)] = 1
            scored_BN[b, window.first : len(window.ids)] = True
        ids_BN, given_BN = ids_BN.to(device), given_BN.to(device)
        logits_BNV = self.model(input_ids=ids_BN, attention_mask=given_BN).logits[:, :-1].float()
        nll_BN = F.cross_entropy(logits_BNV.transpose(1, 2), ids_BN[:, 1:], reduction="none").double()
        return nll_BN.where(scored_BN[:, 1:].to(device), 0).sum(1).tolist()
