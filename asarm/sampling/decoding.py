"""The state of sequences being decoded, and the network call that every sampler makes.

Sequences wait in a list and are decoded ``batch_size`` at a time, each in a *lane*. A sequence that is finished makes
room for the next one at once (continuous batching). Lanes are ragged in everything: length, prompt, progress. Each
sequence has its own random numbers, and uses none twice: for every rank one to draw its token from the target (or the
residual) and, for every place among a round's k drafts, one to draft it and one to accept it there. (A rank may be
drafted in several rounds, but they begin at different ranks, so in each it has another place.) Hence the table can be
drawn beforehand, and a sequence's tokens do not depend on what it shares its batch with.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..config import SamplerConfig, require
from ..drafter import Drafter, drafter_of
from ..engine import ROWS_AT_A_TIME, engine_of
from ..errors import ConfigError
from ..law import Law
from ..memory import call_bytes, require_memory
from ..network import Network
from ..orders import Order, Rows, content_limit, require_token_ids, rows_at_ranks
from ..rng import rank_uniforms


@dataclass(frozen=True)
class Completion:
    """What a sampler returns. All tensors are on the model's device; counts are int64.

    ``ids_BN`` holds prompt and drawn tokens, ``logp_B`` (float64, nats) the log-probability of what was drawn under
    the law it was drawn from (for ``parallel`` that is the product of the marginals, not the model's joint).
    ``nfe_B`` counts the network calls that computed a prediction for the sequence, ``aux_nfe_B`` those of an auxiliary
    draft model; entering a prompt into the cache predicts nothing and is not counted. ``proposed_BK`` drafts were put
    to the test and ``accepted_BK`` of them kept, by draft index; the first draft of a two-pass round is exact and not
    counted.
    ``seconds_B`` (float64) is the sequence's share of the wall clock: each round's time, in equal parts.
    """

    ids_BN: torch.Tensor
    logp_B: torch.Tensor
    nfe_B: torch.Tensor
    aux_nfe_B: torch.Tensor
    rounds_B: torch.Tensor
    proposed_BK: torch.Tensor
    accepted_BK: torch.Tensor
    seconds_B: torch.Tensor

    @property
    def proposed_B(self) -> torch.Tensor:
        return self.proposed_BK.sum(1)

    @property
    def accepted_B(self) -> torch.Tensor:
        return self.accepted_BK.sum(1)


@dataclass(frozen=True)
class Draft:
    """Drafted tokens: their rows, ids [B, K] and the distributions [B, K, V] that they were drawn from.

    Their values may change in place.
    """

    rows: Rows
    ids_BK: torch.Tensor
    probs_BKV: torch.Tensor

    @classmethod
    def none(cls, rows: Rows, vocab_size: int) -> "Draft":
        """Of rows of which none is valid."""
        ids_BK = torch.zeros_like(rows.rank_BR)
        return cls(rows, ids_BK, torch.zeros(*ids_BK.shape, vocab_size, dtype=torch.float64, device=ids_BK.device))

    def copy_(self, other: "Draft") -> None:
        """Take over the values of ``other``, in place."""
        self.rows.copy_(other.rows)
        self.ids_BK.copy_(other.ids_BK)
        self.probs_BKV.copy_(other.probs_BKV)


COUNTS = ("nfe_B", "aux_nfe_B", "rounds_B", "proposed_BK", "accepted_BK")
PREFILL_ROWS = 4096  # prompt tokens, padding included, that enter the cache in one call


def law_of(model: Network, config: SamplerConfig) -> Law:
    """The law that ``config`` samples from: the model's, without the mask token and the banned ids, shaped by
    temperature (1 with ``draft_only_temperature``), top-k and top-p."""
    mask = {model.mask_token_id} if model.mask_token_id < model.config.vocab_size else set()
    temperature = 1.0 if config.draft_only_temperature else config.temperature
    banned_ids = tuple(sorted(mask | {*config.banned_ids}))
    return Law(temperature, banned_ids, config.greedy, config.top_k, config.top_p)


def drafter_for(model: Network, config: SamplerConfig) -> Drafter | None:
    """The draft head's drafter that the sampler needs, if it does; raises :class:`ConfigError` where the model has
    none."""
    if config.sampler.drafts != "head":
        return None
    if (drafter := drafter_of(model, config.compile)) is None:
        raise ConfigError(
            f"model {model.name_or_path or '(made in memory)'!r} has no draft head for the sampler assd-head; train "
            "one with python -m asarm train-draft-head, or use another sampler"
        )
    return drafter


def require_memory_for_decoding(model: Network, config: SamplerConfig, batch: int, length: int, n_visible: int) -> None:
    """Raise :class:`~asarm.errors.MemoryBudgetError` where decoding such a batch, of which at most ``n_visible`` tokens
    a sequence are given, would not fit."""
    rows = 1 + config.k + config.sampler.query_rows(config.k)
    n_prefill = min(n_visible, max(ROWS_AT_A_TIME, PREFILL_ROWS // batch))
    decoding = call_bytes(model, batch, length, rows, batch * (config.k + 1))
    require_memory(model, batch, length, max(decoding, call_bytes(model, batch, length, n_prefill, 0)))


class Decoding:
    """Sequences in progress: of each lane, ranks below ``settled_B`` are final and ranks below ``cached_B`` are in the
    cache."""

    def __init__(
        self,
        model: Network,
        ids_TN: torch.Tensor,
        order: Order,
        config: SamplerConfig,
        seed: int,
        indices: list[int],
        batch_size: int,
    ):
        self.model, self.config, self.law = model, config, law_of(model, config)
        self.draft_law = replace(self.law, temperature=config.temperature)
        self.drafter = drafter_for(model, config)
        self._check(ids_TN, order, indices, batch_size)
        self._waiting, self._waiting_ids_TN, self._seed, self._indices = order, ids_TN, seed, indices
        self._n_visible_T, self._length_T = order.n_visible_B.tolist(), order.length_B.tolist()
        self._next = 0  # the sequence to enter next
        self._number_in: dict[int, int] = {}  # lane -> number of the sequence in it

        (T, N), device = ids_TN.shape, ids_TN.device
        B = min(batch_size, T)
        require_memory_for_decoding(model, config, B, N, max(self._n_visible_T))
        self.engine = engine_of(model, config.compile)
        self.cache = self.engine.new_cache(B, N)
        self.order = Order(*(value[:1].expand(B, *value.shape[1:]).clone() for value in vars(order).values()))
        self.ids_BS = ids_TN.new_zeros(B, N + 1)  # a scratch column past the end, for rows that only fill the batch
        self.settled_B = self.order.length_B.clone()  # a lane without a sequence has nothing left to draw
        self.cached_B, self.backlog = self.settled_B.clone(), 1  # at most ``backlog`` settled tokens are not cached
        self.uniform_XBN = torch.zeros(1 + 2 * config.k, B, N, dtype=torch.float64, device=device)
        by_purpose = self.uniform_XBN.split([1, config.k, config.k])
        self.target_uniform_1BN, self.draft_uniform_KBN, self.accept_uniform_KBN = by_purpose
        self.draft: Draft | None = None  # where rounds draft ahead: what the next call verifies
        if config.sampler.drafts_ahead:
            self.draft = Draft.none(self.rows(self.settled_B, self.settled_B, config.k), model.config.vocab_size)
        self.logp_B = torch.zeros(B, dtype=torch.float64, device=device)
        self.nfe_B, self.aux_nfe_B, self.rounds_B = torch.zeros(3, B, dtype=torch.long, device=device)
        self.proposed_BK, self.accepted_BK = torch.zeros(2, B, config.k, dtype=torch.long, device=device)
        self._seconds_B = [0.0] * B
        self.several_left, self.n_slots = True, N  # of this round, see :meth:`run`

    def _check(self, ids_TN: torch.Tensor, order: Order, indices: list[int], batch_size: int) -> None:
        require(len(ids_TN) >= 1, "ids", list(ids_TN.shape), "at least one sequence")
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        if order.order_BN.shape != ids_TN.shape or len(indices) != len(ids_TN):
            raise ConfigError(
                f"ids {list(ids_TN.shape)}, order {list(order.order_BN.shape)} and {len(indices)} indices do not match"
            )
        vocab_size = self.model.config.vocab_size
        require_token_ids(ids_TN[order.rank_BN < order.n_visible_B[:, None]], vocab_size)
        if any(not 0 <= i < vocab_size for i in self.law.banned_ids) or len(self.law.banned_ids) >= vocab_size:
            raise ConfigError(f"banned_ids {self.law.banned_ids} must be some, not all, of 0 .. {vocab_size - 1}")

    def run(self, play_round: Callable[["Decoding"], None]) -> Iterator[tuple[list[int], Completion]]:
        """Decode every sequence; yields those that finish, by number, with their completions.

        ``play_round`` moves all lanes forward by one round. ``several_left`` tells it whether a lane has (or, where
        shapes do not change, may have) more than one token left to draw, ``n_slots`` how far limits may reach: all that
        it may ask of the one number a lane that is read back from the device between two rounds.
        """
        remaining = [0] * len(self.settled_B)
        while True:
            if finished := [lane for lane in self._number_in if remaining[lane] == 0]:
                yield self._leave(finished)
            start = time.perf_counter()
            free = [lane for lane in range(len(remaining)) if lane not in self._number_in]
            if entering := dict(zip(free, range(self._next, len(self._length_T)), strict=False)):
                self._enter(entering)
                for lane, number in entering.items():
                    remaining[lane] = self._length_T[number] - self._n_visible_T[number]
            if not self._number_in:
                return
            if any(remaining):
                if not self.engine.static:
                    self.several_left = max(remaining) > 1
                    furthest = max(self._length_T[number] - remaining[lane] for lane, number in self._number_in.items())
                    self.n_slots = min(self.cache.length, furthest + self.config.k + 1)
                play_round(self)
                remaining = self.remaining_B.tolist()
            for lane in self._number_in:
                self._seconds_B[lane] += (time.perf_counter() - start) / len(self._number_in)

    def _enter(self, number_in: dict[int, int]) -> None:
        """Put waiting sequences into free lanes and their prompts into the cache."""
        numbers, N = list(number_in.values()), self.order.order_BN.shape[1]
        device = self.settled_B.device
        lane_B, number_B = torch.tensor(list(number_in), device=device), torch.tensor(numbers, device=device)
        for name, value in vars(self.order).items():
            value[lane_B] = getattr(self._waiting, name)[number_B]
        prompt_BN = self.order.rank_BN[lane_B] < self.order.n_visible_B[lane_B, None]
        self.ids_BS[lane_B, :N] = self._waiting_ids_TN[number_B].where(prompt_BN, 0)
        indices = [self._indices[number] for number in numbers]
        target_1BN = rank_uniforms(self._seed, "sample", indices, N, 1)
        places_XBN = rank_uniforms(self._seed, "drafts", indices, N, 2 * self.config.k)
        self.uniform_XBN[:, lane_B] = torch.cat([target_1BN, places_XBN]).to(device)
        self.settled_B[lane_B] = self.cached_B[lane_B] = self.order.n_visible_B[lane_B]
        for value in (self.logp_B, *(getattr(self, name) for name in COUNTS)):
            value[lane_B] = 0
        if self.draft is not None:
            self.draft.rows.remove_(lane_B, N)
        width = max(self._n_visible_T[number] for number in numbers)
        for lane_b in lane_B.split(max(1, PREFILL_ROWS // max(1, width))) if width else ():
            self._prefill(lane_b, width)
        for lane in number_in:
            self._seconds_B[lane] = 0.0
        self._number_in |= number_in
        self._next += len(numbers)

    def _prefill(self, lane_b: torch.Tensor, width: int) -> None:
        order = Order(*(value[lane_b] for value in vars(self.order).values()))
        prompt = rows_at_ranks(order, torch.zeros_like(lane_b), order.n_visible_B, width)
        prompt = replace(prompt, limit_BR=torch.where(prompt.valid_BR, order.n_visible_B[:, None], 0))
        ids_bC = self.ids_BS[lane_b].gather(1, prompt.position_BR)
        self.engine.prefill(ids_bC, prompt, order.order_BN, self.cache, lane_b)

    def _leave(self, lanes: list[int]) -> tuple[list[int], Completion]:
        device = self.settled_B.device
        lane_B = torch.tensor(lanes, device=device)
        seconds_B = torch.tensor([self._seconds_B[lane] for lane in lanes], dtype=torch.float64, device=device)
        counts = {name: getattr(self, name)[lane_B] for name in COUNTS}
        done = Completion(self.ids_BS[lane_B, :-1], self.logp_B[lane_B], **counts, seconds_B=seconds_B)
        return [self._number_in.pop(lane) for lane in lanes], done

    @property
    def remaining_B(self) -> torch.Tensor:
        return self.order.length_B - self.settled_B

    def rows(self, start_B: torch.Tensor, end_B: torch.Tensor, width: int) -> Rows:
        return rows_at_ranks(self.order, start_B, torch.minimum(end_B, self.order.length_B), width)

    def call(self, query: Rows, draft_end_B: torch.Tensor | None = None, n_drafts: int = 0) -> torch.Tensor:
        """Logits [B, Q, V] of the query rows; one network call (:meth:`hidden`)."""
        return self.engine.logits(self.hidden(query, draft_end_B, n_drafts))

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
        rows = replace(content, limit_BR=content_limit_BC).followed_by(replace(query, limit_BR=query_limit_BQ))
        ids_BC = self.ids_BS.gather(1, content.position_BR)
        hidden_BQE = self.engine(ids_BC, rows, self.order.order_BN, self.cache, self.n_slots)
        self.nfe_B += query.valid_BR.any(dim=1)
        self.cached_B.copy_(self.settled_B)
        self.backlog = 0
        return hidden_BQE

    def uniforms(self, table_KBN: torch.Tensor, rank_BK: torch.Tensor) -> torch.Tensor:
        """The random numbers [B, K] of a round's ranks, each at its own place of the K."""
        (K, B, N), device = table_KBN.shape, rank_BK.device
        lane_B1 = torch.arange(B, device=device)[:, None]
        return table_KBN[torch.arange(K, device=device), lane_B1, rank_BK.clamp(max=N - 1)]

    def put(self, rows: Rows, ids_BR: torch.Tensor) -> None:
        """Write tokens at the rows' positions (those of invalid rows land in the scratch column)."""
        self.ids_BS.scatter_(1, rows.position_BR, ids_BR)

    def settle(self, settled_B: torch.Tensor, cached_B: torch.Tensor, backlog: int) -> None:
        """What ends a round: everything below ``settled_B`` is final; below ``cached_B`` it is cached, which leaves at
        most ``backlog`` tokens."""
        self.rounds_B += self.remaining_B > 0
        settled_B = torch.minimum(settled_B, self.order.length_B)
        self.cached_B.copy_(torch.minimum(cached_B, settled_B))
        self.settled_B.copy_(settled_B)
        self.backlog = backlog


def chosen(value_BRV: torch.Tensor, ids_BR: torch.Tensor) -> torch.Tensor:
    """The entry of each row's chosen token: [B, R, V] and [B, R] -> [B, R]."""
    return value_BRV.gather(-1, ids_BR[..., None]).squeeze(-1)
