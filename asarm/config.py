"""Every setting of the program: one dataclass a section, filled from a YAML file and overridden on the command line.

Imports nothing heavy, so that ``--help`` answers at once. Ranges are checked when a section is made.
"""

from dataclasses import dataclass, field

from .errors import ConfigError

SAMPLERS = ("sequential", "assd", "assd-ngram", "parallel")


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True)
class SamplerConfig:
    """How masked tokens are drawn.

    Args:
        name: sequential (one token a call), assd (self draft), assd-ngram (context bigram draft) or parallel (biased
            baseline).
        k: tokens drafted a round (assd, assd-ngram) or drawn a call (parallel).
        temperature: of the distribution that is sampled from, above 0.
        greedy: always the most likely token.
        bonus_token: after k accepted drafts, draw one more from the verification pass.
        banned_ids: token ids that are never drawn; the mask token always is one.
    """

    name: str = "assd"
    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    bonus_token: bool = True
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self):
        _require(self.name in SAMPLERS, "sampler", self.name, f"one of {', '.join(SAMPLERS)}")
        _require(self.k >= 1, "k", self.k, "at least 1")
        _require(
            self.temperature > 0, "temperature", self.temperature, "above 0 (for the most likely token use greedy)"
        )


@dataclass(frozen=True)
class DataConfig:
    """Training text.

    Args:
        files: JSON lines (.jsonl, .jsonl.gz; one object with "text" a line) or raw text; environment variables are
            expanded.
        source_weights: how often a document of a source appears in an epoch, by pattern over its "source".
        max_length: tokens in a packed row.
    """

    files: list[str] = field(default_factory=list)
    source_weights: dict[str, float] = field(default_factory=dict)
    max_length: int = 512

    def __post_init__(self):
        _require(self.max_length >= 2, "data.max_length", self.max_length, "at least 2")


@dataclass(frozen=True)
class MaskingConfig:
    """Share of a row's tokens that is predicted: uniform in a range that moves from start to final over warmup_steps
    (Guo & Ermon 2025)."""

    start_low: float = 0.15
    start_high: float = 0.15
    final_low: float = 0.85
    final_high: float = 0.99
    warmup_steps: int = 5000

    def __post_init__(self):
        for which in ("start", "final"):
            low, high = getattr(self, f"{which}_low"), getattr(self, f"{which}_high")
            _require(0 < low <= high < 1, f"masking.{which}_low..{which}_high", (low, high), "a range inside (0, 1)")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay to zero at the last step.

    Args:
        steps: optimiser steps.
        rows_per_step: packed rows per optimiser step.
        rows_per_pass: rows per forward pass (gradient accumulation over the rest); must divide rows_per_step.
        precision: bf16 (autocast) or fp32.
    """

    lr: float = 1e-5
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    steps: int = 100_000
    warmup_steps: int = 5000
    grad_clip: float = 1.0
    rows_per_step: int = 32
    rows_per_pass: int = 32
    precision: str = "bf16"

    def __post_init__(self):
        _require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        _require(self.steps >= 1, "optimizer.steps", self.steps, "at least 1")
        _require(self.rows_per_pass >= 1, "optimizer.rows_per_pass", self.rows_per_pass, "at least 1")
        _require(
            self.rows_per_step % self.rows_per_pass == 0,
            "optimizer.rows_per_step",
            self.rows_per_step,
            f"a multiple of rows_per_pass ({self.rows_per_pass})",
        )
        _require(self.precision in ("bf16", "fp32"), "optimizer.precision", self.precision, "bf16 or fp32")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        output_dir: receives config.yaml, metrics.jsonl, checkpoints/ and final/.
        model: start from this embedded name, folder or Hub id; without it, from random weights by architecture.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        architecture: XLNetConfig fields for a model from scratch (d_model, n_layer, n_head, d_inner, ...).
        data: training text.
        masking: masking-rate range.
        optimizer: optimiser and batch.
        seed: of weights, rows and orders.
        resume: go on from the newest checkpoint in output_dir.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of metrics.jsonl.
        num_threads: CPU threads (default: all).
    """

    output_dir: str
    model: str | None = None
    revision: str = "main"
    tokenizer: str | None = None
    architecture: dict[str, int | float | str] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    resume: bool = False
    checkpoint_every: int = 500
    log_every: int = 10
    num_threads: int | None = None

    def __post_init__(self):
        _require(bool(self.data.files), "data.files", self.data.files, "a list of at least one file")
        if self.model is None and not (self.architecture and self.tokenizer):
            raise ConfigError("training needs a model to start from, or an architecture and a tokenizer")
        if self.model is not None and self.architecture:
            raise ConfigError(f"model {self.model!r} fixes the architecture; remove the architecture section")


