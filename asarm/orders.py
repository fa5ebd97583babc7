"""Who is decoded when, and what each row may see.

An :class:`Order` says at which step (rank) each position is decoded. The given tokens (the prompt) hold the ranks ``0
.. n_visible-1``. In the default order both the prompt and the masked part are in ascending position (the paper's
"mask decomposition": 2^N orders instead of N!).

The network computes *rows* (:class:`Rows`). A content row carries a token at a position, a query row only a position.
Each row has a *limit*: it sees every token whose rank is below its limit. This one comparison is the only attention
mask of the program (:func:`may_attend`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .errors import ConfigError


@dataclass(frozen=True)
class Order:
    """A decoding order for each sequence of a batch.

    ``order_BN[b, r]`` is the position decoded at rank ``r`` and ``rank_BN`` is its inverse. Ranks below
    ``n_visible_B`` are given. Positions from ``length_B`` on are padding: they hold the last ranks and no limit ever
    reaches them.
    """

    order_BN: torch.Tensor
    rank_BN: torch.Tensor
    n_visible_B: torch.Tensor
    length_B: torch.Tensor

    @classmethod
    def from_visible(cls, visible_BN: torch.Tensor, length_B: torch.Tensor | None = None) -> "Order":
        """The mask-decomposition order of a bool mask (True = given)."""
        if visible_BN.ndim != 2 or visible_BN.dtype != torch.bool:
            raise ConfigError(
                f"visible_BN must be a bool tensor [batch, length], got {visible_BN.dtype} {list(visible_BN.shape)}"
            )
        B, N = visible_BN.shape
        position_N = torch.arange(N, device=visible_BN.device)
        length_B = _lengths(length_B, B, N, visible_BN.device)
        padding_BN = position_N >= length_B[:, None]
        part_BN = torch.where(padding_BN, 2, torch.where(visible_BN, 0, 1))
        order_BN = (part_BN * N + position_N).argsort(dim=1)
        return cls.from_permutation(order_BN, (visible_BN & ~padding_BN).sum(1), length_B)

    @classmethod
    def from_permutation(
        cls, order_BN: torch.Tensor, n_visible_B: torch.Tensor, length_B: torch.Tensor | None = None
    ) -> "Order":
        """Any permutation of the positions, its first ``n_visible_B`` entries being given."""
        B, N = order_BN.shape
        position_N = torch.arange(N, device=order_BN.device)
        if not torch.equal(order_BN.sort(dim=1).values, position_N.expand(B, N)):
            raise ConfigError("each row of order_BN must hold every position 0 .. N-1 exactly once")
        rank_BN = order_BN.argsort(dim=1)
        length_B, n_visible_B = _lengths(length_B, B, N, order_BN.device), n_visible_B.to(order_BN.device)
        if bool(((n_visible_B < 0) | (n_visible_B > length_B)).any()):
            raise ConfigError(f"n_visible_B must lie between 0 and the length, got {n_visible_B.tolist()}")
        return cls(order_BN, rank_BN, n_visible_B, length_B)

    @classmethod
    def left_to_right(cls, n_visible_B: torch.Tensor, length: int) -> "Order":
        """Ordinary autoregression: the first ``n_visible_B`` positions are given, the others follow in order."""
        order_BN = torch.arange(length, device=n_visible_B.device).expand(len(n_visible_B), length)
        return cls.from_permutation(order_BN.contiguous(), n_visible_B)

    @property
    def n_masked_B(self) -> torch.Tensor:
        return self.length_B - self.n_visible_B

    @property
    def target_BN(self) -> torch.Tensor:
        """True at the positions to predict."""
        return (self.rank_BN >= self.n_visible_B[:, None]) & (self.rank_BN < self.length_B[:, None])

    def to(self, device: torch.device | str) -> "Order":
        return Order(*(t.to(device) for t in (self.order_BN, self.rank_BN, self.n_visible_B, self.length_B)))

    def of(self, sequences: slice | torch.Tensor) -> "Order":
        """The orders of some of the sequences."""
        return Order(*(t[sequences] for t in (self.order_BN, self.rank_BN, self.n_visible_B, self.length_B)))


def _lengths(length_B: torch.Tensor | None, B: int, N: int, device: torch.device) -> torch.Tensor:
    if length_B is None:
        return torch.full((B,), N, device=device)
    if bool(((length_B < 1) | (length_B > N)).any()):
        raise ConfigError(f"length_B must lie between 1 and {N}, got {length_B.tolist()}")
    return length_B.to(device)


def random_visible(
    length: int, visible_fraction: float, generator: np.random.Generator, rounded: Callable[[float], int] = round
) -> torch.Tensor:
    """A random subset of ``rounded(visible_fraction * length)`` given positions, as a bool tensor [length].

    At least one position is left to predict.
    """
    if not 0 <= visible_fraction < 1:
        raise ConfigError(f"visible_fraction must be in [0, 1), got {visible_fraction}")
    n_visible = min(rounded(visible_fraction * length), length - 1)
    visible_N = torch.zeros(length, dtype=torch.bool)
    visible_N[torch.from_numpy(generator.permutation(length)[:n_visible])] = True
    return visible_N


def random_spans(
    length: int, visible_fraction: float, generator: np.random.Generator, max_spans: int = 8
) -> torch.Tensor:
    """As :func:`random_visible`, but the positions to predict are one to ``max_spans`` contiguous spans, as gaps in
    texts and programs are. Spans that touch are one."""
    visible_N = random_visible(length, visible_fraction, generator)
    n_visible = int(visible_N.sum())
    n_spans = min(int(generator.integers(1, max_spans + 1)), length - n_visible)
    # where the masked tokens are cut into spans, and how many given ones stand before each span
    cuts = np.sort(generator.choice(np.arange(1, length - n_visible), n_spans - 1, replace=False))
    before = np.sort(generator.integers(0, n_visible + 1, n_spans))
    masked = np.arange(length - n_visible)
    visible_N[:] = True
    visible_N[torch.from_numpy(masked + before[np.searchsorted(cuts, masked, side="right")])] = False
    return visible_N


def may_attend(rank_BN: torch.Tensor, limit_BR: torch.Tensor) -> torch.Tensor:
    """The attention mask [B, R, N]: True where a row may attend to a slot."""
    return rank_BN[:, None, :] < limit_BR[:, :, None]


@dataclass(frozen=True)
class Rows:
    """Positions and limits of the rows of one call; ``valid_BR`` is False for the rows that only fill a ragged batch.

    An invalid row has position and rank N (one past the last: the cache keeps a scratch slot there) and limit 0.
    """

    position_BR: torch.Tensor
    limit_BR: torch.Tensor
    valid_BR: torch.Tensor
    rank_BR: torch.Tensor

    def followed_by(self, other: "Rows") -> "Rows":
        """These rows and then those of ``other``."""
        return Rows(*(torch.cat([vars(self)[name], vars(other)[name]], dim=1) for name in vars(self)))

    def remove_(self, sequence_B: torch.Tensor, length: int) -> None:
        """Make the rows of the given sequences (of ``length`` positions) invalid, in place."""
        invalid = {"position_BR": length, "limit_BR": 0, "valid_BR": False, "rank_BR": length}
        for name, value in invalid.items():
            vars(self)[name].index_fill_(0, sequence_B, value)

    def copy_(self, other: "Rows") -> None:
        """Take over the values of ``other``, in place."""
        for name, value in vars(self).items():
            value.copy_(vars(other)[name])

    def at(self, index_B: torch.Tensor) -> "Rows":
        """Row ``index_B`` of each sequence, as rows of width one."""
        return Rows(*(value_BR.gather(1, index_B[:, None]) for value_BR in vars(self).values()))


def rows_from(x_BRM: torch.Tensor, first_B: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` rows of each sequence from its row ``first_B`` on, [B, count, M]; first + count is at most R."""
    B, R = x_BRM.shape[:2]
    if count == R:
        return x_BRM
    place_BC = first_B[:, None] + torch.arange(count, device=first_B.device)
    return x_BRM[torch.arange(B, device=first_B.device)[:, None], place_BC]


