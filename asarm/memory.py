"""Will it fit? Asked before long work starts."""

from pathlib import Path

import psutil
import torch

from .errors import MemoryBudgetError
from .model import AnySubsetLM

SCORE_COPIES = 8  # float32 [rows, slots] arrays per head alive at the peak of an attention call, as measured
TRAINED_ROWS = 256  # how many [rows, vocabulary] logits a training pass holds at a time
KEPT_SCORE_BYTES = 16  # bytes a layer keeps of each head's [rows, slots] scores for the backward pass, as measured


def call_bytes(model: AnySubsetLM, batch: int, length: int, n_rows: int, n_projected: int) -> int:
    """Upper estimate of the memory of a call of ``n_rows`` rows a sequence over ``length`` slots, of which
    ``n_projected`` in the whole batch are projected onto the vocabulary at a time."""
    c, size = model.config, model.dtype.itemsize
    cache = 2 * c.n_layer * batch * (length + 1) * c.d_model * size
    relative = 2 * c.n_layer * length * c.d_model * size
    scores = batch * n_rows * length * (SCORE_COPIES * 4 * c.n_head + 2 * 8)
    hidden = batch * n_rows * (4 * c.d_model + 2 * c.d_inner) * size
    logits = n_projected * c.vocab_size * (size + 4 * 8)
    return cache + relative + hidden + max(scores, logits)  # attention is over when the projection begins


def training_bytes(model: AnySubsetLM, batch: int, length: int) -> int:
    """Upper estimate of the memory of a training pass over ``batch`` rows with nearly all tokens masked, in bfloat16
    or float32.

    Every layer keeps its activations for the backward pass; weights, gradients and optimiser state are added.
    """
    c, n_rows = model.config, 2 * length
    scores = batch * n_rows * length * c.n_layer * KEPT_SCORE_BYTES * c.n_head
    hidden = batch * n_rows * c.n_layer * (16 * c.d_model + 4 * c.d_inner) * 4
    logits = min(batch * length, TRAINED_ROWS) * c.vocab_size * 14
    weights = sum(p.numel() for p in model.parameters()) * 4 * 4
    return scores + hidden + logits + weights


def require_memory(model: AnySubsetLM, batch: int, length: int, need: int) -> None:
    """Raise :class:`MemoryBudgetError` where ``need`` bytes are more than is free."""
    free = free_bytes(model.device)
    if need > free:
        raise MemoryBudgetError(
            f"{batch} sequence(s) of {length} tokens need about {need / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB is free; shorten the sequences or use a smaller batch"
        )


def free_bytes(device: torch.device) -> int:
    """What this process may still allocate on ``device``; a container's limit counts."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free
