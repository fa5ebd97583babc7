"""The draft head: steps against the teacher-forced form, what it may depend on, and its file."""

import json

import pytest
import torch
from conftest import HEAD_SHAPE, make_model, random_batch, random_head

from asarm import AnySubsetLM
from asarm.draft_head import DraftHead, distance_to_previous, find_draft_head, previous_ids
from asarm.drafter import Drafter, Window, attach_draft_head, drafter_of
from asarm.errors import CheckpointMismatchError, ConfigError, ModelNotFoundError
from asarm.orders import rows_from


def random_round(trunk: AnySubsetLM, B=3, K=5, first_missing=0, seed=1) -> tuple:
    """The arguments of ``DraftHead.forward`` for a random round."""
    generator = torch.Generator().manual_seed(seed)
    states_BKE = torch.randn(B, K, trunk.config.d_model, generator=generator)
    ids_BK = torch.randint(trunk.config.vocab_size, (B, K), generator=generator)
    distance_BK = torch.randint(-20, 20, (B, K), generator=generator)
    missing_BK = (first_missing + torch.arange(K)).expand(B, K)
    return states_BKE, trunk.logits(states_BKE).detach(), ids_BK, distance_BK, missing_BK


@pytest.fixture(scope="module")
def trunk() -> AnySubsetLM:
    return make_model(vocab_size=30)


@pytest.mark.parametrize("K", [1, 5, 20])  # 20: more missing tokens than the head tells apart
@pytest.mark.parametrize("first_missing", [0, 1])
@torch.no_grad()
def test_steps_equal_the_teacher_forced_form(trunk, K, first_missing):
    head = random_head(trunk)
    states_BKE, base_BKV, ids_BK, distance_BK, missing_BK = random_round(trunk, K=K, first_missing=first_missing)
    whole_BKV = head(states_BKE, base_BKV, ids_BK, distance_BK, missing_BK)
    window, first_B = Window(states_BKE, distance_BK, first_missing), torch.zeros(len(ids_BK), dtype=torch.long)
    steps = Drafter(head).begin(window, base_BKV, first_B, ids_BK[:, :0])
    one_by_one_BKV = torch.stack([steps.step(j, ids_BK[:, j]) for j in range(K)], dim=1)
    assert torch.allclose(one_by_one_BKV, whole_BKV, atol=1e-5)
    assert (first_missing == 0 and K == 1) or (whole_BKV - base_BKV).abs().max() > 0.5, "the head did speak"


@pytest.mark.parametrize("K", [1, 3])
@torch.no_grad()
def test_steps_after_settled_rows_equal_the_teacher_forced_form(trunk, K):
    """Each sequence begins at a row of its own; tokens that are not settled yet are not read."""
    head, first_B, C = random_head(trunk), torch.tensor([0, 2, 3]), 3
    states_BWE, base_BWV, ids_BW, distance_BW, missing_BW = random_round(trunk, K=C + K, first_missing=1)
    whole_BWV = head(states_BWE, base_BWV, ids_BW, distance_BW, missing_BW)
    unsettled_BC = torch.arange(C) >= first_B[:, None]
    known_ids_BC = ids_BW[:, :C].masked_fill(unsettled_BC, 7)
    window = Window(states_BWE, distance_BW, n_missing=1)
    steps = Drafter(head).begin(window, rows_from(base_BWV, first_B, K), first_B, known_ids_BC)
    for j in range(K):
        row_B = first_B + j
        logits_BV = steps.step(j, ids_BW[torch.arange(3), row_B])
        assert torch.allclose(logits_BV, whole_BWV[torch.arange(3), row_B], atol=1e-5)
    assert (whole_BWV - base_BWV).abs().max() > 0.5, "the head did speak"


@torch.no_grad()
def test_an_untrained_head_is_the_self_draft_and_any_head_leaves_exact_logits_alone(trunk):
    arguments = random_round(trunk)
    assert torch.equal(DraftHead.for_trunk(trunk, **HEAD_SHAPE)(*arguments), arguments[1])
    assert torch.equal(random_head(trunk)(*arguments)[:, 0], arguments[1][:, 0])  # nothing is missing in row 0


@pytest.mark.parametrize("which", [0, 2, 3])  # states, tokens, distances
@torch.no_grad()
def test_a_row_depends_on_what_is_drafted_up_to_it_and_on_nothing_later(trunk, which):
    head, arguments = random_head(trunk), list(random_round(trunk, first_missing=1))
    before = head(*arguments)
    for j in range(5):
        changed = [x.clone() for x in arguments]
        changed[which][:, j] = (changed[which][:, j] + 1) % 7
        after = head(*changed)
        assert torch.equal(after[:, :j], before[:, :j])
        differs_BK = (after - before).abs().amax(-1) > 1e-6
        assert differs_BK[:, j:].all(), "and every row from there on does depend on it"


