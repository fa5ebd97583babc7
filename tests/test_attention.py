"""Rung 2: who sees whom, against loops; nothing leaks."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import make_model, random_batch

from asarm.attention import masked_softmax, relative_shift
from asarm.density import target_states
from asarm.engine import engine_of
from asarm.orders import Order, content_limit, may_attend, rows_at_ranks


def test_masks_equal_a_triple_loop_for_all_subsets_of_four():
    for visible in itertools.product([False, True], repeat=4):
        order = Order.from_visible(torch.tensor([visible]))
        sequence = [p for p in range(4) if visible[p]] + [p for p in range(4) if not visible[p]]
        content = may_attend(order.rank_BN, content_limit(order, order.rank_BN))[0]
        query = may_attend(order.rank_BN, order.rank_BN)[0]
        for row in range(4):
            for slot in range(4):
                before = sequence.index(slot) < sequence.index(row)
                assert content[row, slot] == (before or slot == row or (visible[row] and visible[slot]))
                assert query[row, slot] == before


def test_relative_shift_equals_a_loop_and_so_does_its_gradient():
    torch.manual_seed(0)
    x_BHRP = torch.randn(2, 3, 4, 9, dtype=torch.float64, requires_grad=True)
    shift_BR = torch.randint(0, 5, (2, 4))
    out = relative_shift(x_BHRP, shift_BR)
    for b, h, r, n in itertools.product(range(2), range(3), range(4), range(5)):
        assert out[b, h, r, n] == x_BHRP[b, h, r, shift_BR[b, r] + n]
    assert torch.autograd.gradcheck(lambda x: relative_shift(x, shift_BR), x_BHRP)


def test_softmax_of_a_row_that_sees_nothing_is_zero_and_has_no_gradient():
    score = torch.randn(1, 2, 3, 4, requires_grad=True)
    may = torch.tensor([[[True, False, True, False], [False] * 4, [True] * 4]])
    weight = masked_softmax(score, may)
    assert weight[0, :, 1].eq(0).all()
    assert torch.allclose(weight[0, :, [0, 2]].sum(-1), torch.ones(2, 2))
    assert weight[0, :, 0, [1, 3]].eq(0).all()
    (weight**2).sum().backward()
    assert score.grad[0, :, 1].eq(0).all() and score.grad.isfinite().all()


@pytest.mark.parametrize("visible", [(False, True, False, True), (True, True, False, False), (False,) * 4])
def test_a_hidden_token_changes_nothing_and_a_visible_one_does(visible):
    model = make_model(vocab_size=9)
    order = Order.from_visible(torch.tensor([visible]))
    ids_BN = torch.tensor([[1, 2, 3, 4]])
    before_TE, flat_T = target_states(model, ids_BN, order)
    for changed in range(4):
        other_BN = ids_BN.clone()
        other_BN[0, changed] = 8
        after_TE, _ = target_states(model, other_BN, order)
        for t, position in enumerate(flat_T.tolist()):
            sees = bool(order.rank_BN[0, changed] < order.rank_BN[0, position])
            assert torch.equal(before_TE[t], after_TE[t]) != sees


def test_a_row_that_sees_nothing_depends_on_no_token_and_not_on_the_length():
    model = make_model(vocab_size=9)
    nothing = torch.zeros(1, 6, dtype=torch.bool)
    first_TE, _ = target_states(model, torch.arange(6)[None], Order.from_visible(nothing))
    short_TE, _ = target_states(model, torch.arange(3, 6)[None], Order.from_visible(nothing[:, :3]))
    assert torch.allclose(first_TE[0], short_TE[0], atol=1e-6)


def test_cached_calls_see_no_rejected_draft():
    """Write drafts that are then thrown away; a later call at the same limits must not notice."""
    model = make_model(vocab_size=9)
    ids_BN, order = random_batch(9, 3, 7, seed=1)
    n_B = order.n_visible_B

    def query_after(drafts_BK):
        engine = engine_of(model)
        cache = engine.new_cache(3, 7)
        prompt = rows_at_ranks(order, torch.zeros_like(n_B), n_B, int(n_B.max()))
        prompt = replace(prompt, limit_BR=torch.where(prompt.valid_BR, n_B[:, None], 0))
        padded_BS = torch.cat([ids_BN, ids_BN[:, :1]], dim=1)
        engine.prefill(padded_BS.gather(1, prompt.position_BR), prompt, order.order_BN, cache, torch.arange(3))
        if drafts_BK is not None:
            rows = rows_at_ranks(order, n_B, order.length_B, 2)
            rows = replace(rows, limit_BR=rows.limit_BR + rows.valid_BR)
            engine(drafts_BK, rows, order.order_BN, cache, 7)
        return engine(ids_BN[:, :0], rows_at_ranks(order, n_B, n_B + 1, 1), order.order_BN, cache, 7)

    with torch.no_grad():
        clean = query_after(None)
        assert torch.equal(clean, query_after(torch.full((3, 2), 7)))
