"""How a round is played: as it is, compiled, or as a CUDA graph.

A round is some hundred small kernels. On a GPU, starting them one after another keeps the processor busy for tens of
times as long as they take; a graph starts them together. A round can be recorded because its shapes do not change, it
reads nothing back from the device, and the state that it leaves to the next lies where it found it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ..compiling import set_marks
from ..errors import ConfigError
from .decoding import Decoding

Round = Callable[[Decoding], None]


def prepared(play_round: Round, device: torch.device, compile: bool) -> Round:
    """``play_round`` as it is played on a device: as a graph on a GPU, as it is elsewhere; compiled if so asked."""
    play_round = compiled(play_round) if compile else play_round
    return Replay(play_round) if device.type == "cuda" else play_round


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """What is started in here on ``device`` becomes part of ``graph`` instead."""
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=_stream_of(device)):
        yield


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """PyTorch's own stream for recordings lies on the device that was current first."""
    return torch.cuda.Stream(device)


class Replay:
    """``play_round``, played as it is the first time, recorded the second time; one recording for every number of
    tokens that may wait for the cache, the one thing that shapes depend on."""

    def __init__(self, play_round: Round):
        self.play_round = play_round
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, int]] = {}
        self._met: set[int] = set()

    def __call__(self, state: Decoding) -> None:
        width = state.backlog
        if width not in self._met:  # libraries prepare themselves in a first call, which cannot be recorded
            self._met.add(width)
            self._play(state)
            return
        if width not in self._recorded:
            graph = torch.cuda.CUDAGraph()
            with recording(graph, state.settled_B.device):
                self._play(state)
            self._recorded[width] = graph, state.backlog
        graph, state.backlog = self._recorded[width]
        graph.replay()

    def _play(self, state: Decoding) -> None:
        before = state.draft
        self.play_round(state)
        if before is not None and state.draft is not None:
            before.copy_(state.draft)
            state.draft = before


def shape_by_shape(function: Callable) -> Callable:
    """``function`` through :func:`torch.compile`, once for every shape (model, type, law) of what it is given.

    Raises :class:`~asarm.errors.ConfigError` at a shape that is one too many for the process, where torch.compile would
    go on without compiling, and that from the ninth on.
    """
    set_marks()
    by_shape = torch.compile(function, dynamic=False)
    most = torch._dynamo.config.accumulated_recompile_limit
    limits = torch._dynamo.config.patch(recompile_limit=most, fail_on_recompile_limit_hit=True)

    def call(*arguments: object) -> object:
        try:
            with limits:
                return by_shape(*arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"compile makes a graph for every shape of a round, and one process at most {most}: leave it out, or "
                "decode fewer models, lengths, batch sizes, values of k and laws in one process"
            ) from error

    return call


compiled = cache(shape_by_shape)  # a round's function once and for all