@torch.no_grad()
def test_distances_and_missing_tokens_are_clipped(trunk):
    head, (states, base, ids, distance, missing) = random_head(trunk), random_round(trunk, first_missing=1)
    far, farther = torch.full_like(distance, 8), torch.full_like(distance, 100)
    assert torch.equal(head(states, base, ids, far, missing), head(states, base, ids, farther, missing))
    assert torch.equal(head(states, base, ids, -far, missing), head(states, base, ids, -farther, missing))
    assert not torch.equal(head(states, base, ids, far, missing), head(states, base, ids, -far, missing))
    most = torch.full_like(missing, 15)
    assert torch.equal(head(states, base, ids, far, most), head(states, base, ids, far, most + 5))


def test_what_precedes_a_rank():
    ids_BN, order = random_batch(30, B=4, N=7, lengths=[7, 7, 5, 6])
    rank_BK = torch.tensor([[0, 1, 2, 6], [3, 4, 5, 6], [1, 2, 3, 4], [0, 5, 6, 7]])
    distance_BK = distance_to_previous(order, rank_BK)
    previous_BK = previous_ids(ids_BN, order, rank_BK, none_id=29)
    for b in range(4):
        for k in range(4):
            rank = int(rank_BK[b, k])
            if rank == 0:
                assert (distance_BK[b, k], previous_BK[b, k]) == (0, 29)
            elif rank < 7:  # a rank past the end is never used
                before, here = order.order_BN[b, rank - 1], order.order_BN[b, rank]
                assert (distance_BK[b, k], previous_BK[b, k]) == (here - before, ids_BN[b, before])


@pytest.mark.parametrize("half", [False, True])
def test_saved_and_loaded(trunk, tmp_path, half):
    head, arguments = random_head(trunk), random_round(trunk)
    trunk.save_pretrained(tmp_path)
    (head.half() if half else head).save_pretrained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "draft_head").iterdir()) == ["config.json", "model.safetensors"]
    again = AnySubsetLM.from_pretrained(tmp_path)  # the head's folder does not disturb the trunk's
    loaded = find_draft_head(tmp_path, again)
    assert loaded.dtype == torch.float32 and not loaded.training
    assert torch.equal(loaded(*arguments), head.float()(*arguments))
    loaded.save_pretrained(tmp_path / "copy")
    assert torch.equal(DraftHead.from_pretrained(tmp_path / "copy", again)(*arguments), loaded(*arguments))


def test_an_attached_head_stays_as_it_was():
    trunk = make_model(vocab_size=30).bfloat16()
    head = DraftHead.for_trunk(trunk, **HEAD_SHAPE).train()
    attach_draft_head(trunk, head)
    assert (head.dtype, head.training) == (torch.float32, True)
    attached = drafter_of(trunk).head
    assert (attached.dtype, attached.training) == (torch.bfloat16, False)


def test_a_head_for_another_trunk_is_refused_and_none_is_no_error(trunk, tmp_path):
    assert find_draft_head(tmp_path, trunk) is None
    with pytest.raises(ModelNotFoundError, match="train-draft-head"):
        DraftHead.from_pretrained(tmp_path, trunk)
    random_head(trunk).save_pretrained(tmp_path)
    other = make_model(vocab_size=30, seed=1)
    for load in (find_draft_head, DraftHead.from_pretrained):
        with pytest.raises(CheckpointMismatchError, match=f"{trunk.fingerprint()}.*{other.fingerprint()}"):
            load(tmp_path, other)
    weights = tmp_path / "draft_head" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointMismatchError, match="broken"):
        find_draft_head(tmp_path, trunk)


def test_parameters_that_the_config_does_not_describe_are_named(trunk, tmp_path):
    random_head(trunk).save_pretrained(tmp_path)
    file = tmp_path / "draft_head" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank": 5}))
    with pytest.raises(CheckpointMismatchError, match=r"vocabulary\.weight"):
        find_draft_head(tmp_path, trunk)


@pytest.mark.parametrize("shape", [{"n_head": 3}, {"rank": 17}])
def test_impossible_shapes(trunk, shape):
    with pytest.raises(ConfigError, match="draft head needs"):
        DraftHead.for_trunk(trunk, **HEAD_SHAPE | shape)
