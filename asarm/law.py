"""Logits to distribution: the only place where a law of the next token is made.

Draft, target and scoring all go through one :class:`Law`, so that temperature and banned tokens mean the same in each
of them. A banned token's probability is zero *before* the softmax. Distributions are float64: a draw rounded to
float32 is measurably biased.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from .errors import ConfigError
from .rng import race_times


@dataclass(frozen=True)
class Law:
    """Temperature, banned token ids, greedy choice (all mass on the most likely token), and truncation: the ``top_k``
    most likely tokens, or the fewest that hold a share ``top_p`` of the mass (the nucleus), of those the others leave.
    """

    temperature: float = 1.0
    banned_ids: tuple[int, ...] = ()
    greedy: bool = False
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature must be above 0, got {self.temperature}; for the most likely token use greedy"
            )

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [..., V] in float64 (-inf where banned or cut off)."""
        return torch.log_softmax(self._shaped(logits), dim=-1)

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities [..., V] in float64."""
        return torch.softmax(self._shaped(logits), dim=-1)

    def _shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of the law, in float64."""
        scaled = logits.to(torch.float64, copy=True)
        if self.temperature != 1:
            scaled.div_(self.temperature)
        if self.banned_ids:
            scaled.index_fill_(-1, ids_on(logits.device, self.banned_ids), -torch.inf)
        if self.greedy:
            best = scaled.argmax(-1, keepdim=True)
            return torch.full_like(scaled, -torch.inf).scatter_(-1, best, 0.0)
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k, dim=-1).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if self.top_p is not None:
            scaled = scaled.masked_fill(_outside_nucleus(scaled, self.top_p), -torch.inf)
        return scaled


@torch.compiler.assume_constant_result
def ids_on(device: torch.device, ids: tuple[int, ...]) -> torch.Tensor:
    """Token ids as a tensor, made once: a copy to the device in every call would stall it."""
    return _ids_on(device, ids)


@cache
def _ids_on(device: torch.device, ids: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.long, device=device)


def _outside_nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """True for the tokens [..., V] that the likelier ones make superfluous: those hold ``top_p`` already."""
    prob, token = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    superfluous = prob.cumsum(-1) - prob >= top_p
    return torch.zeros_like(superfluous).scatter_(-1, token, superfluous)


def draw(weight: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A token from the distribution proportional to ``weight`` [..., V]; the same ``uniform`` [...] gives the same one.

    An exponential race (the Gumbel-max trick): the token whose exponential time, at its weight as rate, is the
    shortest. Two stages, a group of tokens and a token of it, take about 2 sqrt(V) times instead of V. Unlike
    inverting the cumulative sum, where every error moves all boundaries after it, a race lets rounding of the weights
    decide only a photo finish; so a sequence's tokens do not depend on the batch or the kernel that computed them. A
    token of weight zero never wins.
    """
    return winner(weight, start_race(uniform, weight.shape[-1]))


def start_race(uniform: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The times [..., groups + size of a group] of a :func:`draw` with ``uniform`` [...]. They do not depend on the
    weights: those of draws that follow from each other are made at once."""
    size = _group_size(vocab_size)
    return race_times(uniform, vocab_size // size + size)


def winner(weight: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The token [...] that wins the race over ``time`` (:func:`start_race`) at ``weight`` [..., V]."""
    size = _group_size(weight.shape[-1])
    weight_XGM = weight.unflatten(-1, (-1, size))
    time_XG, time_XM = time.split([weight_XGM.shape[-2], size], dim=-1)
    group_X1 = (time_XG / weight_XGM.sum(-1)).argmin(-1, keepdim=True)
    weight_XM = weight_XGM.take_along_dim(group_X1[..., None], dim=-2).squeeze(-2)
    return (group_X1 * size + (time_XM / weight_XM).argmin(-1, keepdim=True)).squeeze(-1)


def _group_size(vocab_size: int) -> int:
    """The divisor nearest below the square root, so that groups are equal. (A prime vocabulary is one race of all.)"""
    return next(size for size in range(math.isqrt(vocab_size), 0, -1) if vocab_size % size == 0)
