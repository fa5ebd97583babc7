"""Masked sequences through a sampler, batch by batch, with what each cost and how likely it is."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from ..config import SamplerConfig
from ..density import joint_log_prob
from ..infilling import InfillTask, collate
from ..model import AnySubsetLM
from ..sampling.decoding import Completion, law_of
from ..sampling.sample import sample
from .config import DecodingConfig
from .records import RecordLog

COUNTS = ("nfe", "aux_nfe", "rounds", "proposed", "accepted")
WARM_UP_TOKENS = 8


def decode(
    model: AnySubsetLM, tasks: list[InfillTask], sampler: SamplerConfig, seed: int, batch_size: int
) -> Iterator[tuple[InfillTask, list[int], dict]]:
    """Yield each task with the ids drawn for it and its measures.

    The measures are the counts of :class:`Completion`, ``tokens``, ``masked``, ``seconds`` (its batch's, synchronised
    and after a warm-up, divided by the batch's size) and ``log_prob`` (nats, joint, under the model's law at the
    sampler's temperature).
    """
    law = law_of(model, replace(sampler, greedy=False))  # a greedy law gives its one sequence probability 1
    for start in range(0, len(tasks), batch_size):
        batch = tasks[start : start + batch_size]
        ids_BN, order = collate(batch)
        if start == 0:
            warm_up(model, batch, sampler)
        seconds, done = timed(model, ids_BN, order, sampler, seed, [task.index for task in batch])
        logp_B = joint_log_prob(model, done.ids_BN, order, law).tolist()
        counts = {key: getattr(done, f"{key}_B").tolist() for key in COUNTS}
        for b, (task, ids) in enumerate(zip(batch, done.ids_BN.tolist(), strict=True)):
            yield (
                task,
                ids[: len(task.ids)],
                {
                    "tokens": len(task.ids),
                    "masked": task.visible.count(False),
                    **{key: counts[key][b] for key in COUNTS},
                    "seconds": seconds / len(batch),
                    "log_prob": logp_B[b],
                },
            )


def record_samplers(
    model: AnySubsetLM,
    tasks: list[InfillTask],
    samplers: dict[str, SamplerConfig],
    config: DecodingConfig,
    log: RecordLog,
    describe: Callable[[InfillTask, list[int]], dict],
) -> None:
    """Decode the tasks that ``log`` lacks with every sampler and record each, with what ``describe`` says of its
    ids."""
    bar = tqdm(total=len(tasks) * len(samplers), initial=len(log.records), unit="seq", desc="decode")
    for name, sampler in samplers.items():
        bar.set_postfix_str(name)
        todo = [task for task in tasks if (name, task.index) not in log.records]
        for task, ids, measures in decode(model, todo, sampler, config.seed, config.batch_size):
            log.add({"sampler": name, "index": task.index, **measures, **describe(task, ids)})
            bar.update()
    bar.close()


def warm_up(model: AnySubsetLM, batch: list[InfillTask], sampler: SamplerConfig) -> None:
    """A short run that is not timed: first calls allocate memory and pick kernels."""
    short = [replace(t, visible=[i < len(t.ids) - WARM_UP_TOKENS for i in range(len(t.ids))]) for t in batch]
    ids_BN, order = collate(short)
    sample(model, ids_BN, order, sampler)


def timed(model: AnySubsetLM, *arguments) -> tuple[float, Completion]:
    """Seconds that sampling takes, the device's work included, and the completion."""
    synchronise = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    completion = sample(model, *arguments)
    synchronise()
    return time.perf_counter() - start, completion
