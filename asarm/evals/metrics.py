"""Measures of generated tokens."""

import math
from collections import Counter
from collections.abc import Sequence


def token_entropy(ids: Sequence[int]) -> float:
    """Entropy in bits of the token frequencies of one sequence: low where a text repeats itself (Guo & Ermon 2025)."""
    counts = Counter(ids)
    return -math.fsum(c / len(ids) * math.log2(c / len(ids)) for c in counts.values())
