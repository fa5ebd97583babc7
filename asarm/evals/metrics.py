"""Measures of generated tokens and texts."""

import difflib
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from ..errors import TextError


def token_entropy(ids: Sequence[int]) -> float:
    """Entropy in bits of the token frequencies of one sequence: low where a text repeats itself (Guo & Ermon 2025).

    Raises :class:`TextError` for a text without a token, which has none.
    """
    if not len(ids):
        raise TextError("a text without a token has no entropy; draw at least one token")
    counts = Counter(ids)
    return -math.fsum(c / len(ids) * math.log2(c / len(ids)) for c in counts.values())


def distinct(ids: Sequence[int], n: int) -> float:
    """Distinct n-grams of one sequence, as a share of its n-grams (Li et al. 2016).

    Raises :class:`TextError` for a text that is shorter than n.
    """
    ngrams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    if not ngrams:
        raise TextError(f"a text of {len(ids)} token(s) has no {n}-gram to count; draw at least {n} tokens")
    return len(set(ngrams)) / len(ngrams)


def judge_nll_per_token(record: dict) -> float:
    """Nats per token of a text that a judge has read.

    Raises :class:`TextError` for one of which it scored no token.
    """
    if not record["judge_tokens"]:
        raise TextError(
            f"the judge read no token of {record['sampler']}, sequence {record['index']}, {record['text'][:60]!r}: it "
            "has no perplexity; begin again in another folder, without the judge or with longer texts"
        )
    return record["judge_nll"] / record["judge_tokens"]


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def require_words(reference: str) -> None:
    """Raise :class:`TextError` for a reference in which ROUGE finds no word: it counts runs of a-z and 0-9."""
    if not re.search("[a-z0-9]", reference.lower()):
        raise TextError(
            f"the reference {reference[:60]!r} has no word that ROUGE counts (of the letters a-z and digits)"
        )


def rouge(reference: str, text: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F-measure, in percent; ``rouge-score`` without stemming) and their mean.

    Raises :class:`TextError` for a reference without words.
    """
    require_words(reference)
    scores = {key: 100 * score.fmeasure for key, score in _rouge_scorer().score(reference, text).items()}
    return scores | {"rouge_mean": sum(scores.values()) / 3}


def code_similarity(reference: str, text: str) -> dict[str, float]:
    """Exact match and edit similarity (``difflib`` ratio) in percent."""
    ratio = difflib.SequenceMatcher(None, reference, text, autojunk=False).ratio()
    return {"exact_match": 100.0 * (text == reference), "edit_similarity": 100 * ratio}
