"""Statistics of the evaluations: means with intervals, paired tests, tests of equivalence, and what a run can show.

"Not significantly different" is no evidence of equality: a small run never is. A sampler counts as equivalent to the
reference only where both one-sided tests against a stated margin are significant (TOST; Schuirmann 1987), and the
power of that test is reported beside its verdict. Families of tests are corrected by Holm's method (Holm 1979).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

ALPHA = 0.05  # chance of any false claim in a family of tests
POWER = 0.8  # that "detectable" and "sequences needed" refer to
RESAMPLES = 2000
FOUR_TESTS = ("t_unpaired", "t_paired", "wilcoxon", "mann_whitney")


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the latter is 0 for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, 0.0
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentiles over resampled sequences); a single value is its own."""
    if len(values) == 1:
        return values[0], values[0]
    rng = np.random.default_rng(seed)
    found = stats.bootstrap(
        (np.asarray(values, float),), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: below alpha exactly where Holm's step-down procedure rejects at family-wise level alpha."""
    p, m = np.asarray(p_values, float), len(p_values)
    ascending = p.argsort(kind="stable")
    adjusted = np.empty(m)
    adjusted[ascending] = np.minimum(1, np.maximum.accumulate(p[ascending] * (m - np.arange(m))))
    return adjusted.tolist()


def paired_p_value(differences: Sequence[float]) -> float:
    """Two-sided paired t-test that the mean difference is zero."""
    return _t_test(differences, 0.0, "two-sided")


def equivalence_p_value(differences: Sequence[float], margin: float) -> float:
    """TOST: the larger p-value of the one-sided paired t-tests that the mean difference is not below -margin and not
    above margin."""
    return max(_t_test(differences, -margin, "greater"), _t_test(differences, margin, "less"))


def _t_test(values: Sequence[float], mean: float, alternative: str) -> float:
    if np.ptp(values) == 0:  # no spread, no t: as certain as can be (greedy samplers that agree token for token)
        excess = values[0] - mean
        return float({"two-sided": excess == 0, "greater": excess <= 0, "less": excess >= 0}[alternative])
    return float(stats.ttest_1samp(values, mean, alternative=alternative).pvalue)


def equivalence_power(se: float, n: int, margin: float, alpha: float = ALPHA) -> float:
    """Chance that TOST finds equivalence where the true mean difference of ``n`` pairs is zero and its standard error
    ``se``."""
    if se == 0:
        return 1.0
    reach = margin / se - stats.t.ppf(1 - alpha, n - 1)
    return max(0.0, float(2 * stats.t.cdf(reach, n - 1) - 1))


def compare(differences: dict[str, Sequence[float]], margin: float, seed: int = 0) -> dict[str, dict]:
    """Each sampler's differences from the reference, paired by sequence: what they show.

    Returns for each name ``difference`` (mean) with its 95 % interval ``difference_low .. difference_high``,
    ``p_different`` and ``p_equivalent`` (Holm over all names), ``verdict`` (``equivalent``: within the margin;
    ``different``: not shown to be within it, and significantly different; else ``undecided``), and what the run could
    have shown, at the strictest level of Holm's procedure: ``power`` of the equivalence test for a true difference of
    zero, ``detectable``, the difference that the paired test finds with a chance of 80 %, and ``sequences_needed`` for
    a power of 80 %. One pair shows nothing: such a name gets no entry.
    """
    differences = {name: values for name, values in differences.items() if len(values) > 1}
    p_different = holm([paired_p_value(values) for values in differences.values()])
    p_equivalent = holm([equivalence_p_value(values, margin) for values in differences.values()])
    found = {}
    for (name, values), different, equivalent in zip(differences.items(), p_different, p_equivalent, strict=True):
        mean, se = mean_and_se(values)
        low, high = interval(values, seed)
        verdict = "equivalent" if equivalent < ALPHA else "different" if different < ALPHA else "undecided"
        found[name] = {
            "difference": mean,
            "difference_low": low,
            "difference_high": high,
            "p_different": different,
            "p_equivalent": equivalent,
            "verdict": verdict,
        } | _what_could_be_shown(se, len(values), margin, ALPHA / len(differences))
    return found


def _what_could_be_shown(se: float, n: int, margin: float, alpha: float) -> dict:
    detectable = (stats.t.ppf(1 - alpha / 2, n - 1) + stats.t.ppf(POWER, n - 1)) * se
    reach = stats.norm.ppf(1 - alpha) + stats.norm.ppf((1 + POWER) / 2)  # standard errors that the margin must span
    return {
        "pairs": n,
        "power": equivalence_power(se, n, margin, alpha),
        "detectable": float(detectable),
        "sequences_needed": math.ceil((reach * se / margin) ** 2 * n),
    }


def difference_tests(values: Sequence[float], reference: Sequence[float]) -> dict[str, float | None]:
    """Two-sided p-values, uncorrected, of the four tests of Guo & Ermon (2025) that two samplers' values differ, in
    pairs by sequence or (t-test and Mann-Whitney) as if they were not paired.

    None where the values allow no test: a single sequence, or no spread.
    """
    if len(values) < 2:
        return dict.fromkeys(FOUR_TESTS)
    a, b = np.asarray(reference, float), np.asarray(values, float)
    found = (
        stats.ttest_ind(a, b),
        stats.ttest_rel(a, b),
        stats.wilcoxon(a, b, zero_method="zsplit"),
        stats.mannwhitneyu(a, b),
    )
    p_values = (float(test.pvalue) for test in found)
    return {name: None if math.isnan(p) else p for name, p in zip(FOUR_TESTS, p_values, strict=True)}


def summarise_by_sampler(
    records: dict[str, list[dict]], measures: dict[str, Callable[[dict], float]], seed: int = 0
) -> dict[str, dict]:
    """For each sampler the number of sequences, whether it is lossless, and of each measure the mean, its standard
    error (``<key>_se``) and 95 % interval (``<key>_low``, ``<key>_high``)."""
    summary = {}
    for name, of_sampler in records.items():
        row = {"sequences": len(of_sampler), "lossless": all(record["lossless"] for record in of_sampler)}
        for key, value in measures.items():
            values = [value(record) for record in of_sampler]
            row[key], row[f"{key}_se"] = mean_and_se(values)
            row[f"{key}_low"], row[f"{key}_high"] = interval(values, seed)
        summary[name] = row
    return summary


def with_se(row: dict, key: str) -> str:
    return f"{row[key]:.3f} +- {row[f'{key}_se']:.3f}"


def with_interval(row: dict, key: str) -> str:
    return f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]"


def table(samplers: dict[str, dict], headings: dict[str, str], cell: Callable[[dict, str], str] = with_se) -> str:
    """A summary as an aligned table, a line a sampler."""
    lines = [["sampler", *headings.values()]]
    lines += [
        [name + " (lossy)" * (not row["lossless"]), *(cell(row, key) for key in headings)]
        for name, row in samplers.items()
    ]
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Cells as text in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
