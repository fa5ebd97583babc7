"""Rung 1: orders, for every subset of five positions and for random permutations."""

import itertools

import numpy as np
import pytest
import torch

from asarm.errors import ConfigError
from asarm.orders import Order, content_limit, random_spans, random_visible, rows_at_ranks


def test_every_subset_of_five_positions():
    visible_BN = torch.tensor(list(itertools.product([False, True], repeat=5)))
    order = Order.from_visible(visible_BN)
    assert torch.equal(order.rank_BN.gather(1, order.order_BN), torch.arange(5).expand(32, 5))
    for visible, positions, n_visible in zip(
        visible_BN.tolist(), order.order_BN.tolist(), order.n_visible_B, strict=True
    ):
        given = [p for p in range(5) if visible[p]]
        masked = [p for p in range(5) if not visible[p]]
        assert positions == given + masked
        assert n_visible == len(given)


def test_padding_has_the_last_ranks_whatever_the_mask_says_of_it():
    visible_BN = torch.tensor([[True, False, True, True, False]])
    order = Order.from_visible(visible_BN, torch.tensor([3]))
    assert order.order_BN.tolist() == [[0, 2, 1, 3, 4]]
    assert order.n_visible_B.tolist() == [2] and order.n_masked_B.tolist() == [1]
    assert order.target_BN.tolist() == [[False, True, False, False, False]]


def test_any_permutation_and_left_to_right():
    order_BN = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s)) for s in range(20)])
    order = Order.from_permutation(order_BN, torch.arange(20) % 9)
    for b in range(20):
        assert [order.rank_BN[b, p].item() for p in order_BN[b]] == list(range(9))
    plain = Order.left_to_right(torch.tensor([2, 0]), 4)
    assert plain.order_BN.tolist() == [[0, 1, 2, 3]] * 2 and plain.n_visible_B.tolist() == [2, 0]


def test_rows_know_position_limit_and_validity():
    order = Order.from_visible(torch.tensor([[False, True, False, True], [True, True, False, True]]))
    rows = rows_at_ranks(order, order.n_visible_B, order.length_B, 2)
    assert rows.position_BR.tolist() == [[0, 2], [2, 4]]  # 4 is the scratch slot
    assert rows.limit_BR.tolist() == [[2, 3], [3, 0]]
    assert rows.valid_BR.tolist() == [[True, True], [True, False]]
    assert content_limit(order, order.rank_BN).tolist() == [[3, 2, 4, 2], [3, 3, 4, 3]]


def test_random_subset_has_the_asked_size_and_leaves_something_to_predict():
    rng = np.random.default_rng(0)
    counts = torch.stack([random_visible(20, 0.25, rng) for _ in range(400)]).sum(0)
    assert counts.sum() == 400 * 5
    # each position is given 100 times on average, standard deviation 8.7; 5 of them is 6e-7 a position
    assert (counts - 100).abs().max() < 5 * 8.7
    assert random_visible(3, 0.99, rng).sum() == 2
    assert random_visible(3, 0.0, rng).sum() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Order.from_visible(torch.ones(2, 3)), "bool tensor"),
        (lambda: Order.from_permutation(torch.tensor([[0, 0, 1]]), torch.tensor([0])), "exactly once"),
        (lambda: Order.from_permutation(torch.tensor([[0, 1]]), torch.tensor([3])), r"got \[3\]"),
        (lambda: Order.from_visible(torch.ones(1, 3).bool(), torch.tensor([4])), r"got \[4\]"),
        (lambda: random_visible(3, 1.0, np.random.default_rng(0)), "got 1.0"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(("length", "visible_fraction"), [(2, 0.0), (5, 0.5), (40, 0.1), (40, 0.5), (40, 0.9)])
def test_random_spans_hide_as_many_tokens_as_a_random_subset_in_a_few_runs(length, visible_fraction):
    rng = np.random.default_rng(0)
    masked = int((~random_visible(length, visible_fraction, rng)).sum())
    runs_seen, hidden = set(), torch.zeros(length)
    for _ in range(400):
        visible_N = random_spans(length, visible_fraction, rng)
        assert int((~visible_N).sum()) == masked
        starts_N = ~visible_N & torch.cat([torch.tensor([True]), visible_N[:-1]])
        runs_seen.add(int(starts_N.sum()))
        hidden += ~visible_N
    assert max(runs_seen) <= min(8, masked)
    assert hidden.min() > 0  # every position is hidden at times
    assert len(runs_seen) > 1 or length < 40
