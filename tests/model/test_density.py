"""Rung 3: one pass is a joint distribution, and the same one however it is computed."""

import itertools

import pytest
import torch
from conftest import make_model, random_batch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from asarm import Law, Order, conditional_log_probs, density, joint_log_prob
from asarm.memory import trained_rows
from asarm.train.config import ObjectiveConfig
from asarm.train.objective import Batch, Objective


@pytest.mark.parametrize("seed", range(4))
def test_one_pass_equals_one_call_per_token(seed):
    """Each conditional from a sequence in which everything later in the order is blanked out."""
    model = make_model(vocab_size=7, dtype=torch.float64)
    ids_BN, order = random_batch(7, 1, 8, seed=seed)
    logp_BN = conditional_log_probs(model, ids_BN, order)
    for rank in range(int(order.n_visible_B), 8):
        blanked = ids_BN.masked_fill(order.rank_BN >= rank, 0)
        hidden = model(
            blanked,
            torch.cat([torch.arange(8)[None], order.order_BN[:, rank : rank + 1]], dim=1),
            # content rows that see only what is settled: no rank at or above `rank` is anyone's
            torch.cat([torch.maximum(order.rank_BN + 1, order.n_visible_B[:, None]), torch.tensor([[rank]])], dim=1),
            order.rank_BN,
        )
        position = order.order_BN[0, rank]
        alone = model.logits(hidden)[0, 0].log_softmax(-1)[ids_BN[0, position]]
        assert (alone - logp_BN[0, position]).abs() < 1e-10


@pytest.mark.parametrize("visible", [(True, False, False, False), (False, False, True, False), (False,) * 4])
def test_sums_to_one_over_all_completions(visible):
    model = make_model(vocab_size=5, dtype=torch.float64)
    masked = [i for i in range(4) if not visible[i]]
    ids_BN = torch.full((5 ** len(masked), 4), 3)
    ids_BN[:, masked] = torch.tensor(list(itertools.product(range(5), repeat=len(masked))))
    order = Order.from_visible(torch.tensor([visible]).expand(len(ids_BN), 4))
    assert abs(joint_log_prob(model, ids_BN, order).exp().sum() - 1) < 1e-10
    law = Law(temperature=0.7, banned_ids=(0, 2))
    prob_B = joint_log_prob(model, ids_BN, order, law).exp()
    assert abs(prob_B.sum() - 1) < 1e-10
    banned_B = torch.isin(ids_BN[:, masked], torch.tensor([0, 2])).any(1)
    assert prob_B[banned_B].eq(0).all() and prob_B[~banned_B].gt(0).all()


def test_does_not_depend_on_the_batch_or_on_padding():
    model = make_model(vocab_size=9, dtype=torch.float64)
    lengths = [8, 3, 5, 8, 1]
    ids_BN, order = random_batch(9, 5, 8, seed=5, lengths=lengths)
    together_B = joint_log_prob(model, ids_BN, order)
    for b, n in enumerate(lengths):
        visible = ~order.target_BN[b : b + 1, :n]
        alone = joint_log_prob(model, ids_BN[b : b + 1, :n], Order.from_visible(visible))
        assert abs(alone - together_B[b]) < 1e-10


def test_the_order_matters_and_any_permutation_is_scored():
    model = make_model(vocab_size=9, dtype=torch.float64)
    ids_BN = torch.tensor([[1, 2, 3, 4, 5]])
    scores = [
        joint_log_prob(model, ids_BN, Order.from_permutation(torch.tensor([p]), torch.tensor([1]))).item()
        for p in ([0, 1, 2, 3, 4], [0, 4, 3, 2, 1], [0, 2, 4, 1, 3])
    ]
    assert len({round(s, 6) for s in scores}) == 3
    left_to_right = joint_log_prob(model, ids_BN, Order.left_to_right(torch.tensor([1]), 5)).item()
    assert left_to_right == pytest.approx(scores[0], abs=1e-12)


def test_training_loss_is_the_same_computation():
    model = make_model(vocab_size=9)
    ids_BN, order = random_batch(9, 4, 6, seed=2)
    batch = Batch(torch.arange(4), ids_BN, order, settled_B=order.n_visible_B, weight_B=torch.ones(4))
    loss = Objective(model, ObjectiveConfig("joint"))(batch)
    assert batch.n_targets == int(order.n_masked_B.sum())
    assert loss.item() == pytest.approx(-joint_log_prob(model, ids_BN, order).sum().item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_given_token_has_log_probability_zero():
    model = make_model(vocab_size=9)
    ids_BN, order = random_batch(9, 3, 6, seed=4, lengths=[6, 4, 2])
    logp_BN = conditional_log_probs(model, ids_BN, order)
    assert logp_BN[~order.target_BN].eq(0).all() and logp_BN[order.target_BN].lt(0).all()


def whole_cross_entropy_sum(model, hidden_TE, target_T, weight_T) -> torch.Tensor:
    """PyTorch's own, of all rows at once."""
    return (F.cross_entropy(model.logits(hidden_TE), target_T, reduction="none") * weight_T).sum()


def loss_and_gradients(loss_sum, model, hidden_TE, target_T, weight_T) -> list[torch.Tensor]:
    hidden_TE = hidden_TE.clone().requires_grad_()
    loss = loss_sum(model, hidden_TE, target_T, weight_T)
    return [loss.detach(), *torch.autograd.grad(3 * loss, (hidden_TE, model.lm_loss.weight, model.lm_loss.bias))]


def test_the_chunked_loss_equals_cross_entropy_and_never_holds_all_logits():
    """In float64 to 1e-10. In float32 its distance from that is at most a few units of the type's precision further
    than a few times PyTorch's own, whose sums depend on the processor as well."""
    torch.manual_seed(0)
    T, V, E = 2 * trained_rows(torch.device("cpu")) + 7, 50, 8
    model = make_model(vocab_size=V, d_model=E)
    hidden_TE, target_T, weight_T = torch.randn(T, E), torch.randint(0, V, (T,)), torch.rand(T)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,):
                largest = max(largest, out.numel())
            return out

    with Watch():
        found = loss_and_gradients(density.cross_entropy_sum, model, hidden_TE, target_T, weight_T)
    assert largest == trained_rows(torch.device("cpu")) * V
    with torch.no_grad():
        assert torch.equal(density.cross_entropy_sum(model, hidden_TE, target_T, weight_T), found[0])
    plain = loss_and_gradients(whole_cross_entropy_sum, model, hidden_TE, target_T, weight_T)
    in_float64 = (model.double(), hidden_TE.double(), target_T, weight_T.double())
    exact = loss_and_gradients(whole_cross_entropy_sum, *in_float64)
    for a, b in zip(loss_and_gradients(density.cross_entropy_sum, *in_float64), exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    for ours, theirs, b in zip(found, plain, exact, strict=True):
        our_error, their_error = ((a.double() - b).abs().max() for a in (ours, theirs))
        assert our_error <= 4 * their_error + 8 * torch.finfo(torch.float32).eps * b.abs().max()
