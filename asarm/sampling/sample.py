"""``sample``: draw the masked tokens of a batch with any sampler."""

import torch

from ..config import SamplerConfig
from ..model import AnySubsetLM
from ..orders import Order
from .assd import decode_assd, decode_assd_ngram, decode_assd_one_pass
from .decoding import Completion, Decoding
from .parallel import decode_parallel
from .sequential import decode_sequential

DECODERS = {
    "sequential": decode_sequential,
    "assd": decode_assd,
    "assd-ngram": decode_assd_ngram,
    "parallel": decode_parallel,
}


@torch.no_grad()
def sample(
    model: AnySubsetLM,
    ids_BN: torch.Tensor,
    order: Order,
    config: SamplerConfig | None = None,
    seed: int = 0,
    indices: list[int] | None = None,
) -> Completion:
    """Draw the tokens that ``order`` leaves masked.

    What ``ids_BN`` holds at masked positions is ignored. Sequence b draws with the random numbers of (``seed``,
    ``indices[b]``), by default its row number: its tokens do not depend on what else is in the batch (in float32).
    """
    config = config or SamplerConfig()
    indices = list(range(len(ids_BN))) if indices is None else indices
    state = Decoding(model, ids_BN.to(model.device), order.to(model.device), config, seed, indices)
    decode = decode_assd_one_pass if config.one_pass else DECODERS[config.name]
    decode(state)
    return state.completion()
