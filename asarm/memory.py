"""Will it fit? Asked before long work starts."""

import math
from pathlib import Path

import psutil
import torch

from .errors import MemoryBudgetError
from .network import Network

SCORE_COPIES = 8  # float32 [rows, slots] arrays per head alive at the peak of an attention call, as measured
# bytes that a layer keeps for the backward pass, with dropout: a row's for each of d_model and of d_inner, a score's
KEPT_MODEL, KEPT_INNER, KEPT_SCORE = 40, 9, 5
GPU_SCORE = 27  # a score's at most in a layer's backward pass on a GPU: bias, gradients, relative positions and places
STATE_BYTES = 16  # a parameter's gradient, two moments, and a copy (in bfloat16, or averaged)


def trained_rows(device: torch.device) -> int:
    """How many [rows, vocabulary] logits a training pass holds at a time."""
    return 512 if device.type == "cpu" else 2048


def call_bytes(model: Network, batch: int, length: int, n_rows: int, n_projected: int) -> int:
    """Upper estimate of the memory of a call of ``n_rows`` rows a sequence over ``length`` slots, of which
    ``n_projected`` in the whole batch are projected onto the vocabulary at a time."""
    c, size = model.config, model.dtype.itemsize
    cache = 2 * c.n_layer * batch * (length + 1) * c.d_model * size
    relative = 2 * c.n_layer * length * c.d_model * size
    scores = batch * n_rows * length * (SCORE_COPIES * 4 * c.n_head + 2 * 8)
    hidden = batch * n_rows * (4 * c.d_model + 2 * c.d_inner) * size
    logits = n_projected * c.vocab_size * (size + 4 * 8)
    return cache + relative + hidden + max(scores, logits)  # attention is over when the projection begins


def training_bytes(model: Network, batch: int, length: int, masked: float = 1.0, n_shards: int = 1) -> int:
    """Upper estimate of what a training pass over ``batch`` rows of which a share ``masked`` is predicted needs besides
    the weights, in bfloat16 or float32; gradients and optimiser state are dealt out to ``n_shards`` processes.

    Every layer keeps its activations for the backward pass, or with ``model.recompute`` its input alone; of one layer
    there are gradients as well.
    """
    c, n_rows = model.config, math.ceil((1 + masked) * batch * length)
    n_parameters = sum(p.numel() for p in model.parameters())
    of_a_layer = n_rows * (KEPT_MODEL * c.d_model + KEPT_INNER * c.d_inner + KEPT_SCORE * c.n_head * length)
    gradients = of_a_layer
    if model.device.type != "cpu":
        gradients += n_rows * (GPU_SCORE - KEPT_SCORE) * c.n_head * length
    inputs = n_rows * c.n_layer * c.d_model * 4
    kept = inputs + of_a_layer if model.recompute else c.n_layer * of_a_layer
    logits = min(batch * length, trained_rows(model.device)) * c.vocab_size * 14
    return kept + gradients + logits + n_parameters * STATE_BYTES // n_shards


def require_memory(
    model: Network,
    batch: int,
    length: int,
    need: int,
    remedy: str = "shorten the sequences or use a smaller batch",
) -> None:
    """Raise :class:`MemoryBudgetError` where ``need`` bytes are more than is free."""
    free = free_bytes(model.device)
    if need > free:
        raise MemoryBudgetError(
            f"{batch} sequence(s) of {length} tokens need about {need / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB is free; {remedy}"
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
