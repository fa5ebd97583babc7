"""Statistics of the evaluations, against hand-worked cases, simulation, and scipy's own tests.

Simulated rates are checked against binomial bounds with a false-alarm rate of 1e-4 each; seeds are fixed.
"""

import numpy as np
import pytest
from conftest import mostly_slow
from scipy import stats

from asarm.evals.stats import (
    ALPHA,
    compare,
    equivalence_p_value,
    equivalence_power,
    holm,
    interval,
    mean_and_se,
    paired_p_value,
    summarise_by_sampler,
)


def within_binomial(hits: int, trials: int, rate: float) -> bool:
    low, high = stats.binom.ppf([5e-5, 1 - 5e-5], trials, rate)
    return low <= hits <= high


def test_mean_and_standard_error_by_hand():
    assert mean_and_se([2.0]) == (2.0, 0.0)
    assert mean_and_se([1.0, 3.0]) == (2.0, 1.0)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng, trials, n = np.random.default_rng(0), 300, 60
    hits = 0
    for trial in range(trials):
        low, high = interval(rng.exponential(size=n), seed=trial)
        hits += low <= 1 <= high
    assert within_binomial(hits, trials, 0.93)  # percentile intervals of skewed data cover a little less than 95 %
    assert not within_binomial(hits, trials, 0.80)
    assert interval([3.0]) == (3.0, 3.0) and interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert interval([1.0, 2.0, 4.0], seed=1) == interval([1.0, 2.0, 4.0], seed=1)


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04 -> never below the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_equivalence_is_both_one_sided_paired_tests():
    rng = np.random.default_rng(1)
    reference, other = rng.normal(size=(2, 40))
    difference = other - reference
    below = stats.ttest_rel(other + 0.4, reference, alternative="greater").pvalue
    above = stats.ttest_rel(other - 0.4, reference, alternative="less").pvalue
    assert equivalence_p_value(difference, 0.4) == pytest.approx(max(below, above))
    assert paired_p_value(difference) == pytest.approx(stats.ttest_rel(other, reference).pvalue)


def test_differences_without_spread():
    assert paired_p_value([0.0] * 5) == 1 and equivalence_p_value([0.0] * 5, 0.1) == 0
    assert paired_p_value([0.2] * 5) == 0 and equivalence_p_value([0.2] * 5, 0.1) == 1
    assert equivalence_p_value([0.1] * 5, 0.1) == 1  # the margin itself is not within the margin


@pytest.mark.parametrize(("true_difference", "largest_rate"), [(0.1, ALPHA), (-0.1, ALPHA), (0.3, 1e-3)])
def test_equivalence_is_rarely_claimed_where_there_is_none(true_difference, largest_rate):
    rng, trials = np.random.default_rng(2), 500
    drawn = rng.normal(true_difference, 0.4, size=(trials, 100))
    hits = sum(equivalence_p_value(row, 0.1) < ALPHA for row in drawn)
    assert hits <= stats.binom.ppf(1 - 1e-4, trials, largest_rate)


@pytest.mark.parametrize(("n", "sd"), mostly_slow([(30, 0.2), (100, 0.4), (400, 0.64), (20, 1.0)], quick=[(20, 1.0)]))
def test_the_power_is_what_simulation_finds(n, sd):
    rng, trials = np.random.default_rng(3), 800
    hits = sum(equivalence_p_value(row, 0.1) < ALPHA for row in rng.normal(0, sd, size=(trials, n)))
    assert hits / trials == pytest.approx(equivalence_power(sd / np.sqrt(n), n, 0.1), abs=0.07)


def test_verdicts_power_and_the_number_of_sequences():
    rng, n = np.random.default_rng(4), 800
    noise = rng.normal(0, 0.6, size=(3, n))
    found = compare({"same": noise[0] - noise[0].mean(), "worse": noise[1] - 1.0, "few": noise[2][:20]}, margin=0.1)
    assert {name: row["verdict"] for name, row in found.items()} == {
        "same": "equivalent",
        "worse": "different",
        "few": "undecided",
    }
    same, few = found["same"], found["few"]
    assert same["difference_low"] < 0 < same["difference_high"] < 0.1
    assert same["power"] > 0.8 and same["sequences_needed"] < n and few["power"] == 0 and few["pairs"] == 20
    assert same["detectable"] < 0.1 < few["detectable"]
    # at the number of sequences it asks for, the run has the power it promises
    needed, sd = same["sequences_needed"], noise[0].std(ddof=1)
    assert equivalence_power(sd / np.sqrt(needed), needed, 0.1, ALPHA / 3) == pytest.approx(0.8, abs=0.02)


def test_the_family_is_corrected():
    values = np.random.default_rng(5).normal(0.18, 1.0, size=400)
    alone = compare({"a": values}, margin=0.01)
    family = compare({"a": values} | {str(i): values * 0 + np.tile([1, -1], 200) for i in range(200)}, margin=0.01)
    assert alone["a"]["verdict"] == "different" and family["a"]["verdict"] == "undecided"


def test_one_pair_shows_nothing():
    assert compare({"a": [0.0]}, margin=0.1) == {}


def test_a_summary_holds_mean_error_and_interval():
    records = {"s": [{"lossless": True, "x": x} for x in (1.0, 2.0, 6.0)]}
    row = summarise_by_sampler(records, {"x": lambda r: r["x"]})["s"]
    assert row["sequences"] == 3 and row["x"] == 3 and row["x_low"] < 3 < row["x_high"]
    assert row["x_se"] == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
