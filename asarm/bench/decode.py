"""What a call costs, how many calls a token takes, and what that makes.

Random weights accept almost every draft, so the two are measured apart: the time of a round at the benchmarked size,
and the rounds per token of a trained model at the same masked fraction and k. Seconds per token are their product.
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import XLNetConfig

from ..data.datasets import load_text
from ..data.packing import pack_all
from ..draft_head import DraftHead
from ..drafter import attach_draft_head
from ..engine import Engine
from ..evals.decode import decode
from ..evals.tasks import mask_rows
from ..loading import load
from ..model import AnySubsetLM
from ..network import Network
from ..orders import Order
from ..samplers import find_sampler
from ..sampling.cuda_graphs import prepared, shape_by_shape
from ..sampling.decoding import Decoding, drafter_for
from ..tokenizer import TextTokenizer
from .clock import as_decoded, median_seconds, synchronise
from .config import ARCHITECTURES, LONG, POINTS, WARM_UP, BenchDecodeConfig

ACCEPTANCE_LENGTH = 128


def model_of(config: BenchDecodeConfig, device: torch.device, dtype: str) -> Network:
    if config.size not in ARCHITECTURES:
        return _load(config, config.size, dtype)[0]
    torch.manual_seed(config.seed)
    architecture = XLNetConfig(**ARCHITECTURES[config.size], mem_len=None)
    model = AnySubsetLM(architecture).to(device, getattr(torch, dtype)).eval()
    if any(find_sampler(name).drafts == "head" for name in config.samplers):
        attach_draft_head(model, DraftHead.for_trunk(model))
    return model


def _load(config: BenchDecodeConfig, name: str, dtype: str = "float32") -> tuple[Network, TextTokenizer]:
    head = config.draft_head if name == config.acceptance_model else None
    return load(name, dtype=dtype, draft_head=head)


def require_draft_heads(config: BenchDecodeConfig) -> None:
    """Raise :class:`~asarm.errors.ConfigError` before anything is timed where a trained model has not the draft head
    that a sampler needs."""
    for model in {config.size, config.acceptance_model} - ARCHITECTURES.keys():
        loaded, _ = _load(config, model)
        for name in config.samplers:
            drafter_for(loaded, config.sampler_config(name))


def acceptance_of(config: BenchDecodeConfig) -> dict[str, dict]:
    """Calls and rounds per token of every sampler, with a trained model on held-out text, in float32."""
    model, tokenizer = _load(config, config.acceptance_model)
    _, documents = load_text("samples", None, None, "validation")
    rows = [row for row in pack_all(documents, tokenizer, ACCEPTANCE_LENGTH) if len(row) == ACCEPTANCE_LENGTH]
    tasks = mask_rows(rows[: config.acceptance_sequences], 1 - config.masked_fraction, config.seed)
    result = {}
    for name in config.samplers:
        measures = [m for _, _, m in decode(model, tasks, config.sampler_config(name), config.seed, batch_size=8)]
        total = {key: sum(m[key] for m in measures) for key in ("masked", "nfe", "rounds")}
        result[name] = {key: total[key] / total["masked"] for key in ("nfe", "rounds")}
    return result


@torch.no_grad()
def streaming_seconds(model: Network, engine: Engine) -> dict[str, float]:
    """The least a call can take: one row times every weight matrix that a call reads, and nothing else; with the
    weights as the engine holds them, and as the model stores them (plain PyTorch products)."""
    c, device = model.config, model.device
    row_1E = torch.randn(1, c.d_model, dtype=model.dtype, device=device)
    row_1F = torch.randn(1, c.d_inner, dtype=model.dtype, device=device)

    def packed() -> None:
        for layer in engine.layers:
            for matrix in (layer.query, layer.key_value, layer.out, layer.inner):
                matrix(row_1E)
            layer.outer(row_1F)
        engine.vocabulary(row_1E)

    def stored() -> None:
        for layer in model.transformer.layer:
            attention, ff = layer.rel_attn, layer.ff
            for weight in (attention.q, attention.k, attention.v, attention.o):
                torch.matmul(row_1E, weight.flatten(1))
            ff.layer_1(row_1E)
            ff.layer_2(row_1F)
        model.lm_loss(row_1E)

    times = {"streaming_seconds": packed, "stored_streaming_seconds": stored}
    return {
        name: median_seconds(as_decoded(work, device), device, repeats=15, warm_up=3) for name, work in times.items()
    }


def cost(config: BenchDecodeConfig, model: Network, name: str, batch_size: int, acceptance: dict) -> dict:
    """What a round and a network call of a sampler take, and with the trained model's acceptance a token."""
    times = [round_seconds(config, model, name, batch_size, point) for point in POINTS]
    seconds, call_seconds = (statistics.mean(column) for column in zip(*times, strict=True))
    per_token = seconds * acceptance["rounds"]
    return {
        "round_seconds": seconds,
        "call_seconds": call_seconds,
        "nfe_per_token": acceptance["nfe"],
        "seconds_per_token": per_token / batch_size,
        "tokens_per_second": batch_size / per_token,
    }


