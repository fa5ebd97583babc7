"""Rung 5: the law of every sampler, against the enumerated joint distribution of a small random model.

The test is a chi-square on 100,000 completions, cells below an expected count of 5 pooled, with a false-alarm rate of
1e-6 a case (below 1e-4 for the file); seeds are fixed. Each planted bug must fail the same test on half as many. The
quick suite has 20,000 of either at the same rate: every bug that is planted there has a p-value below 1e-10, and the
two that it takes more to see are slow tests.
"""

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from conftest import make_model, with_random_head
from scipy.stats import chisquare

from asarm import Law, Order, SamplerConfig, joint_log_prob, sample
from asarm.draft_head import DraftHead
from asarm.drafter import attach_draft_head
from asarm.sampling import assd, decoding
from asarm.train.draft_head import head_losses, n_learnt, window_rows
from asarm.train.head_config import WindowConfig

FALSE_ALARM = 1e-6
AT_A_TIME = 10_000
V, TEMPERATURE, BANNED = 6, 0.8, (0,)  # token 0 is the mask
PROMPTS = {"one given": (None, 3, None, None), "none given": (None, None, None), "ends given": (2, None, None, 4)}


class Draws(NamedTuple):
    """How many completions of a sampler, and of one with a planted bug."""

    law: int
    bug: int


@pytest.fixture(scope="module")
def draws(everything) -> Draws:
    return Draws(100_000, 50_000) if everything else Draws(20_000, 20_000)


@pytest.fixture(autouse=True, scope="module")
def random_numbers_made_once():
    """All tests draw with the same sequences' numbers; making them takes seconds a test."""
    made, make = {}, decoding.rank_uniforms

    def kept(seed: int, stream: str, indices: list[int], n_ranks: int, n_columns: int) -> torch.Tensor:
        key = (seed, stream, tuple(indices), n_ranks, n_columns)
        if key not in made:
            made[key] = make(*key)
        return made[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "rank_uniforms", kept)
        yield


@pytest.fixture(scope="module")
def model():
    return with_random_head(make_model(vocab_size=V, seed=0))


def batch(prompt, B):
    ids_BN = torch.tensor([[0 if t is None else t for t in prompt]]).expand(B, -1)
    visible_BN = torch.tensor([[t is not None for t in prompt]]).expand(B, -1)
    return ids_BN, Order.from_visible(visible_BN)


def enumerated(model, prompt, law=None) -> tuple[torch.Tensor, list[int]]:
    """Probability of every completion of ``prompt``, in lexicographic order, and the masked positions."""
    masked = [i for i, t in enumerate(prompt) if t is None]
    cells = torch.tensor(list(itertools.product(range(V), repeat=len(masked))))
    ids_BN, order = batch(prompt, len(cells))
    ids_BN = ids_BN.clone()
    ids_BN[:, masked] = cells
    return joint_log_prob(model, ids_BN, order, law or Law(TEMPERATURE, BANNED)).exp(), masked


def p_value(model, prompt, config: SamplerConfig, table, draws: int) -> float:
    """Chi-square p-value of the sampler's completions against the enumerated law."""
    prob, masked = table
    ids_BN, order = batch(prompt, AT_A_TIME)
    parts = [range(first, first + AT_A_TIME) for first in range(0, draws, AT_A_TIME)]
    drawn_BN = torch.cat([sample(model, ids_BN, order, config, seed=11, indices=part).ids_BN for part in parts])
    weights = V ** torch.arange(len(masked) - 1, -1, -1)
    counts = torch.bincount((drawn_BN[:, masked] * weights).sum(1), minlength=len(prob)).double()
    if counts[prob == 0].any():
        return 0.0
    by_size = prob.argsort(descending=True)
    expected, observed = prob[by_size] * draws, counts[by_size]
    n_cells = int((expected >= 5).sum()) - 1  # the rarest of these takes all that are rarer with it
    assert n_cells > 6
    pooled = [torch.cat([x[:n_cells], x[n_cells:].sum()[None]]) for x in (observed, expected)]
    return chisquare(*pooled).pvalue


