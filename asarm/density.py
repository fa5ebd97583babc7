"""Joint and conditional log-probabilities in one pass (Guo & Ermon 2025).

Training's loss, scoring and every evaluation that needs a probability are this one computation: content rows for all
tokens, a query row for every masked rank with its own rank as limit.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .attention import product_dtype
from .law import Law
from .memory import call_bytes, require_memory, trained_rows
from .network import Network
from .orders import Order, Rows, content_limit, require_token_ids, rows_at_ranks

# Trained rows are padded to a multiple of this. Every batch has another number of targets, and activations of ever new
# sizes fit none of the holes that freed ones left: a process that keeps its memory would grow from step to step.
ROW_MULTIPLE = 32
PROJECTION_ROWS = 2048  # how many [rows, vocabulary] logits a scoring pass holds at a time


def query_states(model: Network, ids_BN: torch.Tensor, order: Order, query: Rows) -> torch.Tensor:
    """Hidden states [B, Q, E] of any query rows, in one pass with the content rows of all tokens."""
    B, N = ids_BN.shape
    position_BN = torch.arange(N, device=ids_BN.device).expand(B, N)
    return model(
        ids_BN,
        torch.cat([position_BN, query.position_BR], dim=1),
        torch.cat([content_limit(order, order.rank_BN), query.limit_BR], dim=1),
        order.rank_BN,
    )


def target_states(model: Network, ids_BN: torch.Tensor, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, E] of all masked tokens of the batch, and their flat indices [T] into ``ids_BN``.

    Targets come sequence by sequence, each in order of rank. What ``ids_BN`` holds at a masked position enters only
    the rows that may see it.
    """
    B, N = ids_BN.shape
    query = rows_at_ranks(order, order.n_visible_B, order.length_B, int(order.n_masked_B.max()))
    hidden_BQE = query_states(model, ids_BN, order, query)
    flat_BQ = torch.arange(B, device=ids_BN.device)[:, None] * N + query.position_BR
    return hidden_BQE[query.valid_BR], flat_BQ[query.valid_BR]


class ProjectedCrossEntropy(torch.autograd.Function):
    """Weighted sum over rows [T] of -log softmax(hidden . weight + bias)[target], in nats, float32.

    ``trained_rows`` at a time, each chunk's gradient at once after its loss: the [T, V] logits never exist
    together, and are not computed twice either (Hsu et al. 2024, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: torch.Tensor,
        weight_VE: torch.Tensor,
        bias_V: torch.Tensor,
        target_T: torch.Tensor,
        weight_T: torch.Tensor,
    ) -> torch.Tensor:
        dtype = product_dtype(weight_VE)
        wide = torch.promote_types(dtype, torch.float32)
        total, T = torch.zeros((), dtype=wide, device=hidden_TE.device), len(target_T)
        hidden_TE, target_T, weight_T = (
            F.pad(x, (0,) * (2 * x.ndim - 1) + (-T % ROW_MULTIPLE,)) for x in (hidden_TE, target_T, weight_T)
        )
        hidden_grads: list[torch.Tensor] = []
        weight_grad, bias_grad = torch.empty(0), torch.zeros_like(bias_V)
        n_rows = trained_rows(hidden_TE.device)
        for first in range(0, len(target_T), n_rows):
            rows = slice(first, first + n_rows)
            hidden_CE = hidden_TE[rows].to(dtype)
            logp_CV = F.linear(hidden_CE, weight_VE, bias_V).log_softmax(-1, dtype=wide)
            total -= (logp_CV.gather(1, target_T[rows, None]).squeeze(1) * weight_T[rows]).sum()
            if any(ctx.needs_input_grad):
                grad_CV = logp_CV.exp_()
                grad_CV.scatter_add_(1, target_T[rows, None], -torch.ones_like(grad_CV[:, :1]))
                grad_CV = grad_CV.mul_(weight_T[rows, None]).to(dtype)
                hidden_grads.append((grad_CV @ weight_VE).to(hidden_TE.dtype))
                bias_grad += grad_CV.sum(0).to(bias_V.dtype)
                update_VE = grad_CV.mT @ hidden_CE
                weight_grad = update_VE.to(weight_VE.dtype) if first == 0 else weight_grad.add_(update_VE)
        if hidden_grads:
            ctx.grads = torch.cat(hidden_grads)[:T], weight_grad, bias_grad
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place: the largest is of the size of the vocabulary matrix
        return *(x.mul_(grad) for x in grads), None, None


def cross_entropy_sum(
    model: Network, hidden_TE: torch.Tensor, target_T: torch.Tensor, weight_T: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of weight * -log p(target), in nats, without the [T, V] logits."""
    return ProjectedCrossEntropy.apply(hidden_TE, model.lm_loss.weight, model.lm_loss.bias, target_T, weight_T)


def require_memory_for_density(model: Network, batch: int, length: int) -> None:
    """Raise :class:`~asarm.errors.MemoryBudgetError` where scoring such a batch would not fit."""
    need = call_bytes(model, batch, length, 2 * length, min(PROJECTION_ROWS, batch * length))
    require_memory(model, batch, length, need)


@torch.no_grad()
def conditional_log_probs(model: Network, ids_BN: torch.Tensor, order: Order, law: Law | None = None) -> torch.Tensor:
    """Log-probability [B, N], float64, of each masked token given what precedes it in the order; 0 at given positions
    and padding.

    ``law`` is the law to score under (default: the model's own, temperature 1, nothing banned).
    """
    law = law or Law()
    ids_BN, order = ids_BN.to(model.device), order.to(model.device)
    ids_BN = ids_BN.where(order.rank_BN < order.length_B[:, None], 0)  # whatever fills the padding
    require_token_ids(ids_BN, model.config.vocab_size)
    require_memory_for_density(model, *ids_BN.shape)
    hidden_TE, flat_T = target_states(model, ids_BN, order)
    logp_X = torch.zeros(ids_BN.numel(), dtype=torch.float64, device=ids_BN.device)
    for hidden_CE, flat_C in zip(hidden_TE.split(PROJECTION_ROWS), flat_T.split(PROJECTION_ROWS), strict=True):
        logp_CV = law.log_probs(model.logits(hidden_CE))
        logp_X[flat_C] = logp_CV.gather(1, ids_BN.flatten()[flat_C, None]).squeeze(1)
    return logp_X.view_as(ids_BN)


def joint_log_prob(model: Network, ids_BN: torch.Tensor, order: Order, law: Law | None = None) -> torch.Tensor:
    """Joint log-probability [B], float64, in nats, of the masked tokens given the visible ones."""
    return conditional_log_probs(model, ids_BN, order, law).sum(1)