def rows_with_limit(order: Order, rank_BR: torch.Tensor, limit_BR: torch.Tensor, end_B: torch.Tensor) -> Rows:
    """Rows at any ranks with any limits; those at or past ``end_B`` are invalid."""
    N = order.order_BN.shape[1]
    valid_BR = rank_BR < end_B[:, None]
    position_BR = order.order_BN.gather(1, rank_BR.clamp(max=N - 1))
    return Rows(
        position_BR=torch.where(valid_BR, position_BR, N),
        limit_BR=torch.where(valid_BR, limit_BR, 0),
        valid_BR=valid_BR,
        rank_BR=torch.where(valid_BR, rank_BR, N),
    )


def rows_at_ranks(order: Order, start_B: torch.Tensor, end_B: torch.Tensor, width: int) -> Rows:
    """The query rows of ranks ``start_B .. end_B-1``, padded to ``width``: each sees what precedes its own rank."""
    rank_BR = start_B[:, None] + torch.arange(width, device=start_B.device)
    return rows_with_limit(order, rank_BR, rank_BR, end_B)


def require_token_ids(ids: torch.Tensor, vocab_size: int) -> None:
    """Raise :class:`ConfigError` for ids outside the vocabulary."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ConfigError(f"token ids must lie in 0 .. {vocab_size - 1}, got {int(ids.min())} .. {int(ids.max())}")


def content_limit(order: Order, rank_BR: torch.Tensor) -> torch.Tensor:
    """The limit of a content row: the prompt sees the whole prompt, a later token what came before it, and itself."""
    return torch.maximum(rank_BR + 1, order.n_visible_B[:, None])
