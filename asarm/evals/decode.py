"""Masked sequences through a sampler, with what each cost and how likely it is."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..config import SamplerConfig
from ..density import joint_log_prob
from ..infilling import InfillTask, collate
from ..network import Network
from ..orders import Order
from ..sampling.decoding import law_of
from ..sampling.sample import sample, sample_each

MEASURES = {key: f"{key}_B" for key in ("nfe", "aux_nfe", "rounds", "proposed", "accepted", "seconds")} | {
    "proposed_by_index": "proposed_BK",
    "accepted_by_index": "accepted_BK",
}  # of a Completion
WARM_UP_TOKENS = 8


def decode(
    model: Network, tasks: list[InfillTask], sampler: SamplerConfig, seed: int, batch_size: int
) -> Iterator[tuple[InfillTask, list[int], dict]]:
    """Yield each task, as it is finished, with the ids drawn for it and its measures.

    The measures are the counts of :class:`Completion` (``proposed_by_index`` and ``accepted_by_index`` are lists, by
    draft index), ``tokens``, ``masked``, the sampler's ``k``, ``seconds`` (its share of the wall clock, after a
    warm-up), ``log_prob`` (nats, joint, under the model's law at the sampler's temperature, computed anew by the
    density) and ``lossless`` (whether the sampler keeps that law).
    """
    if not tasks:
        return
    ids_TN, order = collate(tasks)
    indices = [task.index for task in tasks]
    warm_up(model, ids_TN, order, sampler, batch_size)
    finished = []
    for rows, done in sample_each(model, ids_TN, order, sampler, seed, indices, batch_size):
        by_key = {key: getattr(done, attribute).tolist() for key, attribute in MEASURES.items()}
        for b, (row, ids) in enumerate(zip(rows, done.ids_BN.tolist(), strict=True)):
            measures = {key: values[b] for key, values in by_key.items()}
            finished.append((tasks[row], ids[: len(tasks[row].ids)], measures))
        if len(finished) >= batch_size:
            yield from _scored(model, finished, sampler)
            finished = []
    yield from _scored(model, finished, sampler)


def _scored(
    model: Network, finished: list[tuple[InfillTask, list[int], dict]], sampler: SamplerConfig
) -> Iterator[tuple[InfillTask, list[int], dict]]:
    if not finished:
        return
    # without greedy choice and truncation, which would give most texts probability 1 or 0
    law = law_of(model, replace(sampler, greedy=False, top_k=None, top_p=None))
    ids_BN, order = collate([replace(task, ids=ids) for task, ids, _ in finished])
    for (task, ids, measures), log_prob in zip(
        finished, joint_log_prob(model, ids_BN, order, law).tolist(), strict=True
    ):
        size = {"tokens": len(ids), "masked": task.visible.count(False), "k": sampler.k}
        yield task, ids, size | measures | {"log_prob": log_prob, "lossless": sampler.lossless}


def warm_up(model: Network, ids_BN: torch.Tensor, order: Order, sampler: SamplerConfig, batch_size: int) -> None:
    """A short run that is not timed: first calls allocate memory, pick kernels, compile."""
    length_B = order.length_B[:batch_size]
    end = Order.from_permutation(order.order_BN[:batch_size], (length_B - WARM_UP_TOKENS).clamp(min=0), length_B)
    sample(model, ids_BN[:batch_size], end, sampler)