class NotedCalls:
    """An engine that notes the calls made of it."""

    def __init__(self, engine: Engine):
        self.engine, self.calls = engine, []

    def _noted(self, work: Callable, *arguments) -> torch.Tensor:
        self.calls.append((work, arguments))
        return work(*arguments)

    def __call__(self, *arguments) -> torch.Tensor:
        return self._noted(self.engine, *arguments)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._noted(self.engine.logits, hidden)

    def again(self) -> None:
        """Make the same calls once more."""
        for work, arguments in self.calls:
            work(*arguments)


def order_after(config: BenchDecodeConfig, batch_size: int, point: float, generator: torch.Generator) -> Order:
    """Of sequences whose masked tokens, a random subset, are drawn up to ``point`` of the way from left to right."""
    shape, n_masked = (batch_size, config.length), round(config.masked_fraction * config.length)
    masked_BM = torch.rand(shape, generator=generator).argsort(1)[:, :n_masked].sort(1).values
    left_BM = masked_BM[:, round(point * n_masked) :]
    return Order.from_visible(torch.ones(shape, dtype=torch.bool).scatter_(1, left_BM, False))


class Halfway(Decoding):
    """Sequences whose prompts were never computed: random keys and values stand for theirs, which take as long to
    read."""

    def _prefill(self, lane_b: torch.Tensor, width: int) -> None:
        one_L12HSD = self.cache.key_value_LB2HSD[:, :1]
        self.cache.key_value_LB2HSD[:, lane_b] = torch.randn_like(one_L12HSD)


@torch.no_grad()
def round_seconds(
    config: BenchDecodeConfig,
    model: Network,
    name: str,
    batch_size: int,
    point: float,
    kind: type[Decoding] = Halfway,
) -> tuple[float, float]:
    """Median times of a round, and of a network call of it (vocabulary projection included), after ``point`` of the
    masked tokens are drawn.

    The calls of one more round are noted and made again by themselves, as often as rounds were timed.
    """
    generator = torch.Generator().manual_seed(config.seed)
    order = order_after(config, batch_size, point, generator).to(model.device)
    ids_BN = torch.randint(0, model.config.vocab_size, order.order_BN.shape, generator=generator).to(model.device)
    settings, sampler = config.sampler_config(name, config.compile), find_sampler(name)
    state = kind(model, ids_BN, order, settings, config.seed, list(range(batch_size)), batch_size)
    play_round = prepared(sampler.play_round, model.device, config.compile)
    engine, seconds = NotedCalls(state.engine), []
    warm_up = WARM_UP if state.engine.static else 1

    def timed_round(state: Decoding) -> None:
        timed = seconds[warm_up:]
        if len(timed) == config.rounds or sum(timed) > LONG:
            state.engine = engine
            sampler.play_round(state)
            state.settle(state.order.length_B, state.order.length_B, backlog=1)
            return
        synchronise(model.device)
        start = time.perf_counter()
        play_round(state)
        state.remaining_B.tolist()  # what ends a round
        seconds.append(time.perf_counter() - start)

    for _ in state.run(timed_round):
        pass
    again = shape_by_shape(engine.again) if config.compile else engine.again
    n_timed = len(seconds) - warm_up
    calls = median_seconds(as_decoded(again, model.device), model.device, n_timed, warm_up - 1)
    return statistics.median(seconds[warm_up:]), calls / sampler.calls_per_round
