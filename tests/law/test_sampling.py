"""Rung 6: every sampler is coupled to the density, to the sequential sampler and to itself in any other batch."""

import pytest
import torch
from conftest import make_model, random_batch, valid_of, with_random_head

from asarm import Law, Order, SamplerConfig, infill, joint_log_prob, sample
from asarm.config import VERIFICATIONS
from asarm.density import target_states
from asarm.errors import ConfigError, MemoryBudgetError
from asarm.law import draw
from asarm.rng import rank_uniforms
from asarm.sampling import assd
from asarm.sampling.accept import accepted_block, accepted_prefix
from asarm.sampling.decoding import Decoding
from asarm.sampling.drafts import bigram_draft
from asarm.sampling.sequential import sequential_round

EXACT = [
    ("sequential", 1),
    *(("assd", k) for k in (1, 2, 5)),
    *(("assd+one-pass", k) for k in (1, 2, 5)),
    *(("assd-head", k) for k in (1, 2, 5)),
    *(("assd-head+one-pass", k) for k in (1, 2, 5)),
    *(("assd-ngram", k) for k in (1, 4)),
]
V = 12


@pytest.fixture(scope="module")
def model():
    """With a random head some of whose drafts are kept."""
    return with_random_head(make_model(vocab_size=V, seed=5, spread=0.5), seed=2)


def ragged(B=9, N=14, seed=0):
    return random_batch(V, B, N, seed=seed, lengths=[N - (b * 3) % 11 for b in range(B)])


