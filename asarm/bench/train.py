"""``python -m asarm bench train``: an optimiser step of this program and of Hugging Face's XLNet on the same batch.

Both start from the same weights and predict the same targets under the same masks (permutation language modelling
through ``perm_mask`` and ``target_mapping``, as the paper's code does), with XLNet's dropout. Each has a process of its
own, and they take turns. Measured are the most memory that weights, optimiser and two steps take, the median time of a
turn's second step, and the losses of two steps from the same weights without dropout, which say that it is the same
work.

What no program can beat is the time of the matrix products. The operations of a step's products are counted, and a bare
product says how many of them the machine makes in a second.
"""

import math
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import XLNetConfig, XLNetLMHeadModel

from ..loading import this_device
from ..malloc import keep_freed_memory, release_freed_memory
from ..model import AnySubsetLM
from ..orders import may_attend
from ..runlog import provenance
from ..train.config import MaskingConfig, ObjectiveConfig, OptimizerConfig
from ..train.objective import Batch, Objective, make_batch
from ..train.trainer import build_optimizer
from .clock import seconds_of
from .config import ARCHITECTURES, BenchTrainConfig
from .dtypes import timed_dtypes
from .memory import peak_bytes

OURS, THEIRS = "asarm", "Hugging Face XLNet"
PRODUCT = (1024, 768, 3072)  # rows, width and inner width of a feed-forward layer of XLNet-base with both streams


def bench(config: BenchTrainConfig) -> dict:
    """Everything, in one run; returns what the last line of the output holds."""
    config = replace(config, dtypes=timed_dtypes(config.dtypes, this_device()))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(config.seed)
        architecture = ARCHITECTURES[config.size] | {"dropout": config.dropout}
        AnySubsetLM(XLNetConfig(**architecture, mem_len=None)).save_pretrained(folder)
        for dtype in config.dtypes:
            rows += _side_by_side(config, folder, dtype)
    seconds = {(row["dtype"], row["system"]): row["step_seconds"] for row in rows}
    faster = {dtype: seconds[dtype, THEIRS] / seconds[dtype, OURS] for dtype in config.dtypes}
    if {"float32", "bfloat16"} <= set(config.dtypes):
        faster["bfloat16 against float32 Hugging Face"] = seconds["float32", THEIRS] / seconds["bfloat16", OURS]
    return {
        "config": asdict(config),
        "rows": rows,
        "times_faster": faster,
        "most_times_faster": {dtype: _limit(rows, dtype) for dtype in config.dtypes},
        "provenance": provenance(),
    }


def _limit(rows: list[dict], dtype: str) -> float:
    """How many times as fast as Hugging Face's a step is that consists of our matrix products and nothing else."""
    ours, theirs = (next(r for r in rows if (r["dtype"], r["system"]) == (dtype, system)) for system in (OURS, THEIRS))
    return theirs["step_seconds"] / (ours["step_flop"] / ours["product_flop_per_second"])


def _side_by_side(config: BenchTrainConfig, folder: str, dtype: str) -> list[dict]:
    """A row of the table for each system; they take turns, so that what else the machine does meets both."""
    with ExitStack() as stack:
        pools = {
            system: stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            for system in (THEIRS, OURS)
        }
        begun = {s: pool.submit(_begin, config, folder, s, dtype).result() for s, pool in pools.items()}
        turns = [{s: pool.submit(_turn, s).result() for s, pool in pools.items()} for _ in range(config.repeats)]
        ended = {s: pool.submit(_end, config, folder, s, dtype).result() for s, pool in pools.items()}
    rows = []
    for system in pools:
        seconds = statistics.median(turn[system] for turn in turns)
        speed = {"step_seconds": seconds, "tokens_per_second": config.batch_size * config.length / seconds}
        rows.append({"dtype": dtype, "system": system} | speed | begun[system] | ended[system])
    return rows


_STEPS: dict[str, Callable[[], float]] = {}  # of this process, by system


