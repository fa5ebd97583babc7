"""``sample``: draw the masked tokens of sequences with any sampler."""

from collections.abc import Iterator
from dataclasses import fields

import torch

from ..config import SamplerConfig
from ..network import Network
from ..orders import Order
from .cuda_graphs import prepared
from .decoding import Completion, Decoding


@torch.no_grad()
def sample_each(
    model: Network,
    ids_TN: torch.Tensor,
    order: Order,
    config: SamplerConfig,
    seed: int,
    indices: list[int],
    batch_size: int,
) -> Iterator[tuple[list[int], Completion]]:
    """Like :func:`sample`; yields sequences as they finish, by row number, with their completions.

    ``batch_size`` sequences are decoded together; one that finishes makes room for the next.
    """
    config = config.on(model.device.type)
    state = Decoding(model, ids_TN.to(model.device), order.to(model.device), config, seed, indices, batch_size)
    yield from state.run(prepared(config.sampler.play_round, model.device, config.compile))


def sample(
    model: Network,
    ids_BN: torch.Tensor,
    order: Order,
    config: SamplerConfig | None = None,
    seed: int = 0,
    indices: list[int] | None = None,
    batch_size: int | None = None,
) -> Completion:
    """Draw the tokens that ``order`` leaves masked.

    What ``ids_BN`` holds at masked positions is ignored. Sequence b draws with the random numbers of (``seed``,
    ``indices[b]``), by default its row number: its tokens do not depend on what else is in the batch (in float32).
    ``batch_size`` sequences (default: all) are decoded together; one that finishes makes room for the next.
    """
    indices = list(range(len(ids_BN))) if indices is None else indices
    batch_size = len(ids_BN) if batch_size is None else batch_size
    parts = list(sample_each(model, ids_BN, order, config or SamplerConfig(), seed, indices, batch_size))
    row_B = torch.tensor([row for rows, _ in parts for row in rows], device=model.device).argsort()
    names = [f.name for f in fields(Completion)]
    return Completion(**{name: torch.cat([getattr(done, name) for _, done in parts])[row_B] for name in names})
