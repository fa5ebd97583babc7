"""From texts with gaps to filled texts; from a text and its fills to their log-probability."""

from dataclasses import dataclass, replace

import torch

from .config import SamplerConfig, require
from .density import conditional_log_probs
from .law import Law
from .network import Network
from .orders import Order
from .sampling.decoding import Completion
from .sampling.sample import sample
from .tokenizer import MaskedText, TextTokenizer, require_fills, require_something

BATCH_SIZE = 16  # samples that are drawn together


@dataclass(frozen=True)
class InfillTask:
    """A sequence of tokens, some given; ``index`` keys its random numbers."""

    ids: list[int]
    visible: list[bool]
    index: int = 0

    @classmethod
    def of(cls, masked: MaskedText, index: int = 0) -> "InfillTask":
        """The task of filling a text's gaps."""
        return cls(masked.ids, masked.visible, index)


def collate(tasks: list[InfillTask]) -> tuple[torch.Tensor, Order]:
    """Tasks of any length as one padded batch: ids [B, N] and their order."""
    length_B = torch.tensor([len(t.ids) for t in tasks])
    N = int(length_B.max())
    ids_BN = torch.zeros(len(tasks), N, dtype=torch.long)
    visible_BN = torch.zeros(len(tasks), N, dtype=torch.bool)
    for b, task in enumerate(tasks):
        ids_BN[b, : len(task.ids)] = torch.tensor(task.ids)
        visible_BN[b, : len(task.ids)] = torch.tensor(task.visible)
    return ids_BN, Order.from_visible(visible_BN, length_B)


def complete(model: Network, tasks: list[InfillTask], config: SamplerConfig, seed: int) -> Completion:
    """Sample tasks, a batch at a time."""
    ids_BN, order = collate(tasks)
    return sample(model, ids_BN, order, config, seed, [t.index for t in tasks], BATCH_SIZE)


def infill(
    model: Network,
    tokenizer: TextTokenizer,
    text: str,
    config: SamplerConfig | None = None,
    num_samples: int = 1,
    seed: int = 0,
) -> list[str]:
    """Fill the gaps of ``text`` (``<mask>`` is one token, ``<mask:12>`` twelve) ``num_samples`` times.

    Outside the gaps the text is kept to the byte; a text that the vocabulary cannot hold is refused. Special tokens
    that stand for no text are never drawn. Raises :class:`TextError` for a text without a gap.
    """
    require(num_samples >= 1, "num_samples", num_samples, "at least 1")
    masked = tokenizer.encode_masked(text)
    config = without_special_tokens(config or SamplerConfig(), tokenizer)
    tasks = [InfillTask.of(masked, index) for index in range(num_samples)]
    return [tokenizer.fill(masked, ids) for ids in complete(model, tasks, config, seed).ids_BN.tolist()]


def without_special_tokens(config: SamplerConfig, tokenizer: TextTokenizer) -> SamplerConfig:
    """The same sampler with the vocabulary's special tokens banned: a gap is filled with text."""
    return replace(config, banned_ids=tuple(sorted({*config.banned_ids, *tokenizer.special_ids})))


@dataclass(frozen=True)
class Score:
    """Log-probabilities (nats) of a text's scored tokens, in order of position."""

    tokens: list[str]
    log_probs: list[float]

    @property
    def log_prob(self) -> float:
        return sum(self.log_probs)


def score_text(
    model: Network, tokenizer: TextTokenizer, text: str, fills: list[str] | None = None, law: Law | None = None
) -> Score:
    """Joint log-probability of ``fills``, one for each ``<mask>`` of ``text``; of the whole text where it has none.

    A fill's own number of tokens counts, whatever length the gap asks for.
    """
    require_fills(text, fills or [])
    pieces, fills = (tokenizer.encode_masked(text).pieces, fills) if fills else (["", ""], [text])
    masked = tokenizer.encode_gaps(pieces, fills)
    for fill, gap in zip(fills, masked.gaps, strict=True):
        tokenizer.check_lossless(fill)
        require_something(gap, f"{fill!r}")
    ids_BN, order = collate([InfillTask.of(masked)])
    logp_N = conditional_log_probs(model, ids_BN, order, law)[0].tolist()
    scored = [position for gap in masked.gaps for position in gap]
    return Score([tokenizer.decode([masked.ids[i]]) for i in scored], [logp_N[i] for i in scored])
