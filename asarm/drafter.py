"""A draft head prepared for sampling: packed weights, one token a step.

A round's steps come after the trunk's call and before the next one, so they must be cheap. What does not depend on
the tokens is computed for all rows at once; a step is then a look-up, a narrow layer, and a correction of low rank to
logits that the trunk has given already. No step multiplies by the trunk's own vocabulary matrix.
"""

import weakref

import torch
from torch.nn import functional as F

from .draft_head import DraftHead, find_draft_head, require_trunk
from .engine import Projection, can_pack
from .model import AnySubsetLM


class Drafter:
    """``head`` with its weights as sampling wants them."""

    @torch.no_grad()
    def __init__(self, head: DraftHead):
        packed = can_pack(head.device, head.dtype)

        def projection(linear: torch.nn.Linear, activation: str | None = None) -> Projection:
            return Projection(linear.weight.detach(), linear.bias, activation, packed)

        layer = head.layer
        self.head, self.config = head, head.config
        self.token_VM = head.from_token(head.token.weight)
        self.query_key_value, self.out = projection(layer.qkv), projection(layer.out)
        self.inner, self.outer = projection(layer.mlp[0], "gelu"), projection(layer.mlp[2])
        self.correction, self.vocabulary = projection(head.correction), projection(head.vocabulary)

    def begin(
        self, states_BKE: torch.Tensor, base_logits_BKV: torch.Tensor, distance_BK: torch.Tensor, n_missing: int
    ) -> "DraftSteps":
        """A round whose tokens come one by one.

        Args:
            states_BKE: the trunk's query states at consecutive ranks.
            base_logits_BKV: the trunk's logits of these states.
            distance_BK: from the position one rank before to the row's.
            n_missing: how many tokens before it the first row's state has not seen; each later row misses one more.
        """
        return DraftSteps(self, states_BKE, base_logits_BKV, distance_BK, n_missing)


class DraftSteps:
    """A round in progress: what the rows know, and the queries, keys and values of those drafted so far."""

    def __init__(self, drafter: Drafter, states_BKE, base_logits_BKV, distance_BK, n_missing: int):
        B, K, H = *distance_BK.shape, drafter.config.n_head
        missing_BK = (n_missing + torch.arange(K, device=distance_BK.device)).expand(B, K)
        self.drafter, self.base_logits_BKV, self.n_missing = drafter, base_logits_BKV, n_missing
        self.mixed_BKM = drafter.head.mix(states_BKE, distance_BK, missing_BK)
        self.qkv_BK3HD = self.mixed_BKM.new_empty(B, K, 3, H, drafter.config.width // H)

    def step(self, j: int, previous_ids_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of row ``j`` given the token before it; rows come in order, 0 first."""
        drafter, layer = self.drafter, self.drafter.head.layer
        x_B1M = self.mixed_BKM[:, j : j + 1] + F.embedding(previous_ids_B[:, None], drafter.token_VM)
        self.qkv_BK3HD[:, j] = drafter.query_key_value(layer.norm_1(x_B1M)).view_as(self.qkv_BK3HD[:, j])
        if self.n_missing + j == 0:
            return self.base_logits_BKV[:, j]
        query_BHKD, key_BHKD, value_BHKD = self.qkv_BK3HD[:, : j + 1].permute(2, 0, 3, 1, 4)
        attended_BH1D = F.scaled_dot_product_attention(query_BHKD[:, :, j:], key_BHKD, value_BHKD)
        x_B1M = drafter.out(attended_BH1D.transpose(1, 2).flatten(2), x_B1M)
        x_B1M = drafter.outer(drafter.inner(layer.norm_2(x_B1M)), x_B1M)
        correction_BX = drafter.correction(drafter.head.norm(x_B1M))[:, 0]
        return drafter.vocabulary(correction_BX, self.base_logits_BKV[:, j])


_DRAFTERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def attach_draft_head(trunk: AnySubsetLM, head: DraftHead) -> None:
    """Let samplers of ``trunk`` draft with ``head``, as it is now, instead of one that lies beside the trunk's
    files."""
    require_trunk(head, trunk, "the head to attach")
    _DRAFTERS[trunk] = Drafter(head.to(trunk.device, trunk.dtype).eval())


def drafter_of(trunk: AnySubsetLM) -> Drafter | None:
    """Of the head that was attached to ``trunk`` or lies beside the files it was loaded from, in the trunk's type and
    on its device; None where there is neither."""
    drafter = _DRAFTERS.get(trunk)
    if drafter is None and trunk.name_or_path:
        revision = getattr(trunk.config, "_commit_hash", None) or "main"
        head = find_draft_head(trunk.name_or_path, trunk, revision)
    elif drafter is not None and (drafter.head.dtype, drafter.head.device) != (trunk.dtype, trunk.device):
        head = drafter.head
    else:
        return drafter
    if head is None:
        return None
    attach_draft_head(trunk, head)
    return _DRAFTERS[trunk]
