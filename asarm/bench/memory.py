"""Peak memory of decoding one sequence, in a process of its own."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import psutil
import torch

from ..engine import engine_of
from ..sampling.decoding import Decoding
from .config import POINTS, BenchDecodeConfig
from .decode import model_of, round_seconds


def memory_of(config: BenchDecodeConfig, device: torch.device, dtype: str, length: int) -> dict[str, int]:
    """Bytes of the weights, and the most that decoding a sequence of ``length`` positions (``assd``, batch 1) adds to
    what the model takes: its cache, the relative-position keys, and what a prefill and a round allocate."""
    config = replace(config, length=length, rounds=1, masked_fraction=1.0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, config, device, dtype).result()


def _measure(config: BenchDecodeConfig, device: torch.device, dtype: str) -> dict[str, int]:
    model = model_of(config, device, dtype)
    engine_of(model, config.compile)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def decode() -> None:
        for point in (0.05, POINTS[-1]):  # a short prompt and a long one
            round_seconds(config, model, "assd", 1, point, Decoding)

    return {"weights": weights, "peak": peak_bytes(decode, device)}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``work`` takes at a time on top of what this process has already."""
    return _cuda_peak(work) if device.type == "cuda" else _process_peak(work)


def _cuda_peak(work) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _process_peak(work) -> int:
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak - before