SAMPLERS = [
    SamplerConfig("sequential", temperature=TEMPERATURE),
    SamplerConfig("assd", k=1, temperature=TEMPERATURE),
    SamplerConfig("assd", k=3, temperature=TEMPERATURE),
    SamplerConfig("assd", k=2, temperature=TEMPERATURE, bonus_token=False),
    SamplerConfig("assd-head", k=3, temperature=TEMPERATURE),
    SamplerConfig("assd-head", k=2, temperature=TEMPERATURE, bonus_token=False),
    SamplerConfig("assd-head", k=2, temperature=TEMPERATURE, one_pass=True),
    SamplerConfig("assd-head", k=3, temperature=TEMPERATURE, one_pass=True),
    SamplerConfig("assd-ngram", k=2, temperature=TEMPERATURE),
    SamplerConfig("assd-ngram", k=3, temperature=TEMPERATURE, bonus_token=False),
    SamplerConfig("assd", k=1, temperature=TEMPERATURE, one_pass=True),
    SamplerConfig("assd", k=2, temperature=TEMPERATURE, one_pass=True),
    SamplerConfig("assd", k=3, temperature=TEMPERATURE, one_pass=True),
    SamplerConfig("parallel", k=1, temperature=TEMPERATURE),  # one token a call has no bias
]


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(PROMPTS["one given"], id="one given"),
        pytest.param(PROMPTS["ends given"], id="ends given"),
        pytest.param(PROMPTS["none given"], id="none given", marks=pytest.mark.slow),  # fewer draws leave few cells
    ],
)
@pytest.mark.parametrize("config", SAMPLERS, ids=lambda c: f"{c.full_name}-k{c.k}{'-no-bonus' * (not c.bonus_token)}")
def test_sampler_has_the_law_of_the_model(model, config, prompt, draws):
    assert p_value(model, prompt, config, enumerated(model, prompt), draws.law) > FALSE_ALARM


@pytest.fixture(scope="module")
def model_with_trained_head():
    """The head learns from the model's own samples, until its total variation from the model has fallen by a third."""
    trunk, steps = make_model(vocab_size=V, seed=0), 150
    windows = WindowConfig(k=4, per_row=4, kl_steps=steps // 2)
    torch.manual_seed(0)
    head = DraftHead.for_trunk(trunk, width=16, n_head=2, rank=6).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    visible_TN = torch.tensor([[True, False, False, False, False], [False] * 5]).repeat(16 * steps, 1)
    ids_TN = torch.randint(1, V, visible_TN.shape)
    ids_TN = sample(trunk, ids_TN, Order.from_visible(visible_TN), SamplerConfig("sequential"), seed=0).ids_BN
    order, variation = Order.from_visible(visible_TN[:32]), []
    for step, ids_BN in enumerate(ids_TN.split(32)):
        uniform_BW = torch.rand(32, 4)
        count = n_learnt(window_rows(order, uniform_BW, windows.k))
        measured = head_losses(trunk, head, ids_BN, order, uniform_BW, step, windows)
        (measured["loss"] / count).backward()
        variation.append(measured["total_variation"].item() / count)
        optimizer.step()
        optimizer.zero_grad()
    assert sum(variation[-5:]) < 2 / 3 * sum(variation[:5])
    attach_draft_head(trunk, head)
    return trunk


@pytest.mark.parametrize("name", ["assd-head", "assd-head+one-pass"])
def test_sampler_with_a_trained_head_has_the_law_of_the_model(model_with_trained_head, name, draws, monkeypatch):
    trunk = model_with_trained_head
    prompt, config = (2, None, None, None), SamplerConfig.named(name, k=3, temperature=TEMPERATURE)
    table = enumerated(trunk, prompt)
    assert p_value(trunk, prompt, config, table, draws.law) > FALSE_ALARM
    _no_residual(monkeypatch)
    assert p_value(trunk, prompt, config, table, draws.bug) < FALSE_ALARM


@pytest.mark.parametrize("name", ["sequential", "assd", "assd-head", "assd-ngram"])
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param({"top_k": 3}, id="top-k", marks=pytest.mark.slow),
        pytest.param({"top_p": 0.9}, id="top-p", marks=pytest.mark.slow),
        pytest.param({"top_k": 4, "top_p": 0.95}, id="both"),
    ],
)
def test_truncation_is_the_same_in_draft_and_target(model, name, cut, draws):
    prompt, config = PROMPTS["none given"], SamplerConfig.named(name, k=3, temperature=3.0, **cut)
    table = enumerated(model, prompt, Law(3.0, BANNED, **cut))
    assert p_value(model, prompt, config, table, draws.law) > FALSE_ALARM


