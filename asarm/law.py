"""Logits to distribution: the only place where a law of the next token is made.

Draft, target and scoring all go through one :class:`Law`, so that temperature and banned tokens mean the same in each
of them. A banned token's probability is zero *before* the softmax. Distributions are float64: a draw rounded to
float32 is measurably biased.
"""

from dataclasses import dataclass

import torch

from .errors import ConfigError


@dataclass(frozen=True)
class Law:
    """Temperature, banned token ids, and greedy choice (all mass on the most likely token)."""

    temperature: float = 1.0
    banned_ids: tuple[int, ...] = ()
    greedy: bool = False

    def __post_init__(self):
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature must be above 0, got {self.temperature}; for the most likely token use greedy"
            )

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [..., V] in float64 (-inf where banned)."""
        scaled = logits.double() / self.temperature
        if self.banned_ids:
            scaled[..., list(self.banned_ids)] = -torch.inf
        if self.greedy:
            best = scaled.argmax(-1, keepdim=True)
            return torch.full_like(scaled, -torch.inf).scatter_(-1, best, 0.0)
        return torch.log_softmax(scaled, dim=-1)

    def probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities [..., V] in float64."""
        return self.log_probs(logits).exp()


def draw(weight: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at quantile ``uniform`` [...] of the distribution proportional to ``weight`` [..., V] (inverse
    transform).

    A token of weight zero is never drawn.
    """
    cdf = weight.cumsum(-1)
    total = cdf[..., -1:]
    quantile = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, quantile, right=True).squeeze(-1)
