"""Protocols of the comparison of samplers: how text becomes masked sequences, and what is measured on the filled ones.

One record each, which is all that the comparison knows of a protocol. Imports nothing heavy.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way to run the comparison; as it stands, the project's own.

    Args:
        split: of a data set that has splits, unless the setting ``split`` names one.
        as_rows: whether every row of a data set (a line of raw text), with or without text, is a document; otherwise
            WikiText's lines are put together to its articles, and what holds no text is left out.
        document_end: special tokens after every document; None for those that the checkpoint was trained with.
        drops_short_row: whether a last row that is not full is dropped; otherwise it is used where it is all there is.
        given: how many tokens of a sequence are given, from the number that the setting ``visible_fraction`` comes to.
        bonus_token: whether a sampler may draw a token more where all drafts of a round were kept.
        spells_special_tokens: whether special tokens stand in a text by their names; otherwise they are line breaks.
        judged_tokens: how many of its own tokens the judge reads of a text; None for all.
        entropy_by_judge: whether entropy is that of the judge's tokens of the text, so that a judge is needed;
            otherwise of the drawn ids.
        tested: measures of which every sampler's values are put beside the reference's by four tests.
    """

    split: str = "validation"
    as_rows: bool = False
    document_end: str | None = None
    drops_short_row: bool = False
    given: Callable[[float], int] = round
    bonus_token: bool = True
    spells_special_tokens: bool = False
    judged_tokens: int | None = None
    entropy_by_judge: bool = False
    tested: tuple[str, ...] = ()


PROTOCOLS = {
    "default": Protocol(),
    "paper": Protocol(  # of the code that Guo & Ermon (2025) published: docs/paper.md has it setting by setting
        split="test",
        as_rows=True,
        document_end="<sep><cls></s>",  # XLNet's tokenizer ends a text with two of them, their packing with the third
        drops_short_row=True,
        given=lambda number: int(number) + 1,
        bonus_token=False,
        spells_special_tokens=True,
        judged_tokens=960,
        entropy_by_judge=True,
        tested=("judge_ppl", "entropy"),
    ),
}