def test_the_law_without_truncation_is_another(model, draws):
    prompt, config = PROMPTS["one given"], SamplerConfig("assd", k=3, temperature=TEMPERATURE)
    table = enumerated(model, prompt, Law(TEMPERATURE, BANNED, top_k=4))
    assert p_value(model, prompt, config, table, draws.bug) < FALSE_ALARM


@pytest.mark.parametrize("name", ["assd", "assd+one-pass"])
def test_slack_in_the_acceptance_loses_the_law_and_says_so(model, name, draws):
    prompt, config = PROMPTS["one given"], SamplerConfig.named(name, k=3, temperature=TEMPERATURE, accept_slack=0.2)
    assert p_value(model, prompt, config, enumerated(model, prompt), draws.bug) < FALSE_ALARM
    assert not config.lossless and SamplerConfig.named(name).lossless


def test_parallel_sampling_is_biased(model, draws):
    prompt, config = PROMPTS["one given"], SamplerConfig("parallel", k=3, temperature=TEMPERATURE)
    assert p_value(model, prompt, config, enumerated(model, prompt), draws.bug) < FALSE_ALARM


def _no_residual(monkeypatch):
    monkeypatch.setattr(assd, "residual", lambda target_BV, draft_BV: target_BV)


def _temperature_twice(monkeypatch):
    original = Law.probs
    monkeypatch.setattr(
        Law, "probs", lambda self, logits: original(replace(self, temperature=self.temperature**2), logits)
    )


def _mask_mass_not_renormalised(monkeypatch):
    def probs(self, logits):
        prob = torch.softmax(logits.double() / self.temperature, -1)
        return prob.index_fill(-1, torch.tensor(self.banned_ids), 0)

    monkeypatch.setattr(Law, "probs", probs)


def _shared_random_numbers(monkeypatch):
    """Every rank of a sequence uses the same numbers."""
    original = decoding.rank_uniforms

    def shared(seed, stream, indices, n_ranks, n_columns):
        return original(seed, stream, indices, 1, n_columns).expand(-1, -1, n_ranks)

    monkeypatch.setattr(decoding, "rank_uniforms", shared)


def _draft_and_target_share_their_numbers(monkeypatch):
    original = decoding.rank_uniforms

    def shared(seed, stream, indices, n_ranks, n_columns):
        return original(seed, "sample", indices, n_ranks, 1).expand(n_columns, -1, -1)

    monkeypatch.setattr(decoding, "rank_uniforms", shared)


PLANTS = [
    ("assd", _no_residual),
    ("assd", _temperature_twice),
    ("assd", _mask_mass_not_renormalised),
    ("assd", _shared_random_numbers),
    ("assd+one-pass", _no_residual),
    ("assd+one-pass", _mask_mass_not_renormalised),
    ("assd+one-pass", _shared_random_numbers),
    ("assd-head", _no_residual),
    ("assd-head", _temperature_twice),
    ("assd-head", _mask_mass_not_renormalised),
    ("assd-head", _shared_random_numbers),
    ("assd-head+one-pass", _no_residual),
    ("assd-head+one-pass", _mask_mass_not_renormalised),
    ("assd-head+one-pass", _shared_random_numbers),
    ("assd-ngram", _no_residual),
    ("assd-ngram", _mask_mass_not_renormalised),
    ("assd-ngram", _shared_random_numbers),
    ("assd-ngram", _draft_and_target_share_their_numbers),
]  # a draft temperature of its own leaves a draft of which every token is tested lossless