def _begin(config: BenchTrainConfig, folder: str, system: str, dtype: str) -> dict[str, int]:
    """Make a system's step and take two; how much memory that takes."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if system == OURS:
        keep_freed_memory()  # as every command of this program does

    def begin() -> None:
        settings = {"compile": config.compile} if system == OURS else {}
        _STEPS[system] = _maker(config, folder, system, dtype)(**settings)
        _STEPS[system]()
        _STEPS[system]()

    peak = peak_bytes(begin, this_device())
    release_freed_memory()
    return {"peak": peak}


def _maker(config: BenchTrainConfig, folder: str, system: str, dtype: str) -> Callable[..., Callable[[], float]]:
    make = our_step if system == OURS else their_step
    return partial(make, folder, batch_of(config).to(this_device()), getattr(torch, dtype))


def _turn(system: str) -> float:
    """Seconds of the second of two steps: on a CPU a system holds no more than it must between turns, and the first
    step has to get memory."""
    seconds = seconds_of(_STEPS[system], this_device(), repeats=1)[0]
    release_freed_memory()
    return seconds


def _end(config: BenchTrainConfig, folder: str, system: str, dtype: str) -> dict:
    """What a step consists of, and the losses without dropout."""
    del _STEPS[system]
    make = _maker(config, folder, system, dtype)
    flop = product_flop(make())  # the counter does not look into what is compiled
    without_dropout = make(dropout=0.0)
    return {
        "losses": [without_dropout(), without_dropout()],
        "step_flop": flop,
        "product_flop_per_second": product_speed(this_device(), getattr(torch, dtype), config.repeats),
    }


def product_flop(work: Callable[[], object]) -> int:
    """Operations of the matrix products that ``work`` makes, two for a multiplication and an addition."""

    def added_in_place(out_BMN, a_BMK, b_BKN, **_) -> int:  # shapes; the library knows the product that makes a new one
        return 2 * math.prod(a_BMK) * b_BKN[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added_in_place}) as counter:
        work()
    return counter.get_total_flops()


def product_speed(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations per second of a bare product of the size that a step mostly makes, at best."""
    M, K, N = PRODUCT
    a_MK, b_KN = (torch.randn(shape, device=device).to(dtype) for shape in ((M, K), (K, N)))
    return 2 * M * K * N / min(seconds_of(lambda: a_MK @ b_KN, device, 10 * repeats))


def batch_of(config: BenchTrainConfig) -> Batch:
    """Random tokens, ``masked_fraction`` of each row predicted."""
    rng, vocab_size = np.random.default_rng(config.seed), ARCHITECTURES[config.size]["vocab_size"]
    ids_BN = rng.integers(10, vocab_size, (config.batch_size, config.length))
    fraction = config.masked_fraction
    masking = MaskingConfig(fraction, fraction, fraction, fraction, 0)
    return make_batch(
        ids_BN, list(range(config.batch_size)), 0, config.batch_size, masking, ObjectiveConfig(), config.seed
    )


def our_step(folder: str, batch: Batch, dtype: torch.dtype, compile: bool = False, **settings):
    """An optimiser step, as the training loop makes it; returns the loss. ``settings`` replace the checkpoint's."""
    model = AnySubsetLM.from_pretrained(folder, **settings).to(batch.ids_BN.device).train()
    if compile:
        model.compile_layers()
    objective = Objective(model, ObjectiveConfig())
    return optimiser_step(
        objective, build_optimizer(objective, OptimizerConfig()), lambda: objective(batch) / batch.n_targets, dtype
    )


def their_step(folder: str, batch: Batch, dtype: torch.dtype, **settings):
    """The same with ``XLNetLMHeadModel`` and plain AdamW, as the paper's code makes it."""
    device = batch.ids_BN.device
    model = XLNetLMHeadModel.from_pretrained(folder, dtype=torch.float32, **settings).to(device).train()
    arguments = hugging_face_arguments(batch)

    def loss() -> torch.Tensor:
        return model(**arguments, use_mems=False).loss

    return optimiser_step(model, torch.optim.AdamW(model.parameters(), lr=1e-5), loss, dtype)


def hugging_face_arguments(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch of a joint objective as ``XLNetLMHeadModel`` takes it; its rows have equally many targets."""
    order, N = batch.order, batch.ids_BN.shape[1]
    n_targets = N - int(batch.settled_B[0])
    target_BT = order.order_BN[:, -n_targets:]
    # both streams have this mask; a content row sees itself as well
    in_prompt_BN = order.rank_BN < order.n_visible_B[:, None]
    limit_BN = torch.where(in_prompt_BN, order.n_visible_B[:, None], order.rank_BN)
    return {
        "input_ids": batch.ids_BN,
        "perm_mask": (~may_attend(order.rank_BN, limit_BN)).float(),
        "target_mapping": torch.nn.functional.one_hot(target_BT, N).float(),
        "labels": batch.ids_BN.gather(1, target_BT),
    }


def optimiser_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, loss, dtype: torch.dtype):
    """A function that takes one step on ``loss()``, clipped, and returns the loss before it."""
    device = next(module.parameters()).device.type

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def report(result: dict) -> str:
    """The table, as Markdown."""
    config = result["config"]
    lines = [
        f"{config['size']}, {config['batch_size']} x {config['length']} positions, {config['masked_fraction']:.0%} "
        f"masked, dropout {config['dropout']}, {result['provenance']['device']}",
        "",
        "| dtype | system | s/step | tokens/s | TFLOP/step | products alone (s) | peak (MiB) "
        "| loss, two steps without dropout |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        losses = ", ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(
            f"| {row['dtype']} | {row['system']} | {row['step_seconds']:.3f} | {row['tokens_per_second']:.0f} "
            f"| {row['step_flop'] / 1e12:.3f} | {row['step_flop'] / row['product_flop_per_second']:.2f} "
            f"| {row['peak'] / 2**20:.0f} | {losses} |"
        )
    lines += ["", *(f"{which}: {times:.2f} x" for which, times in result["times_faster"].items())]
    limits = result["most_times_faster"].items()
    return "\n".join([*lines, *(f"{dtype}, our products alone: {times:.2f} x" for dtype, times in limits)])
