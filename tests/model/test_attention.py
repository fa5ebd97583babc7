"""Rung 2: who sees whom, against loops; nothing leaks."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import make_model, random_batch

from asarm import row_mask as row_mask_module
from asarm.attention import block_attention, fused_attention
from asarm.density import target_states
from asarm.engine import engine_of
from asarm.orders import Order, content_limit, may_attend, rows_at_ranks
from asarm.row_mask import RowMask


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


def attention_inputs(B=3, R=4, N=5, H=3, D=2):
    """Random arguments, float64, in which one row sees nothing."""
    torch.manual_seed(0)
    shapes = ((B, R, H, D), (B, R, H, D), (B, N, H, D), (B, N, H, D), (2 * N, H, D))
    may_BRN = torch.rand(B, R, N) < 0.5
    may_BRN[..., 0] = True
    may_BRN[1, 2] = False
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return tensors, may_BRN, torch.randint(0, N, (B, R))


def slow_attention(content_q, relative_q, key, value, relative_key, may_BRN, shift_BR):
    """A loop over rows and the slots that each sees."""
    out = torch.zeros_like(content_q)
    for b, r, h in itertools.product(*map(range, content_q.shape[:3])):
        slots = may_BRN[b, r].nonzero().flatten()
        score = content_q[b, r, h] @ key[b, slots, h].T
        score = score + relative_q[b, r, h] @ relative_key[slots + shift_BR[b, r], h].T
        out[b, r, h] = score.softmax(-1) @ value[b, slots, h]
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three rows, whose slots and relative keys come in pairs."""
    monkeypatch.setitem(row_mask_module.BLOCK_ROWS, torch.float32, 3)
    monkeypatch.setattr(row_mask_module, "MULTIPLE", 2)


WAYS = pytest.mark.parametrize("attend", [block_attention, fused_attention])


def ascending_inputs(B=2, N=16, H=2, D=3):
    """Random arguments, float64: content and query rows of an ascending order in which two tokens are given, one of
    them late."""
    torch.manual_seed(0)
    visible_BN = torch.zeros(B, N, dtype=torch.bool)
    visible_BN[:, [1, N - 2]] = True
    order = Order.from_visible(visible_BN)
    query = rows_at_ranks(order, order.n_visible_B, order.length_B, N)
    limit_BR = torch.cat([content_limit(order, order.rank_BN), query.limit_BR], dim=1)
    position_BR = torch.cat([torch.arange(N).expand(B, N), query.position_BR.clamp(max=N - 1)], dim=1)
    shapes = ((B, 2 * N, H, D), (B, 2 * N, H, D), (B, N, H, D), (B, N, H, D), (2 * N, H, D))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return tensors, may_attend(order.rank_BN, limit_BR), N - 1 - position_BR


@WAYS
@pytest.mark.parametrize("inputs", [attention_inputs, ascending_inputs])
def test_attention_and_its_gradient_equal_a_loop(attend, inputs, small_blocks):
    tensors, may_BRN, shift_BR = inputs()
    row_mask = RowMask.of(may_BRN, shift_BR, min(may_BRN.shape[1:]), torch.float64)
    out_BRHD = attend(*tensors, row_mask, 0.0)
    slow_BRHD = slow_attention(*tensors, may_BRN, shift_BR)
    assert torch.allclose(out_BRHD, slow_BRHD, atol=1e-12)
    assert out_BRHD[~may_BRN.any(-1)].eq(0).all(), "rows that see nothing"
    weight = torch.randn_like(out_BRHD)
    ours, slow = (torch.autograd.grad((x * weight).sum(), tensors) for x in (out_BRHD, slow_BRHD))
    for a, b in zip(ours, slow, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_in_ascending_order_a_block_leaves_out_what_none_of_its_rows_sees(small_blocks):
    _, may_BRN, shift_BR = ascending_inputs()
    B, R, N = may_BRN.shape
    row_mask = RowMask.of(may_BRN, shift_BR, N, torch.float64)
    for block in row_mask.blocks:
        slots = [*range(block.n_near), *block.far_X.tolist()]
        others = sorted(set(range(N)) - set(slots))
        assert not may_BRN[block.sequence, block.rows][:, others].any()
        assert torch.equal(block.bias_RS, row_mask.bias_BRN[block.sequence, block.rows][:, slots])
    assert sorted(r for b in row_mask.blocks for r in range(R)[b.rows]) == sorted([*range(R)] * B)
    assert any(len(block.far_X) for block in row_mask.blocks)
    assert sum(block.bias_RS.numel() for block in row_mask.blocks) < 0.75 * may_BRN.numel()
    queries = row_mask.after(N).blocks
    assert sorted(r for b in queries for r in range(R - N)[b.rows]) == sorted([*range(R - N)] * B)


@WAYS
def test_the_gradient_of_attention_with_dropout(attend, small_blocks):
    tensors, may_BRN, shift_BR = attention_inputs()
    row_mask = RowMask.of(may_BRN, shift_BR, 4, torch.float64)

    def with_one_mask(*tensors):
        torch.manual_seed(1)
        return attend(*tensors, row_mask, 0.3)

    assert not torch.equal(with_one_mask(*tensors), attend(*tensors, row_mask, 0.0))
    assert torch.autograd.gradcheck(with_one_mask, tensors)


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
