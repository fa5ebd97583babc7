"""Will it fit? Asked before long work starts."""

import psutil
import torch

from .errors import MemoryBudgetError
from .model import AnySubsetLM

SCORE_COPIES = 8  # float32 [rows, slots] arrays per head alive at the peak of an attention call, as measured


def call_bytes(model: AnySubsetLM, batch: int, length: int, n_rows: int, n_projected: int) -> int:
    """Upper estimate of the memory of a call of ``n_rows`` rows over ``length`` slots that projects ``n_projected``
    of them."""
    c, size = model.config, model.dtype.itemsize
    cache = 2 * c.n_layer * batch * (length + 1) * c.d_model * size
    relative = 2 * c.n_layer * length * c.d_model * size
    scores = batch * n_rows * length * (SCORE_COPIES * 4 * c.n_head + 2 * 8)
    hidden = batch * n_rows * (4 * c.d_model + 2 * c.d_inner) * size
    logits = batch * n_projected * c.vocab_size * (size + 4 * 8)
    return cache + relative + scores + hidden + logits


def require_memory(model: AnySubsetLM, batch: int, length: int, n_rows: int, n_projected: int) -> None:
    """Raise :class:`MemoryBudgetError` where the estimate exceeds what is free."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = psutil.virtual_memory().available
    need = call_bytes(model, batch, length, n_rows, n_projected)
    if need > free:
        raise MemoryBudgetError(
            f"{batch} sequence(s) of {length} tokens need about {need / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB is free; shorten the sequences or use a smaller batch"
        )
