"""Text to ids and back, with ``<mask>`` and ``<mask:12>`` for gaps.

A thin layer over a fast ``tokenizers`` tokenizer with XLNet's special ids. A gap swallows one space before it, as
Hugging Face's ``<mask>`` does, because a word's first token carries its leading space.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .embedded import resolve_model
from .errors import ModelNotFoundError, TextError, reason

# XLNet's special tokens, at their ids 0..8.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
GAP = re.compile(r" ?<mask(?::(\d+))?>")


@dataclass(frozen=True)
class MaskedText:
    """A text with gaps as tokens: ids [N] (the mask id inside gaps), ``visible`` [N], and the text between the gaps."""

    ids: list[int]
    visible: list[bool]
    pieces: list[str]
    gaps: list[range]


class TextTokenizer:
    """Encodes plain text without adding special tokens; special tokens spelled out in a text are text."""

    def __init__(self, tokenizer: Tokenizer, name: str = "tokenizer"):
        missing = [t for t in ("<mask>", "<eod>") if tokenizer.token_to_id(t) is None]
        if missing:
            raise TextError(
                f"{name} has no {', '.join(missing)} token; an any-subset model needs XLNet's special tokens"
            )
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend = tokenizer
        self.mask_id = tokenizer.token_to_id("<mask>")
        self.separator_id = tokenizer.token_to_id("<eod>")
        self.special_ids = tuple(i for t in SPECIAL_TOKENS if (i := tokenizer.token_to_id(t)) is not None)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str = "main") -> "TextTokenizer":
        """Load ``tokenizer.json`` of an embedded model, a local folder or a Hub id."""
        path = Path(resolve_model(name_or_path, revision))
        if path.is_dir():
            file = path / "tokenizer.json"
            if not file.is_file():
                raise ModelNotFoundError(
                    f"{path} has no tokenizer.json; name a folder or Hub id that has, with --tokenizer"
                )
        else:
            file = _download(str(name_or_path), revision)
        try:
            return cls(Tokenizer.from_file(str(file)), name=str(name_or_path))
        except TextError:
            raise
        except Exception as error:  # the library raises a bare Exception for a malformed file
            raise ModelNotFoundError(f"{file} is not a fast tokenizer ({reason(error)})") from error

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def check_lossless(self, text: str) -> None:
        """Raise :class:`TextError` where encoding and decoding changes ``text``, spaces at its ends apart (XLNet's
        vocabulary drops newlines, say)."""
        text = text.strip(" ")
        back = self.decode(self.encode(text)).strip(" ")
        if back != text:
            pairs = enumerate(zip(text, back, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
            raise TextError(
                f"this vocabulary does not keep the text: {text[at : at + 20]!r} at character {at} comes back as "
                f"{back[at : at + 20]!r}; use a model with a byte-level vocabulary"
            )

    def encode_masked(self, text: str) -> MaskedText:
        """Encode a text with ``<mask>`` (one token) and ``<mask:n>`` (n tokens) gaps; gaps side by side are one.

        Raises :class:`TextError` for a text without a gap, or one that the vocabulary does not keep.
        """
        require_gap(text)
        ids, visible, pieces, gaps, end = [], [], [], [], 0
        for match in GAP.finditer(text):
            length = int(match[1] or 1)
            if length < 1:
                raise TextError(f"{match[0].strip()!r} asks for no token; a gap needs at least one")
            piece = text[end : match.start()]
            end = match.end()
            if gaps and not piece:  # gaps side by side are one
                gaps[-1] = range(gaps[-1].start, gaps[-1].stop + length)
            else:
                self.check_lossless(piece)
                pieces.append(piece)
                piece_ids = self.encode(piece)
                ids += piece_ids
                visible += [True] * len(piece_ids)
                gaps.append(range(len(ids), len(ids) + length))
            ids += [self.mask_id] * length
            visible += [False] * length
        self.check_lossless(text[end:])
        pieces.append(text[end:])
        tail = self.encode(pieces[-1])
        return MaskedText(ids + tail, visible + [True] * len(tail), pieces, gaps)

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


def require_gap(text: str) -> None:
    """Raise :class:`TextError` for a text with nothing to fill in."""
    if not GAP.search(text):
        raise TextError(f"the text has no <mask> or <mask:n>: {text[:60]!r}; mark what is to be filled in")


def _download(name: str, revision: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, "tokenizer.json", revision=revision)
    except Exception as error:  # the hub raises its own, requests' and plain OSErrors
        raise ModelNotFoundError(
            f"no tokenizer.json for {name!r} at revision {revision!r}: give --tokenizer with a folder or a Hub id that "
            f"has one (xlnet/xlnet-base-cased, for instance) ({reason(error)})"
        ) from error


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
