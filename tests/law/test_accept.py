"""Rung 4: the acceptance kernels by algebra, no randomness."""

import itertools
import math

import pytest
import torch
from conftest import mostly_slow
from scipy.stats import chisquare

from asarm.law import draw
from asarm.sampling.accept import accepted_block, accepted_prefix, prefix_weights, residual


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


ROUND_V, ROUND_K = 3, 3


class Round:
    """A round of K drafts that became ``path``, by its rule; both models are tables of the next token's law by the
    tokens before it, in the order of :func:`prefixes`."""

    def __init__(self, draft_XV: torch.Tensor, target_XV: torch.Tensor, path: tuple[int, ...], by_block: bool):
        self.by_block, self.before = by_block, prefixes(path)
        self.draft_1KV, self.target_1AV = draft_XV[self.before[:-1]][None], target_XV[self.before][None]
        ids_1K1 = torch.tensor(path).view(1, -1, 1)
        self.draft_prob_1K = self.draft_1KV.gather(-1, ids_1K1)[..., 0]
        self.target_prob_1K = self.target_1AV[:, :-1].gather(-1, ids_1K1)[..., 0]
        self.valid_1K = torch.ones(1, ROUND_K, dtype=torch.bool)
        self.share_1A = torch.ones(1, ROUND_K + 1, dtype=torch.float64)
        if by_block:
            self.share_1A = prefix_weights(self.draft_prob_1K, self.target_prob_1K, self.valid_1K)

    def kept(self, uniform_1K: torch.Tensor) -> int:
        if self.by_block:
            laws = self.draft_1KV, self.target_1AV[:, :-1]
            return int(accepted_block(self.share_1A, *laws, uniform_1K, self.valid_1K))
        return int(accepted_prefix(self.draft_prob_1K, self.target_prob_1K, uniform_1K, self.valid_1K))

    def chances(self) -> list[float]:
        """Of keeping 0 .. K drafts: every test's threshold by bisection, the other tests decided so that it counts."""
        passes, others = [], 1.0 if self.by_block else 0.0
        for j in range(ROUND_K):
            low, high = 0.0, 1.0
            for _ in range(50):
                uniform_1K = torch.full((1, ROUND_K), others, dtype=torch.float64)
                uniform_1K[0, j] = middle = (low + high) / 2
                low, high = (middle, high) if self.kept(uniform_1K) > j else (low, middle)
            passes.append(low)
        if self.by_block:  # the longest prefix that passes
            chance = [p * math.prod(1 - later for later in passes[j + 1 :]) for j, p in enumerate(passes)]
            return [1 - sum(chance), *chance]
        at_least = [math.prod(passes[:n]) for n in range(ROUND_K + 1)]
        return [a - b for a, b in zip(at_least, [*at_least[1:], 0.0], strict=True)]

    def next_law(self, kept: int, carries: bool) -> torch.Tensor:
        target_V = self.target_1AV[0, kept]
        if kept == ROUND_K:
            return target_V
        weight_V = residual((self.share_1A[0, kept] if carries else 1) * target_V[None], self.draft_1KV[:, kept])[0]
        return weight_V / weight_V.sum()


def prefixes(path: tuple[int, ...]) -> list[int]:
    """Numbers of the path's prefixes, from the empty one to the path, among all prefixes by length."""
    first = [sum(ROUND_V**m for m in range(n)) for n in range(len(path) + 1)]
    return [first[n] + sum(t * ROUND_V**m for m, t in enumerate(path[:n])) for n in range(len(path) + 1)]


def law_of_a_round(draft_XV: torch.Tensor, target_XV: torch.Tensor, by_block: bool, carries: bool = True):
    """The law of K+1 tokens, [V^(K+1)], of which a round gave the first and the target the others; and how many drafts
    the round keeps on average."""
    law, average = dict.fromkeys(itertools.product(range(ROUND_V), repeat=ROUND_K + 1), 0.0), 0.0
    for path in itertools.product(range(ROUND_V), repeat=ROUND_K):
        played = Round(draft_XV, target_XV, path, by_block)
        drafted = float(played.draft_prob_1K.prod())
        for kept, chance in enumerate(played.chances() if drafted else []):
            chance *= drafted
            average += chance * kept
            for token, prob in enumerate(played.next_law(kept, carries).tolist() if chance else []):
                settled = (*path[:kept], token)
                for rest in itertools.product(range(ROUND_V), repeat=ROUND_K - kept):
                    law[settled + rest] += chance * prob * target_prob(target_XV, settled + rest, since=kept + 1)
    return torch.tensor(list(law.values()), dtype=torch.float64), average


