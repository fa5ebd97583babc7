"""Times of calls, the device's work included."""

import statistics
import time
from collections.abc import Callable

import torch

from ..sampling.cuda_graphs import recording


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> list[float]:
    """Of each of ``repeats`` calls, after ``warm_up`` that are not counted."""
    seconds = []
    for repeat in range(warm_up + repeats):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        if repeat >= warm_up:
            seconds.append(time.perf_counter() - start)
    return seconds


def as_decoded(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``work`` as decoding does it: on a GPU it is recorded as a graph."""
    if device.type != "cuda":
        return work
    work()  # libraries prepare themselves in a first call
    graph = torch.cuda.CUDAGraph()
    with recording(graph, device):
        work()
    return graph.replay


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> float:
    """Median of :func:`seconds_of`."""
    return statistics.median(seconds_of(call, device, repeats, warm_up))