@pytest.mark.parametrize(("name", "k"), [*EXACT, ("parallel", 3)])
def test_prompt_is_kept_gaps_are_filled_and_calls_never_outnumber_tokens(model, name, k):
    ids_BN, order = ragged()
    done = sample(model, ids_BN, order, SamplerConfig.named(name, k=k), seed=1)
    prompt_BN = order.rank_BN < order.n_visible_B[:, None]
    assert torch.equal(done.ids_BN[prompt_BN], ids_BN[prompt_BN])
    assert done.ids_BN[order.target_BN].ne(0).all(), "the mask token was drawn"
    assert (done.nfe_B <= order.n_masked_B).all()
    assert done.nfe_B[order.n_masked_B == 0].eq(0).all()
    assert (done.accepted_B <= done.proposed_B).all()
    if name == "sequential":
        assert torch.equal(done.nfe_B, order.n_masked_B)
    if name == "parallel":
        assert torch.equal(done.nfe_B, (order.n_masked_B + k - 1) // k)
    if name == "assd-ngram" or "one-pass" in name:
        assert torch.equal(done.nfe_B, done.rounds_B)
    assert torch.equal(done.aux_nfe_B, done.rounds_B * (name == "assd-ngram"))


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize(("name", "k"), [c for c in EXACT[1:] if c[1] > 1])
def test_drafts_are_counted_by_their_index(model, name, k, verification, monkeypatch):
    """Against the acceptance kernel's own answers, round by round; lanes that are taken again start from zero."""
    ids_BN, order = ragged(seed=8)
    proposed, accepted = [[0] * k for _ in ids_BN], [[0] * k for _ in ids_BN]

    def watched(*arguments):
        kept_B, valid_BK = rule(*arguments), valid_of(arguments)
        for b, kept in enumerate(kept_B.tolist()):
            first = k - valid_BK.shape[1]  # 1 where the first draft is exact
            for j, valid in enumerate(valid_BK[b].tolist()):
                proposed[b][first + j] += valid
                accepted[b][first + j] += j < kept
        return kept_B

    config = SamplerConfig.named(name, k=k, verification=verification)
    rule = accepted_block if verification == "block" else accepted_prefix
    monkeypatch.setattr(assd, rule.__name__, watched)
    done = sample(model, ids_BN, order, config, seed=5)
    monkeypatch.undo()
    assert done.proposed_BK.tolist() == proposed and done.accepted_BK.tolist() == accepted
    assert 0 < done.accepted_B.sum() < done.proposed_B.sum()
    again = sample(model, ids_BN, order, config, seed=5, batch_size=2)
    assert torch.equal(again.proposed_BK, done.proposed_BK) and torch.equal(again.accepted_BK, done.accepted_BK)


@pytest.mark.parametrize("bonus_token", [True, False])
@pytest.mark.parametrize(("name", "k"), EXACT)
def test_emitted_log_prob_equals_rescoring_by_the_density(model, name, k, bonus_token):
    ids_BN, order = ragged(seed=2)
    bonus_token = bonus_token or "one-pass" in name
    config = SamplerConfig.named(name, k=k, temperature=0.7, bonus_token=bonus_token, banned_ids=(3,))
    done = sample(model, ids_BN, order, config, seed=2)
    again_B = joint_log_prob(model, done.ids_BN, order, Law(0.7, (0, 3)))
    assert (done.logp_B - again_B).abs().max() < 1e-4
    assert done.ids_BN[order.target_BN].ne(3).all()


@pytest.mark.parametrize("name", ["assd", "assd+one-pass", "assd-head", "assd-head+one-pass", "assd-ngram"])
def test_a_draft_temperature_keeps_the_bound_and_the_log_prob(model, name):
    ids_BN, order = ragged(seed=7)
    config = SamplerConfig.named(name, k=3, temperature=0.5, draft_only_temperature=True)
    done = sample(model, ids_BN, order, config, seed=2)
    assert (done.logp_B - joint_log_prob(model, done.ids_BN, order, Law(1.0, (0,)))).abs().max() < 1e-4
    assert (done.nfe_B <= order.n_masked_B).all()


@pytest.mark.parametrize(("name", "k"), EXACT[1:])
def test_greedy_speculation_equals_greedy_sequential_token_for_token(model, name, k):
    ids_BN, order = ragged(seed=3)
    plain = sample(model, ids_BN, order, SamplerConfig("sequential", greedy=True))
    quick = sample(model, ids_BN, order, SamplerConfig.named(name, k=k, greedy=True))
    assert torch.equal(plain.ids_BN, quick.ids_BN)
    if k > 1:
        assert quick.nfe_B.sum() < plain.nfe_B.sum()


@pytest.mark.parametrize(("name", "k"), [*EXACT, ("parallel", 3)])
def test_a_sequence_does_not_depend_on_its_batch(model, name, k):
    ids_BN, order = ragged(seed=4)
    config = SamplerConfig.named(name, k=k)
    together = sample(model, ids_BN, order, config, seed=3)
    for b, n in enumerate(order.length_B.tolist()):
        alone_order = Order.from_visible(~order.target_BN[b : b + 1, :n])
        alone = sample(model, ids_BN[b : b + 1, :n], alone_order, config, seed=3, indices=[b])
        assert torch.equal(alone.ids_BN[0], together.ids_BN[b, :n])
        for key in ("nfe_B", "aux_nfe_B", "rounds_B", "proposed_BK", "accepted_BK"):
            assert torch.equal(getattr(alone, key)[0], getattr(together, key)[b]), key
        assert alone.logp_B[0] == pytest.approx(together.logp_B[b].item(), abs=1e-4)


def test_cached_decoding_equals_recomputing_everything_for_every_token(model):
    """A slow sampler that makes one full, uncached pass per token, with the same random numbers."""
    ids_BN, order = random_batch(V, 5, 10, seed=6)
    cached = sample(model, ids_BN, order, SamplerConfig("sequential"), seed=9).ids_BN
    uniform_BN = rank_uniforms(9, "sample", list(range(5)), 10, 1)[0]
    law = Law(1.0, (0,))
    for b in range(5):
        slow_1N, one = ids_BN[b : b + 1].clone(), Order.from_visible(~order.target_BN[b : b + 1])
        for rank in range(int(one.n_visible_B), 10):
            hidden_TE, flat_T = target_states(model, slow_1N, one)
            position = one.order_BN[0, rank]
            logits = model.logits(hidden_TE[flat_T == position])
            slow_1N[0, position] = draw(law.probs(logits), uniform_BN[b, rank][None])[0]
        assert torch.equal(slow_1N[0], cached[b])


@pytest.mark.parametrize(("name", "k"), EXACT)
def test_any_permutation_can_be_decoded(model, name, k):
    order_BN = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(s)) for s in range(6)])
    order = Order.from_permutation(order_BN, torch.tensor([0, 1, 2, 3, 7, 8]))
    ids_BN, _ = random_batch(V, 6, 8)
    done = sample(model, ids_BN, order, SamplerConfig.named(name, k=k), seed=4)
    assert (done.logp_B - joint_log_prob(model, done.ids_BN, order, Law(1.0, (0,)))).abs().max() < 1e-4


def test_different_seeds_and_indices_give_different_text(model):
    ids_BN = torch.zeros(2, 12, dtype=torch.long)
    order = Order.from_visible(torch.zeros(2, 12, dtype=torch.bool))
    first = sample(model, ids_BN, order, seed=1).ids_BN
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, sample(model, ids_BN, order, seed=2).ids_BN)
    assert torch.equal(first, sample(model, ids_BN, order, seed=1).ids_BN)


@torch.no_grad()
def first_bigram_draft(model, ids_BN, order, k):
    drafts = []

    def play_round(state):
        drafts.append(bigram_draft(state))
        sequential_round(state)

    list(Decoding(model, ids_BN, order, SamplerConfig("assd-ngram", k), 0, [0], 1).run(play_round))
    return drafts[0]


