"""A draft head prepared for sampling: packed weights, one token a step.

A round's steps come after the trunk's call and before the next one, so they must be cheap. What does not depend on
the tokens is computed for all rows at once; a step is then a look-up, a narrow layer, and a correction of low rank to
logits that the trunk has given already. No step multiplies by the trunk's own vocabulary matrix.
"""

import weakref
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .draft_head import DraftHead, find_draft_head, require_trunk
from .engine import Projection, can_pack
from .network import Network
from .orders import rows_from


@dataclass(frozen=True)
class Window:
    """What the trunk says of W consecutive ranks: its query states, which all see the same tokens.

    ``distance_BW`` is that from the position one rank before each row to the row's; ``n_missing`` is how many tokens
    before it the first row's state has not seen (each later one misses one more).
    """

    states_BWE: torch.Tensor
    distance_BW: torch.Tensor
    n_missing: int


class Drafter:
    """``head`` with its weights as sampling wants them."""

    @torch.no_grad()
    def __init__(self, head: DraftHead, compile: bool = False):
        packed = not compile and can_pack(head.device, head.dtype)
        # packed, a narrow float32 layer takes longer (29 instead of 11 microseconds for 256 x 768)
        narrow_packed = packed and head.dtype == torch.bfloat16

        def projection(linear: torch.nn.Linear, activation: str | None = None) -> Projection:
            return Projection(linear.weight.detach(), linear.bias, activation, narrow_packed)

        layer = head.layer
        self.head, self.config = head, head.config
        self.token_VM = head.from_token(head.token.weight)
        self.query_key_value, self.out = projection(layer.qkv), projection(layer.out)
        self.inner, self.outer = projection(layer.mlp[0], "gelu"), projection(layer.mlp[2])
        self.correction = projection(head.correction)
        self.vocabulary = Projection(head.vocabulary.weight.detach(), None, None, packed)
        self.from_state = projection(head.from_state)

    def begin(
        self, window: Window, base_logits_BKV: torch.Tensor, first_B: torch.Tensor, known_ids_BC: torch.Tensor
    ) -> "DraftSteps":
        """A round that drafts K tokens one by one, from row ``first_B`` of the window on.

        Args:
            base_logits_BKV: the trunk's logits of the states of the K rows to be drafted.
            first_B: at most W - K. The rows before it are context: their tokens are settled.
            known_ids_BC: the token before each of the first C = W - K rows; not read where that is not settled.
        """
        return DraftSteps(self, window, base_logits_BKV, first_B, known_ids_BC)


class DraftSteps:
    """A round in progress: what the rows know, and the queries, keys and values of the context and of those drafted so
    far."""

    def __init__(self, drafter: Drafter, window: Window, base_logits_BKV, first_B, known_ids_BC):
        (B, W), (C, K) = window.distance_BW.shape, (known_ids_BC.shape[1], base_logits_BKV.shape[1])
        self.drafter, self.base_logits_BKV, self.n_context = drafter, base_logits_BKV, C
        self.first_is_exact = C == 0 and window.n_missing == 0
        device, H = first_B.device, drafter.config.n_head
        missing_BW = (window.n_missing + torch.arange(W, device=device)).expand(B, W)
        mixed_BWM = drafter.from_state(window.states_BWE) + drafter.head.place(window.distance_BW, missing_BW)
        self.key_value_B2HXD = mixed_BWM.new_empty(B, 2, H, C + K, drafter.config.width // H)
        self.mixed_BKM, self.seen_B11X = rows_from(mixed_BWM, first_B, K), None
        if C:
            self._attention_inputs(0, mixed_BWM[:, :C] + F.embedding(known_ids_BC, drafter.token_VM))
            row_X = torch.arange(C + K, device=device)
            self.seen_B11X = ((row_X < first_B[:, None]) | (row_X >= C))[:, None, None]

    def _attention_inputs(self, first: int, x_BXM: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries of the rows from ``first`` on, and keys and values of all rows up to them, [B, H, X, D]."""
        (B, X, _), (H, D) = x_BXM.shape, self.key_value_B2HXD.shape[2::2]
        qkv_BXY = self.drafter.query_key_value(self.drafter.head.layer.norm_1(x_BXM))
        qkv_B3HXD = qkv_BXY.view(B, X, 3, H, D).permute(0, 2, 3, 1, 4)
        seen_B2HXD = self.key_value_B2HXD[..., : first + X, :]
        seen_B2HXD[..., first:, :] = qkv_B3HXD[:, 1:]
        return qkv_B3HXD[:, 0], *seen_B2HXD.unbind(1)

    def step(self, j: int, previous_ids_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the ``j``-th drafted row given the token before it; rows come in order, 0 first."""
        drafter, layer, last = self.drafter, self.drafter.head.layer, self.n_context + j
        x_B1M = self.mixed_BKM[:, j : j + 1] + F.embedding(previous_ids_B[:, None], drafter.token_VM)
        attention_inputs = self._attention_inputs(last, x_B1M)
        if j == 0 and self.first_is_exact:
            return self.base_logits_BKV[:, 0]
        seen_B11X = None if self.seen_B11X is None else self.seen_B11X[..., : last + 1]
        attended_BH1D = F.scaled_dot_product_attention(*attention_inputs, seen_B11X)
        x_B1M = drafter.out(attended_BH1D.transpose(1, 2).flatten(2), x_B1M)
        x_B1M = drafter.outer(drafter.inner(layer.norm_2(x_B1M)), x_B1M)
        correction_BX = drafter.correction(drafter.head.norm(x_B1M))[:, 0]
        return drafter.vocabulary(correction_BX, self.base_logits_BKV[:, j])


_HEADS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by trunk
_DRAFTERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by trunk and whether they are compiled


def attach_draft_head(trunk: Network, head: DraftHead) -> None:
    """Let samplers of ``trunk`` draft with a copy of ``head``, as it is now, instead of one that lies beside the
    trunk's files."""
    require_trunk(head, trunk, "the head to attach")
    _keep(trunk, deepcopy(head))


def load_draft_head(trunk: Network, name_or_path, revision: str = "main") -> None:
    """Let samplers of ``trunk`` draft with the head of a folder or Hub id instead (:meth:`DraftHead.from_pretrained`,
    which refuses one of another trunk)."""
    _keep(trunk, DraftHead.from_pretrained(name_or_path, trunk, revision))


def _keep(trunk: Network, head: DraftHead) -> None:
    _HEADS[trunk], _DRAFTERS[trunk] = head.to(trunk.device, trunk.dtype).eval(), {}


def drafter_of(trunk: Network, compile: bool = False) -> Drafter | None:
    """Of the head that was attached to ``trunk`` or lies beside the files it was loaded from, in the trunk's type and
    on its device; None where there is neither."""
    head = _HEADS.get(trunk)
    if head is None and trunk.name_or_path:
        head = find_draft_head(trunk.name_or_path, trunk, trunk.revision)
    if head is None:
        return None
    if head is not _HEADS.get(trunk) or (head.dtype, head.device) != (trunk.dtype, trunk.device):
        _keep(trunk, head)
    drafters = _DRAFTERS[trunk]
    if compile not in drafters:
        drafters[compile] = Drafter(_HEADS[trunk], compile)
    return drafters[compile]
