"""Logits to distribution: the only place where a law of the next token is made.

Draft, target and scoring all go through one :class:`Law`, so that temperature and banned tokens mean the same in each
of them. A banned token's probability is zero *before* the softmax. Distributions are float64: a draw rounded to
float32 is measurably biased.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from .compiling import constant
from .errors import ConfigError
from .rng import exponentials


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

    def __post_init__(self) -> None:
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


@constant
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

    The exponential form of the Gumbel-max trick: the argmin of independent standard exponential numbers divided by the
    weights. Two stages, a group of tokens and then a token of the group, need about 2 sqrt(V) numbers instead of V.
    Inverting the cumulative sum would let a rounding error move every boundary after it; here rounding matters only
    where two tokens tie, so a sequence's tokens do not depend on the batch or the kernel that computed them. A token of
    weight zero is never drawn.
    """
    return argmin(weight, exponential_noise(uniform, weight.shape[-1]))


def exponential_noise(uniform: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The exponential numbers [..., groups + size of a group] of a :func:`draw` with ``uniform`` [...]. They do not
    depend on the weights, so those of several draws are made at once."""
    size = _group_size(vocab_size)
    return exponentials(uniform, vocab_size // size + size)


def argmin(weight: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The token [...] whose noise (:func:`exponential_noise`) divided by its ``weight`` [..., V] is the smallest."""
    size = _group_size(weight.shape[-1])
    weight_XGM = weight.unflatten(-1, (-1, size))
    noise_XG, noise_XM = noise.split([weight_XGM.shape[-2], size], dim=-1)
    group_X1 = (noise_XG / weight_XGM.sum(-1)).argmin(-1, keepdim=True)
    weight_XM = weight_XGM.take_along_dim(group_X1[..., None], dim=-2).squeeze(-2)
    return (group_X1 * size + (noise_XM / weight_XM).argmin(-1, keepdim=True)).squeeze(-1)


def _group_size(vocab_size: int) -> int:
    """The divisor nearest below the square root, so that groups are equal (of one token, for a
    vocabulary of prime size)."""
    return next(size for size in range(math.isqrt(vocab_size), 0, -1) if vocab_size % size == 0)