@dataclass(frozen=True)
class InfillConfig:
    """Fill the gaps of a text.

    Args:
        text: with <mask> (one token) and <mask:n> (n tokens) where something is to be filled in; - reads standard
            input.
        model: embedded name (tiny-english), folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        sampler: sequential, assd, assd-ngram or parallel (biased).
        k: tokens drafted a round.
        temperature: above 0.
        greedy: always the most likely token.
        num_samples: how many fillings.
        seed: of the random numbers.
        json: print one JSON object instead of plain text.
    """

    text: str
    model: str = "tiny-english"
    revision: str = "main"
    tokenizer: str | None = None
    sampler: str = "assd"
    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    num_samples: int = 1
    seed: int = 0
    json: bool = False

    def __post_init__(self):
        _require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        self.sampler_config()

    def sampler_config(self) -> SamplerConfig:
        return SamplerConfig(self.sampler, self.k, self.temperature, self.greedy)


@dataclass(frozen=True)
class ScoreConfig:
    """Log-probability of a text, of fills for its gaps, or of held-out text at given masking rates.

    Args:
        text: scored as a whole, or, with <mask> gaps, given; - reads standard input.
        fills: one text for each gap of text.
        data_file: instead of text: packed rows of this file, a random subset of each masked and scored.
        masked_fractions: masking rates for data_file.
        max_length: tokens in a row of data_file.
        num_sequences: rows of data_file (default: all).
        batch_size: rows scored together.
        model: embedded name (tiny-english), folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        seed: of the masks.
        json: print one JSON object instead of plain text.
    """

    text: str | None = None
    fills: list[str] = field(default_factory=list)
    data_file: str | None = None
    masked_fractions: list[float] = field(default_factory=lambda: [0.15, 0.5, 0.95], metadata={"separator": ","})
    max_length: int = 256
    num_sequences: int | None = None
    batch_size: int = 8
    model: str = "tiny-english"
    revision: str = "main"
    tokenizer: str | None = None
    seed: int = 0
    json: bool = False

    def __post_init__(self):
        _require(
            (self.text is None) != (self.data_file is None),
            "text, data_file",
            (self.text, self.data_file),
            "one of the two",
        )
        for fraction in self.masked_fractions:
            _require(0 < fraction <= 1, "masked_fractions", fraction, "in (0, 1]")
        _require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(
            self.num_sequences is None or self.num_sequences >= 1, "num_sequences", self.num_sequences, "at least 1"
        )


@dataclass(frozen=True)
class SpeculativeConfig:
    """Compare samplers on masked text: calls, time, likelihood.

    Args:
        model: embedded name (tiny-english), folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        dataset: auto (english-valid where ASARM_DATA_DIR is set, else samples), samples, english-valid, wikitext, or
            a Hub data set id or folder.
        dataset_config: configuration name of a Hub data set.
        split: of a Hub data set.
        data_file: raw text or JSON lines instead; with dataset wikitext split at its headings.
        output_dir: receives config.yaml, records.jsonl and summary.json; a run that was stopped goes on there.
        num_sequences: packed sequences to mask.
        max_length: tokens in a sequence.
        visible_fraction: share of the tokens that is given, a random subset.
        samplers: to compare.
        k: tokens drafted a round (drawn a call, for parallel).
        temperature: above 0.
        greedy: always the most likely token.
        bonus_token: one more token after k accepted drafts.
        batch_size: sequences decoded together; seconds per sequence are a batch's divided by it.
        dtype: float32 or bfloat16.
        seed: of masks and samples.
        json: print the summary as one JSON object instead of the table.
    """

    model: str = "tiny-english"
    revision: str = "main"
    tokenizer: str | None = None
    dataset: str = "auto"
    dataset_config: str | None = None
    split: str = "validation"
    data_file: str | None = None
    output_dir: str = "runs/speculative"
    num_sequences: int = 64
    max_length: int = 128
    visible_fraction: float = 0.05
    samplers: list[str] = field(default_factory=lambda: list(SAMPLERS), metadata={"separator": ","})
    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    bonus_token: bool = True
    batch_size: int = 8
    dtype: str = "float32"
    seed: int = 0
    json: bool = False

    def __post_init__(self):
        _require(self.num_sequences >= 1, "num_sequences", self.num_sequences, "at least 1")
        _require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        _require(0 <= self.visible_fraction < 1, "visible_fraction", self.visible_fraction, "in [0, 1)")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "float32 or bfloat16")
        _require(bool(self.samplers), "samplers", self.samplers, "a list of at least one")
        _require(len(set(self.samplers)) == len(self.samplers), "samplers", self.samplers, "without repetition")
        for name in self.samplers:
            self.sampler_config(name)

    def sampler_config(self, name: str) -> SamplerConfig:
        return SamplerConfig(name, self.k, self.temperature, self.greedy, self.bonus_token)