def test_the_bigram_draft_follows_the_context_and_backs_off():
    model = make_model(vocab_size=V)
    ids_BN = torch.tensor([[1, 2, 3, 1, 2, 0, 0, 0]])
    draft = first_bigram_draft(model, ids_BN, Order.from_visible(torch.arange(8)[None] < 5), 3)
    assert draft.ids_BK.tolist() == [[3, 1, 2]]  # each left neighbour has one successor in the context
    assert draft.probs_BKV[0, 0, 3] == draft.probs_BKV[0, 1, 1] == 1

    lone = Order.from_visible(torch.tensor([[True, False, False]]))
    draft = first_bigram_draft(model, torch.tensor([[4, 0, 0]]), lone, 2)
    assert draft.probs_BKV[0, 0].tolist() == [float(v == 4) for v in range(V)]  # unigram back-off
    nothing = Order.from_visible(torch.zeros(1, 3, dtype=torch.bool))
    draft = first_bigram_draft(model, torch.zeros(1, 3, dtype=torch.long), nothing, 2)
    assert draft.probs_BKV[0, 0].tolist() == pytest.approx([0.0] + [1 / (V - 1)] * (V - 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: SamplerConfig(k=0), ConfigError, "k must be at least 1, got 0"),
        (lambda m: SamplerConfig(temperature=0), ConfigError, "temperature must be above 0.*got 0"),
        (lambda m: SamplerConfig("beam"), ConfigError, "'beam'"),
        (lambda m: SamplerConfig(top_k=0), ConfigError, "top_k must be at least 1, got 0"),
        (lambda m: SamplerConfig(top_p=1.5), ConfigError, r"top_p must be in \(0, 1\], got 1.5"),
        (lambda m: SamplerConfig(accept_slack=-0.1), ConfigError, "accept_slack must be 0 or more, got -0.1"),
        (lambda m: SamplerConfig("parallel", accept_slack=0.1), ConfigError, "accept_slack .* got 'parallel'"),
        (lambda m: SamplerConfig(accept_slack=0.1, top_k=20), ConfigError, "accept_slack must be 0 with .* got 0.1"),
        (lambda m: SamplerConfig(accept_slack=0.1, top_p=0.9), ConfigError, "accept_slack must be 0 with .* got 0.1"),
        (lambda m: SamplerConfig(accept_slack=0.1, greedy=True), ConfigError, "accept_slack must be 0 with .* got 0.1"),
        (
            lambda m: SamplerConfig(verification="joint"),
            ConfigError,
            "verification must be token or block, got 'joint'",
        ),
        (lambda m: SamplerConfig("parallel", verification="block"), ConfigError, "verification .* got 'parallel'"),
        (
            lambda m: SamplerConfig(verification="block", accept_slack=0.1),
            ConfigError,
            "accept_slack must be 0 with verification block, got 0.1",
        ),
        (lambda m: SamplerConfig("assd-ngram", one_pass=True), ConfigError, "one_pass .* got 'assd-ngram'"),
        (
            lambda m: sample(
                make_model(),
                torch.ones(1, 3).long(),
                Order.left_to_right(torch.tensor([1]), 3),
                SamplerConfig("assd-head"),
            ),
            ConfigError,
            "has no draft head .* train-draft-head",
        ),
        (lambda m: sample(m, *random_batch(V, 2, 4), batch_size=0), ConfigError, "batch_size .* got 0"),
        (lambda m: sample(m, *random_batch(V, 2, 4), batch_size=-1), ConfigError, "batch_size .* got -1"),
        (lambda m: sample(m, *random_batch(V, 0, 4)), ConfigError, r"at least one sequence, got \[0, 4\]"),
        (lambda m: infill(m, None, "a <mask>", num_samples=0), ConfigError, "num_samples must be at least 1, got 0"),
        (lambda m: Law(-1.0), ConfigError, "-1.0"),
        (
            lambda m: sample(m, torch.full((1, 3), V), Order.left_to_right(torch.tensor([1]), 3)),
            ConfigError,
            rf"got {V}",
        ),
        (
            lambda m: sample(m, torch.ones(1, 3).long(), Order.left_to_right(torch.tensor([1]), 4)),
            ConfigError,
            "do not match",
        ),
        (
            lambda m: sample(
                m, torch.ones(1, 3).long(), Order.left_to_right(torch.tensor([1]), 3), SamplerConfig(banned_ids=(99,))
            ),
            ConfigError,
            "99",
        ),
        (
            lambda m: sample(m, torch.ones(1, 10**7).long(), Order.left_to_right(torch.tensor([10**6]), 10**7)),
            MemoryBudgetError,
            "10000000 tokens need about .* GiB",
        ),
    ],
)
def test_errors_come_early_and_name_the_value(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)
