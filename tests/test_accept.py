"""Rung 4: the acceptance kernel by algebra, no randomness."""

import pytest
import torch
from scipy.stats import chisquare

from asarm.law import draw
from asarm.sampling.accept import accepted_prefix, residual


def law_of_one_step(draft_V: torch.Tensor, target_V: torch.Tensor) -> torch.Tensor:
    """The law of the token that comes out, its acceptance probability measured from the kernel on a grid of
    uniforms."""
    V = len(draft_V)
    accept_V = torch.zeros(V, dtype=torch.float64)
    for x in range(V):
        if draft_V[x] > 0:  # largest uniform that accepts, by bisection
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                kept = accepted_prefix(
                    draft_V[x].view(1, 1),
                    target_V[x].view(1, 1),
                    torch.tensor([[middle]], dtype=torch.float64),
                    torch.ones(1, 1).bool(),
                )
                low, high = (middle, high) if kept else (low, middle)
            accept_V[x] = low
    weight_V = residual(target_V[None], draft_V[None])[0]
    refused = 1 - (draft_V * accept_V).sum()
    return draft_V * accept_V + refused * weight_V / weight_V.sum()


def _laws():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        draft, target = torch.rand(2, 7, dtype=torch.float64, generator=generator) ** 3
        yield draft / draft.sum(), target / target.sum()
    same = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    yield same, same
    yield torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0, 0, 0.25, 0.75]).double()
    yield torch.tensor([0.5, 0.5, 0, 0]).double(), torch.tensor([0.5, 0.25, 0.25, 0]).double()
    yield torch.tensor([0, 0, 1.0, 0]).double(), torch.tensor([1.0, 0, 0, 0]).double()


@pytest.mark.parametrize(("draft_V", "target_V"), list(_laws()))
def test_the_token_that_comes_out_has_the_target_law(draft_V, target_V):
    assert (law_of_one_step(draft_V, target_V) - target_V).abs().max() < 1e-12


def test_prefix_stops_at_the_first_refusal_and_at_the_last_draft():
    ones, u = torch.ones(4, 3).double(), torch.full((4, 3), 0.5).double()
    target = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]).double()
    valid = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, True, False]])
    assert accepted_prefix(ones, target, u, valid).tolist() == [3, 1, 0, 2]


def test_a_token_of_probability_zero_is_never_kept_nor_drawn():
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert accepted_prefix(zero + 0.5, zero, zero, torch.ones(1, 1, dtype=torch.bool)) == 0
    weight = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]).double()
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    assert draw(weight.expand(1000, 5), uniform).unique().tolist() == [1, 3]


@pytest.mark.parametrize("vocab_size", [2, 3, 10, 101])
def test_draw_follows_the_weights_whatever_their_sum(vocab_size):
    """Chi-square, false-alarm rate 1e-6 a case."""
    generator = torch.Generator().manual_seed(vocab_size)
    weight = torch.rand(vocab_size, generator=generator, dtype=torch.float64) * 7 + 0.1
    uniform = torch.rand(200_000, generator=generator, dtype=torch.float64)
    counts = torch.bincount(draw(weight.expand(200_000, -1), uniform), minlength=vocab_size)
    assert chisquare(counts, weight / weight.sum() * 200_000).pvalue > 1e-6
    skewed = weight * torch.linspace(1, 1.1, vocab_size, dtype=torch.float64)
    assert chisquare(counts, skewed / skewed.sum() * 200_000).pvalue < 1e-6, "the test has no power"


def test_rounding_of_the_weights_does_not_change_what_is_drawn():
    """Relative errors of 1e-5 in 5,000 tokens' weights: each draw changes with a probability of about 1e-5 at most.
    (Inverting the cumulative sum changes a hundred times as many.)"""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(5000, generator=generator, dtype=torch.float64) ** 4
    rounded = weight * (1 + 1e-5 * torch.randn(5000, generator=generator, dtype=torch.float64))
    uniform = torch.rand(4000, generator=generator, dtype=torch.float64)
    assert torch.equal(draw(weight.expand(4000, -1), uniform), draw(rounded.expand(4000, -1), uniform))
    grid = torch.linspace(0, 1, 10**6, dtype=torch.float64)[:-1]
    inverted = [torch.searchsorted(w.cumsum(0), grid * w.sum()) for w in (weight, rounded)]
    assert (inverted[0] != inverted[1]).double().mean() > 1e-4
