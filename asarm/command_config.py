"""Settings of the commands that use a model: those they share, and those of infill, score and export.

Those of the evaluations, which build on them, are in :mod:`asarm.evals.config`. Imports nothing heavy.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from .config import SamplerConfig, require
from .samplers import SAMPLERS, find_sampler

DTYPES = ("float32", "bfloat16")
WORDS = {"separator": ","}  # a list field that may also be given as one word with commas


def require_use_of_draft_head(draft_head: str | None, samplers: Iterable[str]) -> None:
    """Raise :class:`~asarm.errors.ConfigError` for a draft head that none of the samplers would draft with."""
    drafts_with_head = any(find_sampler(name).drafts == "head" for name in samplers)
    have = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.drafts == "head")
    require(draft_head is None or drafts_with_head, "draft_head", draft_head, f"used with a sampler of {have}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every command with a model has.

    Args:
        model: embedded name (tiny-english), folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        whitespace_map: code where the checkpoint was trained on programs as the published revision code was: line
            breaks, tabs and double spaces as special tokens of XLNet's vocabulary (default: as stored with the
            tokenizer; training stores it).
        document_end: special tokens after every document that is packed, <sep><cls></s> for the published checkpoints
            (default: as stored with the tokenizer, else <eod>).
        seed: of masks and samples.
        json: print one JSON object instead of plain text.
    """

    model: str = "tiny-english"
    revision: str = "main"
    tokenizer: str | None = None
    whitespace_map: str | None = None
    document_end: str | None = None
    seed: int = 0
    json: bool = False

    def __post_init__(self):
        require(self.seed >= 0, "seed", self.seed, "0 or more")

    @property
    def tokenizer_settings(self) -> dict[str, str | None]:
        """Those that :func:`asarm.loading.load` takes."""
        return {key: getattr(self, key) for key in ("tokenizer", "whitespace_map", "document_end")}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model as a folder that asarm and transformers load.

    Args:
        model: embedded name (tiny-english), folder (a training run's checkpoint, too) or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        whitespace_map: to store with the tokenizer (default: as it is stored now).
        document_end: to store with the tokenizer (default: as it is stored now, else <eod>).
        output_dir: a new or empty folder; receives config.json, model.safetensors, the tokenizer's files,
            training_config.yaml where there is one, and draft_head/ where the model has one.
        dtype: of the weights: float32 or bfloat16.
    """

    model: str
    output_dir: str
    revision: str = "main"
    tokenizer: str | None = None
    whitespace_map: str | None = None
    document_end: str | None = None
    dtype: str = "float32"

    def __post_init__(self):
        require(self.dtype in DTYPES, "dtype", self.dtype, " or ".join(DTYPES))


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(ModelConfig):
    """What every command that samples has.

    Args:
        k: tokens drafted a round (drawn a call, for parallel).
        temperature: above 0.
        greedy: always the most likely token.
        top_k: draw only from so many most likely tokens.
        top_p: draw only from the fewest tokens that hold this share of the probability.
        draft_head: folder or Hub id (@revision) that holds the folder draft_head or is one, for the samplers that draft
            with a head (default: the model's own).
        compile: run rounds through torch.compile.
    """

    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    top_k: int | None = None
    top_p: float | None = None
    draft_head: str | None = None
    compile: bool = False

    def sampler_config(self, name: str, **settings) -> SamplerConfig:
        keys = ("k", "temperature", "greedy", "top_k", "top_p", "compile")
        return SamplerConfig.named(name, **({key: getattr(self, key) for key in keys} | settings))


@dataclass(frozen=True, kw_only=True)
class InfillConfig(SamplingConfig):
    """Fill the gaps of a text.

    Args:
        text: with <mask> (one token) and <mask:n> (n tokens) where something is to be filled in; - reads standard
            input.
        sampler: sequential, assd, assd-head, assd-ngram or parallel (biased); assd-head is one-pass on a GPU, and
            assd and assd-head are with +one-pass.
        num_samples: how many fillings.
    """

    text: str
    sampler: str = "assd"
    num_samples: int = 1

    def __post_init__(self):
        super().__post_init__()
        require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        self.sampler_config(self.sampler)
        require_use_of_draft_head(self.draft_head, [self.sampler])

    def sampler_config(self, name: str, **settings) -> SamplerConfig:
        return super().sampler_config(name, one_pass=None, **settings)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ModelConfig):
    """Log-probability of a text, of fills for its gaps, or of held-out text at given masking rates.

    Args:
        text: scored as a whole, or, with <mask> gaps, given; - reads standard input.
        fills: one text for each gap of text.
        data_file: instead of text: packed rows of this file, a random subset of each masked and scored.
        masked_fractions: masking rates for data_file.
        max_length: tokens in a row of data_file.
        num_sequences: rows of data_file (default: all).
        batch_size: rows scored together.
    """

    text: str = ""
    fills: list[str] = field(default_factory=list)
    data_file: str | None = None
    masked_fractions: list[float] = field(default_factory=lambda: [0.15, 0.5, 0.95], metadata=WORDS)
    max_length: int = 256
    num_sequences: int | None = None
    batch_size: int = 8

    def __post_init__(self):
        super().__post_init__()
        given = (self.text, self.data_file)
        require(bool(self.text) != bool(self.data_file), "text, data_file", given, "one of the two")
        for fraction in self.masked_fractions:
            require(0 < fraction <= 1, "masked_fractions", fraction, "in (0, 1]")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        enough = self.num_sequences is None or self.num_sequences >= 1
        require(enough, "num_sequences", self.num_sequences, "at least 1")
