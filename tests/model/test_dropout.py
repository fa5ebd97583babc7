"""Dropout by fourteen bits a number.

The statistical tests draw 2,000,000 numbers with a fixed seed and compare 12 deviations with five standard errors (one
in 1.7 million is beyond): a test fails by chance with one seed in 140,000. The negative controls are masks with a
planted bug.
"""

import pytest
import torch

from asarm.dropout import dropout, signs

N = 2_000_000
ZEROS = torch.zeros(N)


def kept(p: float, x: torch.Tensor = ZEROS) -> torch.Tensor:
    return ~signs(x, p).signbit()


def deviations(keep_N: torch.Tensor, p: float) -> list[float]:
    """In standard errors: of the share kept from 1 - p, at each place in a word, and of the covariance of
    neighbours from 0, at each distance within two words."""
    keep, q = keep_N.float(), 1 - p
    shares = [(keep[place::4].mean() - q) / (q * p / (N / 4)) ** 0.5 for place in range(4)]
    pairs = [(((keep[d:] - q) * (keep[:-d] - q)).mean()) / (q * p / N**0.5) for d in range(1, 9)]
    return [float(x) for x in shares + pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_numbers_are_kept_independently_with_the_probability_asked_for(p, dtype):
    torch.manual_seed(0)
    assert max(map(abs, deviations(kept(p, ZEROS.to(dtype)), p))) < 5


@pytest.mark.parametrize("bug", ["words without their highest bits", "one number for two"])
def test_a_planted_bug_is_found(bug):
    torch.manual_seed(0)
    if bug == "one number for two":
        keep_N = kept(0.1, ZEROS[: N // 2]).repeat_interleave(2)
    else:
        bits = torch.empty(N // 4, dtype=torch.int64).random_(2**61).view(torch.int16)
        keep_N = bits.bitwise_and(2**14 - 1) >= round(0.1 * 2**14)
    assert max(map(abs, deviations(keep_N, 0.1))) > 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.25, 0.75])
def test_what_is_kept_is_scaled_and_its_gradient_too(dtype, p):
    x = (torch.rand(70, 50, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    torch.manual_seed(1)
    y = dropout(x, p, training=True)
    torch.manual_seed(1)
    keep = kept(p, x)  # the generator's seed fixes the numbers
    assert 0.9 * (1 - p) < keep.double().mean() < 1.1 * (1 - p)
    assert torch.allclose(y.double(), (x * keep).double() / (1 - p), rtol=torch.finfo(dtype).eps * 2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient.double(), keep.double() / (1 - p), rtol=torch.finfo(dtype).eps * 2)


def test_nothing_is_dropped_outside_training_or_at_probability_zero():
    x = torch.randn(10)
    assert torch.equal(dropout(x, 0.5, training=False), x)
    assert torch.equal(dropout(x, 0.0, training=True), x)


def test_a_tensor_of_any_size_has_signs():
    for shape in ((), (0,), (1,), (3, 5), (2, 0, 4)):
        assert signs(torch.zeros(shape), 0.1).shape == shape
