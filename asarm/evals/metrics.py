"""Measures of generated tokens and texts."""

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache


def token_entropy(ids: Sequence[int]) -> float:
    """Entropy in bits of the token frequencies of one sequence: low where a text repeats itself (Guo & Ermon 2025)."""
    counts = Counter(ids)
    return -math.fsum(c / len(ids) * math.log2(c / len(ids)) for c in counts.values())


def distinct(ids: Sequence[int], n: int) -> float:
    """Distinct n-grams of one sequence, as a share of its n-grams (Li et al. 2016); 1 for a text shorter than n."""
    ngrams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def judge_nll_per_token(record: dict) -> float:
    """Nats per token of a text that a judge has read; 0 for a text without tokens."""
    return record["judge_nll"] / max(record["judge_tokens"], 1)


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def rouge(reference: str, text: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F-measure, in percent; ``rouge-score`` without stemming) and their mean."""
    scores = {key: 100 * score.fmeasure for key, score in _rouge_scorer().score(reference, text).items()}
    return scores | {"rouge_mean": sum(scores.values()) / 3}


def code_similarity(reference: str, text: str) -> dict[str, float]:
    """Exact match and edit similarity (``difflib`` ratio) in percent."""
    ratio = difflib.SequenceMatcher(None, reference, text, autojunk=False).ratio()
    return {"exact_match": 100.0 * (text == reference), "edit_similarity": 100 * ratio}
