"""Text to ids and back, with ``<mask>`` and ``<mask:12>`` for gaps.

A thin layer over a fast ``tokenizers`` tokenizer with XLNet's special ids. A gap swallows one space before it, as
Hugging Face's ``<mask>`` does, because a word's first token carries its leading space.

XLNet's vocabulary has no line breaks and collapses spaces. A checkpoint that was trained on programs all the same
writes them as special tokens: its whitespace map, applied to a text before it is encoded and undone in decoding.

That map, and what stands after every document, are stored with the tokenizer as a model was trained
(:mod:`asarm.tokenizer_files`).
"""

import re
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, chain, groupby
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .errors import ConfigError, ModelNotFoundError, TextError, UserError, reason
from .tokenizer_files import TOKENIZER, find_tokenizer, write_settings

# XLNet's special tokens, at their ids 0..8.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
GAP = re.compile(r" ?<mask(?::(\d+))?>")
LONGEST_GAP = 2**20  # tokens: a list of 8 MB; whether a model can hold so long a sequence is asked before decoding
SPELLED = r"<(?=(?:" + "|".join(t.strip("<>") for t in SPECIAL_TOKENS) + ")>)"  # the < of one that a text spells out
# "code" is the map of Guo & Ermon's published code checkpoint. Their fourth rule, three spaces to <pad>, comes last and
# so never applies: pairs of spaces are gone by then. A space left over is lost, as it was in their training data.
WHITESPACE_MAPS = {"code": {"\n": "<cls>", "\t": "<sep>", "  ": "<unk>"}}
DOCUMENT_END = "<eod>"  # Guo & Ermon's checkpoints were trained with <sep><cls></s>
WORD = re.compile(r"\w+| +|\W")


@dataclass(frozen=True)
class MaskedText:
    """A text with gaps as tokens: ids [N] (in the gaps the mask id, or a fill's ids), ``visible`` [N] (False in the
    gaps), the text between the gaps, and the gaps as ranges of positions, some of which may be empty."""

    ids: list[int]
    visible: list[bool]
    pieces: list[str]
    gaps: list[range]


@dataclass(frozen=True)
class Difference:
    """A span of a text, beginning at character ``start``, that encoding and decoding changes, and what it becomes."""

    start: int
    text: str
    back: str

    def is_space_at_an_end_of(self, whole: str) -> bool:
        at_an_end = self.start == 0 or self.start + len(self.text) == len(whole)
        return at_an_end and not self.text.strip(" ") and not self.back


