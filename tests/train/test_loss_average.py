"""How a step's loss is averaged: over its targets, or over its rows' own means, however the step is computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model
from training_runs import NO_DROPOUT, losses, small_run
from transformers import XLNetLMHeadModel

from asarm import AnySubsetLM
from asarm.errors import ConfigError
from asarm.train.config import LOSS_AVERAGES, LOSS_SCALES, MaskingConfig, ObjectiveConfig
from asarm.train.model import train
from asarm.train.objective import Batch, Objective, make_batch
from asarm.train.schedule import masking_rates

N_ROWS, LENGTH, STEP, SEED = 6, 20, 3, 1
UNEQUAL = MaskingConfig(0.1, 0.85, 0.1, 0.85, 0)  # every target sees something: Hugging Face's sees all otherwise
BOTH_AND_ALL = [(average, scale) for average in LOSS_AVERAGES for scale in LOSS_SCALES]


def unequal_batch(objective: ObjectiveConfig, masking: MaskingConfig = UNEQUAL) -> Batch:
    ids = np.random.default_rng(0).integers(7, 100, (N_ROWS, LENGTH))
    indices = list(range(STEP * N_ROWS, (STEP + 1) * N_ROWS))
    return make_batch(ids, indices, STEP, N_ROWS, masking, objective, SEED)


def our_loss(objective: Objective, config: ObjectiveConfig, batches: list[Batch], rows_per_pass: int) -> torch.Tensor:
    """Of a step whose rows are in several batches, as several processes have them, in parts."""
    divisor = sum(batch.divisor(config.loss_average) for batch in batches)
    return sum(objective(part) for batch in batches for part in batch.parts(rows_per_pass)) / divisor


def in_double(model: AnySubsetLM) -> XLNetLMHeadModel:
    """Hugging Face's model with the same weights."""
    theirs = XLNetLMHeadModel(model.config).double().eval()
    theirs.load_state_dict(model.state_dict())
    encode = theirs.transformer.relative_positional_encoding  # in float32, which the library cannot mix with float64
    theirs.transformer.relative_positional_encoding = lambda *a, **k: encode(*a, **k).double()
    return theirs


def their_row_means(theirs: XLNetLMHeadModel, batch: Batch) -> list[torch.Tensor]:
    """Hugging Face's loss of each row alone: the mean over its targets."""
    means = []
    for b, n_prompt in enumerate(batch.order.n_visible_B.tolist()):
        rank_N, targets = batch.order.rank_BN[b], batch.order.order_BN[b, n_prompt:]
        both_given_NN = (rank_N[:, None] < n_prompt) & (rank_N < n_prompt)
        hidden_NN = ~((rank_N < rank_N[:, None]) | both_given_NN)
        mapping = torch.eye(LENGTH, dtype=torch.float64)[None, targets]
        ids_1N = batch.ids_BN[b : b + 1]
        made = theirs(ids_1N, perm_mask=hidden_NN[None].double(), target_mapping=mapping, labels=ids_1N[:, targets])
        means.append(made.loss)
    return means


def their_loss(theirs: XLNetLMHeadModel, batch: Batch, config: ObjectiveConfig) -> torch.Tensor:
    """The average of Hugging Face's losses, each row's scaled as in Guo & Ermon's code."""
    rates = masking_rates(STEP, N_ROWS, UNEQUAL, SEED)[batch.index_B - STEP * N_ROWS]
    scale = {"none": lambda m: 1.0, "masking_rate": lambda m: m, "snr": lambda m: 1 / ((1 - m) / m)}[config.loss_scale]
    scaled = [scale(rate) * mean for rate, mean in zip(rates, their_row_means(theirs, batch), strict=True)]
    if config.loss_average == "per_row_mean":  # theirs: accumulated over batches that have one masking rate each
        return sum(scaled) / N_ROWS
    targets = batch.order.n_masked_B.tolist()
    return sum(n * loss for n, loss in zip(targets, scaled, strict=True)) / sum(targets)


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    found = {name.removeprefix("model."): p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in found.items()}