def target_prob(target_XV: torch.Tensor, path: tuple[int, ...], since: int = 0) -> float:
    before = prefixes(path)
    return math.prod(float(target_XV[before[n], path[n]]) for n in range(since, len(path)))


@pytest.mark.parametrize("seed", mostly_slow(range(4), quick=[0, 3]))
def test_a_block_keeps_the_law_and_more_drafts(seed):
    """The whole law of a round, by thresholds that are measured from the kernels."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.rand(2, 40, ROUND_V, dtype=torch.float64, generator=generator) ** 2
    if seed == 3:  # tokens that one of the two excludes
        tables[1, ::2, 0], tables[0, 1::3, 2] = 0, 0
    draft_XV, target_XV = tables / tables.sum(-1, keepdim=True)
    paths = itertools.product(range(ROUND_V), repeat=ROUND_K + 1)
    expected = torch.tensor([target_prob(target_XV, path) for path in paths], dtype=torch.float64)
    by_token, kept_by_token = law_of_a_round(draft_XV, target_XV, by_block=False)
    by_block, kept_by_block = law_of_a_round(draft_XV, target_XV, by_block=True)
    assert (by_token - expected).abs().max() < 1e-12 and (by_block - expected).abs().max() < 1e-12
    assert kept_by_block > kept_by_token + 1e-3
    planted, _ = law_of_a_round(draft_XV, target_XV, by_block=True, carries=False)
    assert (planted - expected).abs().max() > 1e-4, "the test has no power"


def test_shares_are_the_products_of_the_ratios_held_down_at_one():
    generator = torch.Generator().manual_seed(0)
    draft_BK, target_BK = torch.rand(2, 50, 6, dtype=torch.float64, generator=generator)
    target_BK[::7, 2] = 0
    valid_BK = torch.arange(6) < torch.randint(0, 7, (50, 1), generator=generator)
    draft_BK = draft_BK.where(valid_BK, 0)  # as before the first draft: no share may become nan
    found = prefix_weights(draft_BK, target_BK, valid_BK)
    share_B = torch.ones(50, dtype=torch.float64)
    assert torch.equal(found[:, 0], share_B)
    for j in range(6):
        share_B = (share_B * target_BK[:, j] / draft_BK[:, j]).clamp(max=1).where(valid_BK[:, j], share_B)
        assert (found[:, j + 1] - share_B).abs().max() < 1e-12


def test_drafts_past_the_last_valid_one_are_never_kept_and_decide_nothing():
    generator = torch.Generator().manual_seed(1)
    draft_BKV, target_BKV = torch.rand(2, 200, 4, 5, dtype=torch.float64, generator=generator).softmax(-1)
    ids_BK = torch.randint(5, (200, 4), generator=generator)
    prob_BK, target_BK = (t.gather(-1, ids_BK[..., None])[..., 0] for t in (draft_BKV, target_BKV))
    uniform_BK = torch.rand(200, 4, dtype=torch.float64, generator=generator)
    for n in range(5):
        valid_BK = (torch.arange(4) < n).expand(200, -1)
        share_BA = prefix_weights(prob_BK, target_BK, valid_BK)
        found = accepted_block(share_BA, draft_BKV, target_BKV, uniform_BK, valid_BK)
        cut = [x[:, :n] for x in (draft_BKV, target_BKV, uniform_BK, valid_BK)]
        assert torch.equal(found, accepted_block(share_BA[:, : n + 1], *cut)) and found.max() <= n


def test_a_draft_with_the_law_of_the_target_is_kept_whole():
    law_BKV = torch.rand(100, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).softmax(-1)
    prob_BK, valid_BK = law_BKV[..., 0], torch.ones(100, 4, dtype=torch.bool)
    share_BA = prefix_weights(prob_BK, prob_BK, valid_BK)
    uniform_BK = torch.full((100, 4), 1 - 2**-53, dtype=torch.float64)
    assert accepted_block(share_BA, law_BKV, law_BKV, uniform_BK, valid_BK).eq(4).all()


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