@pytest.mark.parametrize(("name", "plant"), PLANTS)
def test_a_planted_bug_is_caught(model, name, plant, draws, monkeypatch):
    prompt = PROMPTS["one given"]
    table = enumerated(model, prompt)  # before the bug is planted
    plant(monkeypatch)
    config = SamplerConfig.named(name, k=3, temperature=TEMPERATURE)
    assert p_value(model, prompt, config, table, draws.bug) < FALSE_ALARM


def _residual_of_a_single_draft(monkeypatch):
    """What is drawn after a block does not know what the block carries."""
    original = assd.residual

    def uncarried(target_BV, draft_BV):
        return original(target_BV / target_BV.sum(-1, keepdim=True), draft_BV)

    monkeypatch.setattr(assd, "residual", uncarried)


def _numbers_of_refused_drafts_used_again(monkeypatch):
    """A rank's numbers are the same at every place among the drafts, as they may be where drafts are judged singly."""
    original = decoding.rank_uniforms

    def by_rank(seed, stream, indices, n_ranks, n_columns):
        if stream != "drafts":
            return original(seed, stream, indices, n_ranks, n_columns)
        return original(seed, stream, indices, n_ranks, 2).repeat_interleave(n_columns // 2, dim=0)

    monkeypatch.setattr(decoding, "rank_uniforms", by_rank)


@pytest.fixture(scope="module")
def even_model():
    """A cold draft is like its target now more, now less: what blocks are about."""
    return with_random_head(make_model(vocab_size=V, seed=0, spread=0.25))


def p_value_of_cold_drafts(model, name: str, verification: str, draws: int, bonus_token=True, plant=None) -> float:
    """Four tokens, so that a round of three drafts has something to draw after them; the law is that of temperature 1,
    whatever that of the drafts."""
    prompt = (None, None, None, None)
    table = enumerated(model, prompt, Law(1.0, BANNED))
    settings = {"draft_only_temperature": True, "verification": verification, "bonus_token": bonus_token}
    with pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
        config = SamplerConfig.named(name, k=3, temperature=0.5, **settings)
        return p_value(model, prompt, config, table, draws)


COLD = [
    ("assd", "token", True),
    ("assd-ngram", "token", True),
    ("assd", "block", True),
    ("assd+one-pass", "block", True),
    ("assd-head", "block", True),
    ("assd-head+one-pass", "block", True),
    ("assd-ngram", "block", False),
]


@pytest.mark.parametrize(("name", "verification", "bonus_token"), COLD)
def test_a_temperature_of_the_draft_alone_keeps_the_law_of_temperature_one(
    even_model, name, verification, bonus_token, draws
):
    assert p_value_of_cold_drafts(even_model, name, verification, draws.law, bonus_token) > FALSE_ALARM


@pytest.mark.parametrize("plant", [_residual_of_a_single_draft, _numbers_of_refused_drafts_used_again])
@pytest.mark.parametrize("name", [pytest.param("assd-head", marks=pytest.mark.slow), "assd-head+one-pass"])
def test_a_bug_in_judging_blocks_is_caught(even_model, name, plant, draws):
    """The hardest to see: on as many completions as a sampler's law."""
    assert p_value_of_cold_drafts(even_model, name, "block", draws.law, plant=plant) < FALSE_ALARM


def test_numbers_of_refused_drafts_are_fresh_where_drafts_are_judged_singly(even_model, draws):
    """So that what the planted bug breaks is the judgement of blocks, and nothing else."""
    plant = _numbers_of_refused_drafts_used_again
    assert p_value_of_cold_drafts(even_model, "assd-head", "token", draws.law, plant=plant) > FALSE_ALARM
