"""The state of a batch being decoded, and the network call that every sampler makes.

Sequences are ragged in everything: length, prompt, progress. Each has its own random numbers, three per rank: one to
draft the token, one to accept it, one to draw it from the target (or the residual). A number is used up only when its
rank is settled: a draft that is thrown away because an *earlier* one was refused has not been looked at, so its
number is still fresh. Hence the table can be drawn beforehand, and a sequence's tokens do not depend on its batch.
"""

from dataclasses import dataclass

import torch

from ..cache import SlotCache
from ..config import SamplerConfig
from ..errors import ConfigError
from ..law import Law
from ..memory import call_bytes, require_memory
from ..model import AnySubsetLM
from ..orders import Order, Rows, content_limit, require_token_ids, rows_at_ranks
from ..rng import rank_uniforms


@dataclass(frozen=True)
class Completion:
    """What a sampler returns. All tensors are on the model's device; counts are int64.

    ``ids_BN`` holds prompt and drawn tokens, ``logp_B`` (float64, nats) the log-probability of what was drawn under
    the law it was drawn from (for ``parallel`` that is the product of the marginals, not the model's joint).
    ``nfe_B`` counts the network calls in which the sequence took part, ``aux_nfe_B`` those of an auxiliary draft
    model. ``proposed_B`` drafts were put to the test and ``accepted_B`` of them kept (the first draft of a
    self-drafting round is exact and not counted).
    """

    ids_BN: torch.Tensor
    logp_B: torch.Tensor
    nfe_B: torch.Tensor
    aux_nfe_B: torch.Tensor
    rounds_B: torch.Tensor
    proposed_B: torch.Tensor
    accepted_B: torch.Tensor


def law_of(model: AnySubsetLM, config: SamplerConfig) -> Law:
    """The law that ``config`` samples from: the model's, at a temperature, without the mask token and the banned
    ids."""
    mask = {model.mask_token_id} if model.mask_token_id < model.config.vocab_size else set()
    return Law(config.temperature, tuple(sorted(mask | {*config.banned_ids})), config.greedy)


