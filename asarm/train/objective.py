"""What is predicted from what: the rows of an optimiser step with their orders, and the loss on them.

Both objectives of Guo & Ermon (2025) are choices of limits. A row's first ranks are a prompt; *settled* ranks are the
prompt and, for the parallel objective, some tokens decoded after it. Targets are the ranks from there on, with their
own rank as limit (joint) or all with the number of settled ranks (parallel, as a draft is made).

The loss of a step is a weighted sum over the targets of all its rows, divided by their number or by that of the rows:
so parts of it can be computed apart, by whatever process, and added.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..density import ROW_MULTIPLE, cross_entropy_sum, query_states
from ..model import AnySubsetLM
from ..orders import Order, random_spans, random_visible, rows_with_limit
from ..rng import generator
from .config import MaskingConfig, ObjectiveConfig
from .schedule import masking_rates


@dataclass(frozen=True)
class Batch:
    """Rows of one process in one optimiser step, those with most targets first.

    ``index_B`` are their places in the run's sequence of rows. ``order.n_visible_B`` ranks see each other whole, those
    from ``settled_B`` on are predicted, and ``weight_B`` is the weight of each of a row's targets in the loss's sum.
    """

    index_B: torch.Tensor
    ids_BN: torch.Tensor
    order: Order
    settled_B: torch.Tensor
    weight_B: torch.Tensor

    @property
    def n_targets(self) -> int:
        return int((self.order.length_B - self.settled_B).sum())

    def divisor(self, loss_average: str) -> int:
        """What the loss's sum over the batches of all processes is divided by, this batch's part of it."""
        return self.n_targets if loss_average == "per_token" else len(self.ids_BN)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(x.to(device) for x in vars(self).values()))

    def of(self, rows: slice | torch.Tensor) -> "Batch":
        """Some of the rows."""
        return Batch(*(x.of(rows) if isinstance(x, Order) else x[rows] for x in vars(self).values()))

    def parts(self, size: int) -> Iterator["Batch"]:
        """``size`` rows at a time. Neighbours have about as many targets, so a part needs little padding."""
        return (self.of(slice(first, first + size)) for first in range(0, len(self.ids_BN), size))


def make_batch(
    rows_BN: np.ndarray,
    indices: list[int],
    step: int,
    rows_per_step: int,
    masking: MaskingConfig,
    objective: ObjectiveConfig,
    seed: int,
) -> Batch:
    """Rows of optimiser step ``step`` with their orders, a function of the seed, the step and their indices alone."""
    rates = masking_rates(step, rows_per_step, masking, seed)[[index - step * rows_per_step for index in indices]]
    length = rows_BN.shape[1]
    settled_B = np.minimum(np.round((1 - rates) * length), length - 1).astype(np.int64)
    orders, n_prompt = [], []
    for index, rate in zip(indices, rates, strict=True):
        rng = generator(seed, "order", index)
        visible_share = (1 - rate) * (rng.random() if objective.name == "parallel" else 1)
        order_N, n_visible = draw_order(length, visible_share, masking, rng)
        orders.append(order_N)
        n_prompt.append(n_visible)
    prompt_B = np.array(n_prompt)
    see_each_other = {"prompt_and_decoded": settled_B, "prompt_only": prompt_B, "causal": 0 * prompt_B}
    n_whole_B = prompt_B if objective.name == "joint" else see_each_other[objective.prompt_attention]
    order = Order.from_permutation(torch.from_numpy(np.stack(orders)), torch.from_numpy(n_whole_B))
    weight_B = target_weights(rates, length - settled_B, objective.loss_scale, objective.loss_average)
    arrays = (torch.from_numpy(x) for x in (settled_B, weight_B))
    batch = Batch(torch.tensor(indices), torch.from_numpy(rows_BN).long(), order, *arrays)
    return batch.of(batch.settled_B.argsort(stable=True))


def target_weights(rate_B: np.ndarray, n_targets_B: np.ndarray, loss_scale: str, loss_average: str) -> np.ndarray:
    """The weight [B] of each of a row's targets, from its masking rate and the number of them."""
    scale_B = {"none": np.ones_like(rate_B), "masking_rate": rate_B, "snr": rate_B / (1 - rate_B)}[loss_scale]
    return scale_B if loss_average == "per_token" else scale_B / n_targets_B


def draw_order(
    length: int, visible_share: float, masking: MaskingConfig, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """An order [length] of a row's positions, and how many of them are given."""
    shape = rng.random()
    if shape < masking.span_fraction:
        visible_N = random_spans(length, visible_share, rng).numpy()
    else:
        visible_N = random_visible(length, visible_share, rng).numpy()
        if shape < masking.span_fraction + masking.left_to_right_fraction:
            visible_N = np.arange(length) < visible_N.sum()
    masked = np.flatnonzero(~visible_N)
    if rng.random() < masking.any_permutation_fraction:
        masked = rng.permutation(masked)
    return np.concatenate([np.flatnonzero(visible_N), masked]), int(visible_N.sum())


class Objective(nn.Module):
    """The loss of a model on batches; what is copied (DDP) or dealt out (FSDP) to several processes."""

    def __init__(self, model: AnySubsetLM, config: ObjectiveConfig):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Batch) -> torch.Tensor:
        """Weighted sum over the targets of -log p(target), in nats, to be divided by :meth:`Batch.divisor`."""
        N = batch.ids_BN.shape[1]
        device, order, settled_B1 = batch.ids_BN.device, batch.order, batch.settled_B[:, None]
        n_query = -(-(N - int(settled_B1.min())) // ROW_MULTIPLE) * ROW_MULTIPLE
        rank_BR = settled_B1 + torch.arange(n_query, device=device)
        limit_BR = rank_BR if self.config.name == "joint" else settled_B1.expand_as(rank_BR)
        query = rows_with_limit(order, rank_BR, limit_BR, order.length_B)
        hidden_BRE = query_states(self.model, batch.ids_BN, order, query)
        target_BR = batch.ids_BN.gather(1, query.position_BR.clamp(max=N - 1))
        wide = torch.promote_types(hidden_BRE.dtype, torch.float32)
        weight_BR = batch.weight_B[:, None].to(wide).expand_as(target_BR)
        valid_BR = query.valid_BR
        return cross_entropy_sum(self.model, hidden_BRE[valid_BR], target_BR[valid_BR], weight_BR[valid_BR])