class TextTokenizer:
    """Encodes plain text without adding special tokens; special tokens spelled out in a text are text.

    ``whitespace_map`` names one of ``WHITESPACE_MAPS``; ``document_end`` is a run of special tokens, the ids of which
    :attr:`document_end` holds. ``special_ids`` are the special tokens that stand for no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str = "tokenizer",
        whitespace_map: str | None = None,
        document_end: str | None = None,
    ):
        if whitespace_map is not None and whitespace_map not in WHITESPACE_MAPS:
            raise ConfigError(f"whitespace_map must be one of {', '.join(WHITESPACE_MAPS)}, got {whitespace_map!r}")
        mapped = WHITESPACE_MAPS.get(whitespace_map, {})
        end = special_tokens(DOCUMENT_END if document_end is None else document_end)
        missing = [t for t in ("<mask>", *end, *mapped.values()) if tokenizer.token_to_id(t) is None]
        if missing:
            raise TextError(
                f"{name} has no {', '.join(missing)} token; an any-subset model needs XLNet's special tokens"
            )
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend = tokenizer
        self.mask_id = tokenizer.token_to_id("<mask>")
        self.whitespace_map = whitespace_map
        self.document_end = tuple(map(tokenizer.token_to_id, end))
        self._id_of = {text: tokenizer.token_to_id(token) for text, token in mapped.items()}
        self._whitespace_of = {id_: text for text, id_ in self._id_of.items()}
        self._mapped = re.compile(f"({'|'.join(mapped)})" if mapped else "(?!)")  # without a map: nowhere
        special_ids = [i for t in SPECIAL_TOKENS if (i := tokenizer.token_to_id(t)) is not None]
        self.special_ids = tuple(i for i in special_ids if i not in self._whitespace_of)
        if set(special_ids) & set(self.encode(" ".join(SPECIAL_TOKENS))):  # XLNet's are pieces like any other
            apart = pre_tokenizers.Split(Regex(SPELLED), "merged_with_previous")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, apart])

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str = "main",
        whitespace_map: str | None = None,
        document_end: str | None = None,
    ) -> "TextTokenizer":
        """Load ``tokenizer.json`` of an embedded model, a local folder or a Hub id; a setting that is not given is the
        one stored beside it."""
        file, settings = find_tokenizer(name_or_path, revision)
        given = {"whitespace_map": whitespace_map, "document_end": document_end}
        settings |= {key: value for key, value in given.items() if value is not None}
        try:
            return cls(Tokenizer.from_file(str(file)), str(name_or_path), **settings)
        except UserError:
            raise
        except Exception as error:  # the library raises a bare Exception for a malformed file
            raise ModelNotFoundError(f"{file} is not a fast tokenizer ({reason(error)})") from error

    def save_pretrained(self, folder: str | Path, max_length: int | None = None) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, for :meth:`from_pretrained` and for ``AutoTokenizer``
        of transformers. ``max_length`` is the number of tokens in a row of the model's training, where it is known."""
        self.backend.save(str(Path(folder) / TOKENIZER))
        end = "".join(map(self.backend.id_to_token, self.document_end))
        known = [token for token in SPECIAL_TOKENS if self.backend.token_to_id(token) is not None]
        write_settings(Path(folder), known, end, self.whitespace_map, max_length)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        split = [self._mapped.split(text) for text in texts]  # words, whitespace, words, ..., words
        words = [part for parts in split for part in parts[::2]]
        encoded = iter(self.backend.encode_batch_fast(words, add_special_tokens=False))
        ids_of = [[[self._id_of[p]] if p in self._id_of else next(encoded).ids for p in parts] for parts in split]
        return [list(chain.from_iterable(parts)) for parts in ids_of]

    def decode(self, ids: list[int]) -> str:
        parts = []
        for whitespace, run in groupby(ids, key=self._whitespace_of.get):
            same = list(run)
            parts.append(whitespace * len(same) if whitespace else self.backend.decode(same, skip_special_tokens=False))
        return "".join(parts)

    def round_trip_loss(self, text: str) -> list[Difference]:
        """What encoding and decoding changes in ``text``, in order and to the word; none where it keeps every byte."""
        back = self.decode(self.encode(text))
        if back == text:
            return []
        words, back_words = WORD.findall(text), WORD.findall(back)
        starts = list(accumulate(map(len, words), initial=0))
        return [
            Difference(starts[a], "".join(words[a:b]), "".join(back_words[c:d]))
            for kind, a, b, c, d in SequenceMatcher(None, words, back_words, autojunk=False).get_opcodes()
            if kind != "equal"
        ]

    def check_lossless(self, text: str) -> None:
        """Raise :class:`TextError` where encoding and decoding changes ``text``, spaces at its ends apart (XLNet's
        vocabulary drops newlines, say)."""
        lost = [d for d in self.round_trip_loss(text) if not d.is_space_at_an_end_of(text)]
        if lost:
            raise TextError(
                f"this vocabulary does not keep the text: {lost[0].text!r} at character {lost[0].start} comes back as "
                f"{lost[0].back!r} (the first of {len(lost)}); use a model with a byte-level vocabulary, or its "
                "whitespace_map if it was trained with one"
            )

    def encode_masked(self, text: str) -> MaskedText:
        """Encode a text with ``<mask>`` (one token) and ``<mask:n>`` (n tokens) gaps; gaps side by side are one.

        Raises :class:`TextError` for a text without a gap, one whose gap is too long, or one that the vocabulary does
        not keep.
        """
        (first, *others), spelled, lengths = split_at_gaps(text)
        pieces, gaps = [first], []
        for gap, length, piece in zip(spelled, lengths, others, strict=True):
            if self._id_of and pieces[-1].endswith(" ") and gap.startswith(" "):
                pieces[-1] += " "  # one of a run of spaces, which have tokens of their own
            if gaps and not pieces[-1]:
                gaps[-1] += length or 1
                pieces[-1] = piece
            else:
                gaps.append(length or 1)
                pieces.append(piece)
        for piece in pieces:
            self.check_lossless(piece)
        return self.encode_gaps(pieces, gaps)

    def encode_gaps(self, pieces: Sequence[str], gaps: Sequence[int | str]) -> MaskedText:
        """Encode the pieces of a text, one more than there are gaps, and what stands in the gaps: a number of masked
        tokens, or a fill, as text. Each piece and each fill is encoded by itself; a lossy one is not refused.
        """
        encoded = self.encode_batch([*pieces, *(gap for gap in gaps if isinstance(gap, str))])
        piece_ids, fill_ids = encoded[: len(pieces)], iter(encoded[len(pieces) :])
        ids, visible, ranges = [*piece_ids[0]], [True] * len(piece_ids[0]), []
        for gap, after in zip(gaps, piece_ids[1:], strict=True):
            in_gap = next(fill_ids) if isinstance(gap, str) else [self.mask_id] * gap
            ranges.append(range(len(ids), len(ids) + len(in_gap)))
            ids += in_gap + after
            visible += [False] * len(in_gap) + [True] * len(after)
        return MaskedText(ids, visible, list(pieces), ranges)

    def fill(self, masked: MaskedText, ids: list[int]) -> str:
        """The text with its gaps replaced by what ``ids`` holds there; outside the gaps it is kept to the byte."""
        parts = [masked.pieces[0]]
        for gap, piece in zip(masked.gaps, masked.pieces[1:], strict=True):
            parts += [self.decode_gap(ids, gap), piece]
        return "".join(parts)

    def decode_gap(self, ids: list[int], gap: range) -> str:
        """The text of the tokens in ``gap``, its leading space included."""
        before = ids[max(gap.start - 1, 0) : gap.start]  # decoders treat the first token's space specially
        return self.decode(before + ids[gap.start : gap.stop])[len(self.decode(before)) :]


