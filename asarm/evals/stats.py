"""Means with standard errors, by sampler, and their table."""

import math
from collections.abc import Callable, Sequence


def mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the latter is 0 for a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, 0.0
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def summarise_by_sampler(
    records: dict[str, list[dict]], measures: dict[str, Callable[[dict], float]]
) -> dict[str, dict]:
    """For each sampler the number of sequences, whether it is lossless, and of each measure the mean and, under
    ``<key>_se``, its standard error."""
    summary = {}
    for name, of_sampler in records.items():
        row = {"sequences": len(of_sampler), "lossless": all(record["lossless"] for record in of_sampler)}
        for key, value in measures.items():
            row[key], row[f"{key}_se"] = mean_and_se([value(record) for record in of_sampler])
        summary[name] = row
    return summary


def table(samplers: dict[str, dict], headings: dict[str, str]) -> str:
    """A summary as an aligned table, a line a sampler, mean +- standard error."""
    lines = [["sampler", *headings.values()]]
    lines += [
        [name + " (lossy)" * (not row["lossless"]), *(f"{row[key]:.3f} +- {row[f'{key}_se']:.3f}" for key in headings)]
        for name, row in samplers.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