@pytest.mark.parametrize(("average", "scale"), BOTH_AND_ALL)
def test_loss_and_gradient_equal_hugging_faces_on_rows_with_unequal_masking_rates(average, scale):
    config = ObjectiveConfig(loss_scale=scale, loss_average=average)
    batch, model = unequal_batch(config), make_model(vocab_size=100, mask_token_id=6, spread=0.3, dtype=torch.float64)
    assert batch.order.n_masked_B.max() > 4 * batch.order.n_masked_B.min()
    objective, theirs = Objective(model, config), in_double(model)
    loss, expected = our_loss(objective, config, [batch], N_ROWS), their_loss(theirs, batch, config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, expected = gradients(objective, loss), gradients(theirs, expected)
    assert ours.keys() == expected.keys() and len(ours) > 20
    for name, gradient in ours.items():  # float64's rounding, of products of some tens of terms
        assert torch.allclose(gradient, expected[name], rtol=1e-10, atol=1e-12 * expected[name].abs().max()), name
    other = ObjectiveConfig(loss_scale=scale, loss_average=next(a for a in LOSS_AVERAGES if a != average))
    differs = gradients(objective, our_loss(Objective(model, other), other, [unequal_batch(other)], N_ROWS))
    gap = (differs["lm_loss.bias"] - ours["lm_loss.bias"]).norm() / ours["lm_loss.bias"].norm()
    assert gap > 0.05, "the two averages differ on such a batch"


def test_per_token_is_hugging_faces_own_mean_over_a_batch_of_unequal_rows():
    """Its labels of -100 count for nothing: one mean over all targets."""
    config = ObjectiveConfig()
    batch, model = unequal_batch(config), make_model(vocab_size=100, mask_token_id=6, spread=0.3, dtype=torch.float64)
    order, given_BN = batch.order, batch.order.rank_BN < batch.order.n_visible_B[:, None]
    sees_below_BN = order.rank_BN.where(~given_BN, order.n_visible_B[:, None])
    hidden_BNN = ~(order.rank_BN[:, None, :] < sees_below_BN[:, :, None])
    mapping_BNN = torch.eye(LENGTH, dtype=torch.float64).expand(N_ROWS, LENGTH, LENGTH)
    labels_BN = batch.ids_BN.where(~given_BN, -100)
    theirs = in_double(model)
    made = theirs(batch.ids_BN, perm_mask=hidden_BNN.double(), target_mapping=mapping_BNN, labels=labels_BN)
    assert our_loss(Objective(model, config), config, [batch], N_ROWS).item() == pytest.approx(
        made.loss.item(), rel=1e-12
    )


@pytest.mark.parametrize(("average", "scale"), BOTH_AND_ALL)
@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_parts_and_processes_add_up_to_the_same_loss_and_gradient(average, scale, n_processes):
    config = ObjectiveConfig(loss_scale=scale, loss_average=average)
    model = make_model(vocab_size=100, mask_token_id=6, spread=0.3, dtype=torch.float64)
    objective, whole = Objective(model, config), unequal_batch(config)
    shares = [whole.of(whole.index_B % n_processes == rank) for rank in range(n_processes)]
    loss, in_parts = our_loss(objective, config, [whole], N_ROWS), our_loss(objective, config, shares, 1)
    assert in_parts.item() == pytest.approx(loss.item(), rel=1e-12)
    expected, found = gradients(objective, loss), gradients(objective, in_parts)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-10, atol=1e-12 * expected[name].abs().max()), name


def test_rows_with_one_masking_rate_have_the_same_loss_in_both_averages():
    equal = MaskingConfig(0.5, 0.5, 0.5, 0.5, 0)
    model = make_model(vocab_size=100, mask_token_id=6, spread=0.3, dtype=torch.float64)
    found = []
    for average in LOSS_AVERAGES:
        config = ObjectiveConfig(loss_average=average)
        found.append(our_loss(Objective(model, config), config, [unequal_batch(config, equal)], N_ROWS).item())
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_run_is_trained_with_its_average_whatever_its_passes(text_file, tmp_path):
    runs = {}
    for average in LOSS_AVERAGES:
        for rows_per_pass in (1, 4):
            folder = tmp_path / f"{average}-{rows_per_pass}"
            run = small_run(text_file, folder, steps=3, architecture=NO_DROPOUT)
            optimizer = replace(run.optimizer, rows_per_pass=rows_per_pass)
            masking = replace(run.masking, warmup_steps=0)
            objective = ObjectiveConfig(loss_average=average)
            train(replace(run, optimizer=optimizer, masking=masking, objective=objective))
            runs[average, rows_per_pass] = losses(folder)
    for average in LOSS_AVERAGES:
        assert runs[average, 1] == pytest.approx(runs[average, 4], abs=1e-5)
    differ = np.subtract(runs["per_token", 4], runs["per_row_mean", 4])
    assert abs(differ).max() > 1e-4, "far more than rounding"


def test_an_unknown_average_is_named():
    with pytest.raises(ConfigError, match=r"objective.loss_average must be one of per_token, per_row_mean, got 'mean'"):
        ObjectiveConfig(loss_average="mean")