def gap_length(gap: re.Match) -> int | None:
    """How many tokens a match of ``GAP`` asks for; None where it does not say. Raises :class:`TextError` for no token
    and for more than ``LONGEST_GAP``."""
    if gap[1] is None:
        return None
    length = int(gap[1].lstrip("0")[:10] or 0)  # ten digits are too many, whatever follows
    if not 1 <= length <= LONGEST_GAP:
        raise TextError(f"{gap[0].strip()[:40]!r}: a gap needs at least one token, and at most {LONGEST_GAP}")
    return length


def require_gap(text: str) -> None:
    """Raise :class:`TextError` for a text with nothing to fill in."""
    if not GAP.search(text):
        raise TextError(f"the text has no <mask> or <mask:n>: {text[:60]!r}; mark what is to be filled in")


def require_fills(text: str, fills: Sequence[str]) -> None:
    """Raise :class:`TextError` unless there is a fill for each gap of ``text`` (those side by side are one), or
    neither, and something in each; what only a vocabulary can tell is not asked."""
    if not fills and not GAP.search(text):
        require_something(text, "the text to score")
        return
    pieces, _, _ = split_at_gaps(text)
    n_gaps = 1 + sum(map(bool, pieces[1:-1]))
    if len(fills) != n_gaps:
        raise TextError(f"the text has {n_gaps} gap(s) and {len(fills)} fill(s) were given; give one for each")
    for fill in fills:
        require_something(fill, f"fill {fill!r}")


def require_something(tokens: Sized, what: str) -> None:
    """Raise :class:`TextError` where there is no token (or no text)."""
    if not tokens:
        raise TextError(f"{what} has no token, and so no probability to score")


def split_at_gaps(text: str) -> tuple[list[str], list[str], list[int | None]]:
    """The pieces between the gaps of a text (one more than gaps), the gaps as they are spelled, each with the space
    that it swallows, and their lengths (:func:`gap_length`).

    Raises :class:`TextError` for a text without a gap.
    """
    require_gap(text)
    gaps = list(GAP.finditer(text))
    bounds = [0, *(bound for gap in gaps for bound in gap.span()), len(text)]
    pieces = [text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    return pieces, [gap[0] for gap in gaps], [gap_length(gap) for gap in gaps]


def special_tokens(run: str) -> list[str]:
    """The tokens of a text that holds nothing but special tokens; raises :class:`ConfigError` for another one."""
    tokens = re.findall("<[^<>]*>", run)
    allowed = [token for token in SPECIAL_TOKENS if token != "<mask>"]
    if not tokens or "".join(tokens) != run or not set(tokens) <= set(allowed):
        raise ConfigError(
            f"document_end must be special tokens side by side (of {' '.join(allowed)}), as in <sep><cls></s>, "
            f"got {run!r}"
        )
    return tokens


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lossless byte-level BPE with XLNet's special tokens at ids 0-8."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
