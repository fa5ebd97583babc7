"""A round of decoding as a CUDA graph: recorded once, then started with one call.

A round is some hundred small kernels. Starting them one after another keeps the processor busy for tens of times as
long as they take on the GPU; a graph starts them together. A round can be recorded because its shapes do not change,
it reads nothing back from the device, and the state that it leaves to the next lies where it found it.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from .decoding import Decoding

Round = Callable[[Decoding], None]


class Replay:
    """``play_round``, played as it is the first time that it is met with its shapes, recorded the second time."""

    def __init__(self, play_round: Round):
        self.play_round = play_round
        self._recorded, self._met = {}, set()

    def __call__(self, state: Decoding) -> None:
        shapes = (state.backlog, state.most_remaining > 1, state.draft is None)
        if shapes not in self._met:  # libraries prepare themselves in a first call, which cannot be recorded
            self._met.add(shapes)
            self._play(state, nullcontext())
            return
        if shapes not in self._recorded:
            graph = torch.cuda.CUDAGraph()
            self._play(state, torch.cuda.graph(graph))
            self._recorded[shapes] = graph, state.backlog
        graph, state.backlog = self._recorded[shapes]
        graph.replay()

    def _play(self, state: Decoding, context) -> None:
        with context:
            before = state.draft
            self.play_round(state)
            if before is not None:
                state.draft = before.replaced_by(state.draft)


def replayed(play_round: Round, device: torch.device) -> Round:
    """``play_round`` for a device: as a graph on a GPU, as it is elsewhere."""
    return Replay(play_round) if device.type == "cuda" else play_round
