"""What can be had without a model: the least that a number must beat to mean anything."""

from collections import Counter

from ..rng import generator
from .nlp_items import ChoiceItem, GapItem, split_sentences


def sentence_before(items: list[GapItem], seed: int) -> list[str]:
    """The sentence in front of the gap, copied into it."""
    return [split_sentences(item.pieces[0])[-1] for item in items]


def all_sentences(items: list[GapItem], seed: int) -> list[str]:
    """All that is given of the story."""
    return ["".join(item.pieces) for item in items]


def next_story(items: list[GapItem], seed: int) -> list[str]:
    """What was hidden in the next story: right in form and length, wrong in content."""
    return [item.references[0] for item in items[1:] + items[:1]]


def frequent_word(items: list[GapItem], seed: int) -> list[str]:
    """The word that is the answer most often, which only the answers tell."""
    word = Counter(item.references[0] for item in items).most_common(1)[0][0]
    return [word] * len(items)


def context_word(items: list[GapItem], seed: int) -> list[str]:
    """A random word of the context."""
    return [str(generator(seed, "guess", item.index).choice(item.pieces[0].split())) for item in items]


def random_ending(items: list[ChoiceItem], seed: int) -> list[int]:
    """By the seed and the item's number."""
    return [int(generator(seed, "guess", item.index).integers(len(item.endings))) for item in items]


def longest_ending(items: list[ChoiceItem], seed: int) -> list[int]:
    """By characters."""
    return [max(range(len(item.endings)), key=lambda i: len(item.endings[i])) for item in items]


def shortest_ending(items: list[ChoiceItem], seed: int) -> list[int]:
    """By characters."""
    return [min(range(len(item.endings)), key=lambda i: len(item.endings[i])) for item in items]
