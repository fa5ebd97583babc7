"""The joint objective on packed rows: one random subset order per row (Guo & Ermon 2025)."""

from dataclasses import dataclass

import numpy as np
import torch

from ..config import MaskingConfig
from ..data.packing import PackedRows
from ..density import negative_log_likelihood
from ..model import AnySubsetLM
from ..orders import Order, random_spans, random_visible
from ..rng import generator
from .schedule import draw_masking_rate


@dataclass(frozen=True)
class Batch:
    ids_BN: torch.Tensor
    visible_BN: torch.Tensor


def step_batch(rows: PackedRows, step: int, n_rows: int, masking: MaskingConfig, seed: int) -> Batch:
    """The rows of one optimiser step with their masks, a pure function of ``seed`` and ``step``.

    Sorted by number of masked tokens, so that the rows that share a pass need little padding.
    """
    indices = range(step * n_rows, (step + 1) * n_rows)
    ids = np.stack([rows.row(i) for i in indices])
    visible = []
    for i in indices:
        rng = generator(seed, "order", i)
        rate = draw_masking_rate(step, masking, rng)
        subset = random_spans if rng.random() < masking.span_fraction else random_visible
        visible.append(subset(rows.max_length, 1 - rate, rng))
    visible_BN = torch.stack(visible)
    by_masked_B = visible_BN.sum(1).argsort(stable=True)
    return Batch(torch.from_numpy(ids).long()[by_masked_B], visible_BN[by_masked_B])


def accumulate_gradients(model: AnySubsetLM, batch: Batch, rows_per_pass: int, precision: str) -> float:
    """Backpropagate the mean loss over all the batch's targets, ``rows_per_pass`` rows at a time; returns that mean.

    The sum over targets is divided by the number of targets in the whole batch, so that splitting it changes nothing.
    """
    device = model.device
    n_targets = int((~batch.visible_BN).sum())
    total = 0.0
    for ids_PN, visible_PN in zip(
        batch.ids_BN.split(rows_per_pass), batch.visible_BN.split(rows_per_pass), strict=True
    ):
        order = Order.from_visible(visible_PN).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = negative_log_likelihood(model, ids_PN.to(device), order)
        (loss / n_targets).backward()
        total += loss.item()
    return total / n_targets