class Decoding:
    """A batch in progress: ranks below ``settled_B`` are final, ranks below ``cached_B`` have keys and values in the
    cache."""

    def __init__(
        self,
        model: AnySubsetLM,
        ids_BN: torch.Tensor,
        order: Order,
        config: SamplerConfig,
        seed: int,
        indices: list[int],
    ):
        B, N = ids_BN.shape
        self.model, self.order, self.config = model, order, config
        self.law = law_of(model, config)
        self._check(ids_BN, indices)
        # one scratch column past the end, for the rows that only fill the batch
        prompt_BN = ids_BN.where(order.rank_BN < order.n_visible_B[:, None], 0)
        self.ids_BS = torch.cat([prompt_BN, ids_BN.new_zeros(B, 1)], dim=1)
        self.settled_B = order.n_visible_B.clone()
        self.cached_B = torch.zeros_like(self.settled_B)
        self.backlog = int(order.n_visible_B.max())  # at most this many settled tokens of a sequence are not cached
        n_query = (config.k + 1) ** 2 if config.one_pass else config.k + 1
        need = call_bytes(model, B, N, self.backlog + config.k + n_query, B * (config.k + 1))
        require_memory(model, B, N, need)
        self.cache = SlotCache(model, B, N)
        uniforms = rank_uniforms(seed, indices, N, 3).to(ids_BN.device)
        self.draft_uniform_BN, self.accept_uniform_BN, self.target_uniform_BN = uniforms
        self.logp_B = torch.zeros(B, dtype=torch.float64, device=ids_BN.device)
        zero_B = torch.zeros_like(self.settled_B)
        self.nfe_B, self.aux_nfe_B, self.rounds_B, self.proposed_B, self.accepted_B = (zero_B.clone() for _ in range(5))

    def _check(self, ids_BN: torch.Tensor, indices: list[int]) -> None:
        if self.order.order_BN.shape != ids_BN.shape or len(indices) != len(ids_BN):
            raise ConfigError(
                f"ids {list(ids_BN.shape)}, order {list(self.order.order_BN.shape)} and {len(indices)} indices "
                "do not match"
            )
        vocab_size = self.model.config.vocab_size
        require_token_ids(ids_BN[self.order.rank_BN < self.order.n_visible_B[:, None]], vocab_size)
        if any(not 0 <= i < vocab_size for i in self.law.banned_ids) or len(self.law.banned_ids) >= vocab_size:
            raise ConfigError(f"banned_ids {self.law.banned_ids} must be some, not all, of 0 .. {vocab_size - 1}")

    @property
    def remaining_B(self) -> torch.Tensor:
        return self.order.length_B - self.settled_B

    def most_remaining(self) -> int:
        """Tokens still to draw in the sequence that has most of them (the one synchronisation of a round)."""
        return int(self.remaining_B.max())

    def begin_round(self) -> None:
        self.rounds_B += self.remaining_B > 0

    def rows(self, start_B: torch.Tensor, end_B: torch.Tensor, width: int) -> Rows:
        return rows_at_ranks(self.order, start_B, torch.minimum(end_B, self.order.length_B), width)

    def call(self, query: Rows, **arguments) -> torch.Tensor:
        """Logits [B, Q, V] of the query rows; one network call (:meth:`hidden`)."""
        return self.model.logits(self.hidden(query, **arguments))

    def hidden(
        self,
        query: Rows,
        draft_end_B: torch.Tensor | None = None,
        n_drafts: int = 0,
        limit_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One network call: hidden states [B, Q, E] of the query rows.

        The content rows are the settled tokens that are not cached yet and the drafts up to rank ``draft_end_B`` (at
        most ``n_drafts``). Query rows see what precedes their own rank, or with ``limit_B`` what precedes that rank.
        """
        end_B = self.settled_B if draft_end_B is None else draft_end_B
        content = self.rows(self.cached_B, end_B, self.backlog + n_drafts)
        content_limit_BC = torch.where(content.valid_BR, content_limit(self.order, content.rank_BR), 0)
        query_limit_BQ = query.limit_BR if limit_B is None else query.limit_BR.clamp(max=limit_B[:, None])
        hidden_BQE = self.model(
            self.ids_BS.gather(1, content.position_BR),
            torch.cat([content.position_BR, query.position_BR], dim=1),
            torch.cat([content_limit_BC, query_limit_BQ], dim=1),
            self.order.rank_BN,
            self.cache,
        )
        self.nfe_B += query.valid_BR.any(dim=1)
        self.cached_B, self.backlog = self.settled_B.clone(), 0
        return hidden_BQE

    def uniforms(self, table_BN: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The random numbers [B, R] of the rows' ranks."""
        return table_BN.gather(1, rows.rank_BR.clamp(max=table_BN.shape[1] - 1))

    def put(self, rows: Rows, ids_BR: torch.Tensor) -> None:
        """Write tokens at the rows' positions (those of invalid rows land in the scratch column)."""
        self.ids_BS.scatter_(1, rows.position_BR, ids_BR)

    def settle(self, settled_B: torch.Tensor, cached_B: torch.Tensor, backlog: int) -> None:
        """Everything below ``settled_B`` is final; below ``cached_B`` it is cached, which leaves at most ``backlog``
        tokens."""
        self.settled_B = torch.minimum(settled_B, self.order.length_B)
        self.cached_B, self.backlog = torch.minimum(cached_B, self.settled_B), backlog

    def completion(self) -> Completion:
        return Completion(
            ids_BN=self.ids_BS[:, :-1].clone(),
            logp_B=self.logp_B,
            nfe_B=self.nfe_B,
            aux_nfe_B=self.aux_nfe_B,
            rounds_B=self.rounds_B,
            proposed_B=self.proposed_B,
            accepted_B=self.accepted_B,
        )


def chosen(value_BRV: torch.Tensor, ids_BR: torch.Tensor) -> torch.Tensor:
    """The entry of each row's chosen token: [B, R, V] and [B, R] -> [B, R]."""
    return value_BRV.gather(-1, ids_BR[..., None]).squeeze(-1)
