"""Rows, orders and losses of an optimiser step: against a slow loop and Hugging Face's model."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_model
from scipy.stats import kstest
from transformers import XLNetLMHeadModel

from asarm import AnySubsetLM, joint_log_prob
from asarm.train.config import MaskingConfig, ObjectiveConfig, OptimizerConfig
from asarm.train.objective import Batch, Objective, make_batch
from asarm.train.schedule import lr_factor, masking_range, masking_rates


def test_schedules():
    o = OptimizerConfig(steps=10, warmup_steps=4)
    assert [lr_factor(s, o) for s in range(11)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    )
    m = MaskingConfig(warmup_steps=5000)
    assert masking_range(0, m) == (0.15, 0.15)
    assert masking_range(2500, m) == pytest.approx((0.5, 0.57))
    assert masking_range(99_999, m) == pytest.approx((0.85, 0.99))


def some_batch(n_rows=6, length=12, step=3, masking=None, objective=None, seed=1) -> Batch:
    ids = np.random.default_rng(0).integers(7, 100, (n_rows, length))
    masking = masking or MaskingConfig(0.2, 0.9, 0.2, 0.9, 0)
    indices = list(range(step * n_rows, (step + 1) * n_rows))
    return make_batch(ids, indices, step, n_rows, masking, objective or ObjectiveConfig(), seed)


def gradients(objective: Objective, parts) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss summed over the parts, and its gradient."""
    objective.zero_grad()
    losses = [objective(part) for part in parts]
    sum(losses).backward()
    return sum(losses).item(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows_per_pass", [1, 3, 6])
def test_loss_and_gradient_equal_a_slow_loop_however_the_batch_is_split(rows_per_pass):
    batch, model = some_batch(), make_model(vocab_size=100, mask_token_id=6, spread=0.1).train()
    objective = Objective(model, ObjectiveConfig())
    total, split = gradients(objective, batch.parts(rows_per_pass))
    slow = -sum(
        joint_log_prob(model, batch.ids_BN[b : b + 1], batch.order.of(slice(b, b + 1))).item() for b in range(6)
    )
    assert total == pytest.approx(slow, rel=1e-5)
    whole = gradients(objective, [batch])[1]
    for name, gradient in whole.items():
        assert torch.allclose(gradient, split[name], atol=1e-5), name


def test_gradient_checkpointing_computes_layers_again_and_changes_nothing():
    batch, model = some_batch(), make_model(vocab_size=100, mask_token_id=6, spread=0.1, dropout=0.1).train()
    objective, results, calls = Objective(model, ObjectiveConfig()), [], []
    for layer in model.transformer.layer:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.recompute = enable
        torch.manual_seed(0)
        calls.clear()
        results.append(gradients(objective, [batch]))
        assert len(calls) == len(model.transformer.layer) * (1 + enable)
    (plain, plain_grads), (checkpointed, grads) = results
    assert plain == checkpointed
    assert all(torch.equal(plain_grads[name], grads[name]) for name in plain_grads)


def hugging_face_loss(model: AnySubsetLM, batch: Batch, attention: str | None) -> float:
    """The paper's masks, row by row and slot by slot: the parallel objective's with one of its prompt attentions, or
    with None the joint one's."""
    theirs = XLNetLMHeadModel(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    total, (B, N) = 0.0, batch.ids_BN.shape
    for b in range(B):
        order, settled = batch.order.order_BN[b].tolist(), int(batch.settled_B[b])
        n_prompt = int(
            batch.order.n_visible_B[b]
        )  # differs from the prompt's own length where all or none see it whole
        may = torch.zeros(N, N, dtype=torch.bool)
        for i, j in itertools.product(range(N), range(N)):
            if attention is not None and i >= settled:
                may[order[i], order[j]] = j < settled
            elif attention == "causal":
                may[order[i], order[j]] = j < i
            elif attention == "prompt_and_decoded":
                may[order[i], order[j]] = j < settled
            else:
                may[order[i], order[j]] = j < i or (i < n_prompt and j < n_prompt)
        targets = order[settled:]
        mapping = torch.eye(N)[None, targets]
        logits = theirs(batch.ids_BN[b : b + 1], perm_mask=(~may)[None].float(), target_mapping=mapping).logits[0]
        logp = logits.log_softmax(-1).gather(1, batch.ids_BN[b, targets, None])
        total -= float(batch.weight_B[b] * logp.sum())
    return total


@pytest.mark.parametrize("attention", [None, "prompt_and_decoded", "prompt_only", "causal"])
@pytest.mark.parametrize("loss_scale", ["none", "snr"])
def test_objectives_equal_hugging_face_with_the_papers_masks(attention, loss_scale):
    """Masking rates low enough that every target sees something: where nothing is seen, Hugging Face sees all."""
    name = {} if attention is None else {"name": "parallel", "prompt_attention": attention}
    config = ObjectiveConfig(**name, loss_scale=loss_scale)
    batch = some_batch(masking=MaskingConfig(0.2, 0.7, 0.2, 0.7, 0, any_permutation_fraction=0.5), objective=config)
    model = make_model(vocab_size=100, mask_token_id=6, spread=0.3)
    expected = hugging_face_loss(model, batch, attention)
    assert Objective(model, config)(batch).item() == pytest.approx(expected, rel=1e-5)
    plain = some_batch(masking=MaskingConfig(0.2, 0.7, 0.2, 0.7, 0, any_permutation_fraction=0.5))
    if attention is not None:
        assert Objective(model, ObjectiveConfig())(plain).item() != pytest.approx(expected, rel=1e-3)


def test_the_parallel_objective_has_tokens_decoded_after_the_prompt():
    objective = ObjectiveConfig("parallel", "prompt_only")
    batch = some_batch(n_rows=200, length=50, objective=objective)
    decoded_B = batch.settled_B - batch.order.n_visible_B
    assert decoded_B.min() >= 0 and (decoded_B > 5).sum() > 50
    assert batch.settled_B.tolist() == some_batch(n_rows=200, length=50).settled_B.tolist()
    for name, whole_B in (("causal", 0 * batch.settled_B), ("prompt_and_decoded", batch.settled_B)):
        other = some_batch(n_rows=200, length=50, objective=ObjectiveConfig("parallel", name))
        assert other.order.n_visible_B.tolist() == whole_B.tolist()
        assert torch.equal(other.order.order_BN, batch.order.order_BN)


def test_loss_scales():
    rates = {}
    for scale in ("none", "masking_rate", "snr"):
        batch = some_batch(length=1000, objective=ObjectiveConfig(loss_scale=scale))
        rates[scale] = batch.weight_B
        masked_B = batch.n_targets and (1000 - batch.settled_B) / 1000
    assert rates["none"].eq(1).all()
    assert torch.allclose(rates["masking_rate"], masked_B.double(), atol=1e-3)
    assert torch.allclose(rates["snr"] / (1 + rates["snr"]), masked_B.double(), atol=1e-3)


def test_orders_are_a_mixture_as_asked():
    masking = MaskingConfig(0.3, 0.5, 0.3, 0.5, 0, left_to_right_fraction=0.25, any_permutation_fraction=0.5)
    batch = some_batch(n_rows=800, length=40, masking=masking)
    order_BN, n_B = batch.order.order_BN, batch.order.n_visible_B
    prefix = sum(order_BN[b, :n].tolist() == list(range(n)) for b, n in enumerate(n_B.tolist()))
    ascending = sum(order_BN[b, n:].diff().min() > 0 for b, n in enumerate(n_B.tolist()))
    # binomial: six standard deviations either side
    assert abs(prefix - 200) < 6 * (800 * 0.25 * 0.75) ** 0.5 and abs(ascending - 400) < 6 * (800 / 4) ** 0.5
    assert all(order_BN[b, :n].diff().gt(0).all() for b, n in enumerate(n_B.tolist())), "a prompt is in ascending order"


def test_masking_rates_are_one_in_each_part_of_the_range():
    config = MaskingConfig(0.2, 0.4, 0.2, 0.4, 0)
    means = []
    for step in range(200):
        rates = masking_rates(step, 16, config, seed=1)
        strata = np.sort(np.floor((rates - 0.2) / 0.2 * 16 - (rates.min() - 0.2) / 0.2 * 16 + 1e-6))
        assert strata.tolist() == list(range(16))
        assert rates.min() >= 0.2 and rates.max() < 0.4
        means.append(rates.mean())
    independent = 0.2 / 12**0.5 / 4  # standard deviation of the mean of 16 independent rates
    assert np.std(means) < independent / 4
    first = np.array([masking_rates(step, 16, config, seed=1)[0] for step in range(400)])
    assert kstest((first - 0.2) / 0.2, "uniform").pvalue > 1e-6  # false alarm: once in a million seeds


def test_a_process_makes_its_share_of_the_batch():
    """Rows, orders, rates and weights are those of the whole batch, whoever makes them."""
    ids = np.random.default_rng(0).integers(7, 100, (6, 12))
    arguments = (3, 6, MaskingConfig(0.2, 0.9, 0.2, 0.9, 0, span_fraction=0.5), ObjectiveConfig(loss_scale="snr"), 1)
    whole = make_batch(ids, list(range(18, 24)), *arguments)
    for rank in range(2):
        share = make_batch(ids[rank::2], list(range(18 + rank, 24, 2)), *arguments)
        of_whole = whole.of(torch.tensor([whole.index_B.tolist().index(i) for i in share.index_B.tolist()]))
        for name in ("ids_BN", "settled_B", "weight_B"):
            assert torch.equal(getattr(share, name), getattr(of_whole, name))
        assert torch.equal(share.order.order_BN, of_whole.order.order_BN)
    assert whole.settled_B.tolist() == sorted(whole.settled_B.tolist()), "like with like"
