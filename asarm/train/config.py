"""Settings of training a model: one dataclass a section. Those of a draft head are in :mod:`asarm.train.head_config`.

Imports nothing heavy, so that ``--help`` answers at once. Ranges are checked when a section is made.
"""

from dataclasses import dataclass, field

from ..config import DataConfig, require
from ..errors import ConfigError

OBJECTIVES = ("joint", "parallel")
PROMPT_ATTENTION = ("prompt_and_decoded", "prompt_only", "causal")
LOSS_SCALES = ("none", "masking_rate", "snr")
LOSS_AVERAGES = ("per_token", "per_row_mean")
PRECISIONS = ("auto", "bf16", "fp32")
RESUME = ("never", "auto", "must")


@dataclass(frozen=True)
class MaskingConfig:
    """Which of a row's tokens are predicted, and in which order.

    Args:
        start_low: the share of the tokens is uniform in start_low..start_high at first
        start_high: (Guo & Ermon 2025),
        final_low: and in final_low..final_high
        final_high: from warmup_steps on.
        warmup_steps: steps over which the range moves.
        span_fraction: share of the rows whose predicted tokens are a few contiguous spans instead of a random subset.
        left_to_right_fraction: share of the rows whose predicted tokens are the last ones.
        any_permutation_fraction: share of the rows whose predicted tokens are decoded in random instead of ascending
            order.
    """

    start_low: float = 0.15
    start_high: float = 0.15
    final_low: float = 0.85
    final_high: float = 0.99
    warmup_steps: int = 5000
    span_fraction: float = 0.0
    left_to_right_fraction: float = 0.0
    any_permutation_fraction: float = 0.0

    def __post_init__(self):
        for name in ("span_fraction", "left_to_right_fraction", "any_permutation_fraction"):
            require(0 <= getattr(self, name) <= 1, f"masking.{name}", getattr(self, name), "in [0, 1]")
        shapes = self.span_fraction + self.left_to_right_fraction
        require(shapes <= 1, "masking.span_fraction + masking.left_to_right_fraction", shapes, "at most 1")
        require(self.warmup_steps >= 0, "masking.warmup_steps", self.warmup_steps, "0 or more")
        for which in ("start", "final"):
            low, high = getattr(self, f"{which}_low"), getattr(self, f"{which}_high")
            require(0 < low <= high < 1, f"masking.{which}_low..{which}_high", (low, high), "a range inside (0, 1)")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted from what (Guo & Ermon 2025).

    Args:
        name: joint (each token given all that precede it) or parallel (the masked tokens independently of each other,
            as a draft is made: given a prompt and what was decoded after it).
        prompt_attention: of parallel: whom a given token sees. prompt_and_decoded: all given tokens; prompt_only: the
            prompt, and of what was decoded what precedes it; causal: what precedes it.
        loss_scale: weight of a row with masking rate m: none (1), masking_rate (m) or snr (m / (1 - m), the inverse of
            its signal-to-noise ratio).
        loss_average: over a step's targets. per_token: each counts alike, so a row in which twice as many are masked
            counts twice as much. per_row_mean: the mean of the rows' own means, each row counts alike, as in the code
            of Guo & Ermon (their scale_by_none is none with per_row_mean).
    """

    name: str = "joint"
    prompt_attention: str = "prompt_and_decoded"
    loss_scale: str = "none"
    loss_average: str = "per_token"

    def __post_init__(self):
        require(self.name in OBJECTIVES, "objective.name", self.name, f"one of {', '.join(OBJECTIVES)}")
        rule = f"one of {', '.join(PROMPT_ATTENTION)}"
        require(self.prompt_attention in PROMPT_ATTENTION, "objective.prompt_attention", self.prompt_attention, rule)
        rule = f"one of {', '.join(LOSS_SCALES)}"
        require(self.loss_scale in LOSS_SCALES, "objective.loss_scale", self.loss_scale, rule)
        rule = f"one of {', '.join(LOSS_AVERAGES)}"
        require(self.loss_average in LOSS_AVERAGES, "objective.loss_average", self.loss_average, rule)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and linear decay to zero at the last step.

    Args:
        steps: optimiser steps.
        rows_per_step: packed rows per optimiser step, over all processes.
        rows_per_pass: rows per forward pass of a process (gradient accumulation over the rest); processes times
            rows_per_pass must divide rows_per_step.
        precision: bf16 (autocast), fp32, or auto: bf16 where the device has bfloat16 products of its own.
        ema_decay: keep an exponential moving average of the weights, which validation and final/ then use.
        max_skipped_steps: stop after so many steps in a row whose gradient is not finite; each of them is skipped.
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
    precision: str = "auto"
    ema_decay: float | None = None
    max_skipped_steps: int = 10

    def __post_init__(self):
        require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        require(self.steps >= 1, "optimizer.steps", self.steps, "at least 1")
        require(self.rows_per_pass >= 1, "optimizer.rows_per_pass", self.rows_per_pass, "at least 1")
        self.require_divides(1)
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.grad_clip > 0, "optimizer.grad_clip", self.grad_clip, "above 0")
        require(self.precision in PRECISIONS, "optimizer.precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "in (0, 1)")
        require(self.max_skipped_steps >= 1, "optimizer.max_skipped_steps", self.max_skipped_steps, "at least 1")

    def require_divides(self, n_processes: int) -> None:
        """Raise :class:`ConfigError` unless a step is a whole number of passes of each process."""
        rule = f"a multiple of rows_per_pass ({self.rows_per_pass})"
        if n_processes > 1:
            rule += f" times the number of processes ({n_processes})"
        whole = self.rows_per_step % (n_processes * self.rows_per_pass) == 0
        require(whole, "optimizer.rows_per_step", self.rows_per_step, rule)


@dataclass(frozen=True)
class ValidationConfig:
    """Measures on held-out text while a model is trained, in validation.jsonl and generations.jsonl. The weights with
    the lowest mean of the negative log-likelihoods are kept in best/.

    Args:
        file: JSON lines, Parquet or raw text; without file and dataset nothing is measured.
        dataset: instead of a file: samples, english-valid or wikitext (as in eval speculative), or a Hub data set id or
            folder.
        dataset_config: configuration name of a Hub data set.
        split: of a Hub data set.
        text_column: where a record of JSON lines, Parquet or the data set holds its text.
        rows: packed rows from the text's beginning.
        masked_fractions: shares of a row's tokens that are masked, for the joint log-likelihood.
        generations: rows of which generation_masked_fraction is drawn anew with assd; 0 for none.
        generation_masked_fraction: share of their tokens that is drawn.
        k: tokens drafted a round.
        judge: causal language model (folder, or Hub id@revision) whose perplexity of the generations is measured.
        batch_size: rows at a time.
        every: steps between measurements; the last step is always measured.
        seed: of masks and samples, the same at every measurement.
    """

    file: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "validation"
    text_column: str = "text"
    rows: int = 64
    masked_fractions: list[float] = field(default_factory=lambda: [0.15, 0.5, 0.95])
    generations: int = 8
    generation_masked_fraction: float = 0.95
    k: int = 5
    judge: str | None = None
    batch_size: int = 8
    every: int = 1000
    seed: int = 0

    def __post_init__(self):
        for name in ("rows", "k", "batch_size", "every"):
            require(getattr(self, name) >= 1, f"validation.{name}", getattr(self, name), "at least 1")
        require(0 <= self.generations <= self.rows, "validation.generations", self.generations, "between 0 and rows")
        for fraction in (*self.masked_fractions, self.generation_masked_fraction):
            require(0 < fraction <= 1, "validation: a masked fraction", fraction, "in (0, 1]")
        require(self.seed >= 0, "validation.seed", self.seed, "0 or more")
        one = self.file is None or self.dataset is None
        require(one, "validation.file, validation.dataset", (self.file, self.dataset), "one of the two")
        require(self.judge is None or self.given, "validation.judge", self.judge, "used with a file or a dataset")

    @property
    def given(self) -> bool:
        """Whether there is text to measure on."""
        return self.file is not None or self.dataset is not None


def require_run_settings(config) -> None:
    """The checks that every training run's settings share."""
    require(config.seed >= 0, "seed", config.seed, "0 or more")
    for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    require(config.num_threads is None or config.num_threads >= 1, "num_threads", config.num_threads, "at least 1")
    require(config.resume in RESUME, "resume", config.resume, f"one of {', '.join(RESUME)}")
    config.data.require_source()


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        output_dir: receives config.yaml, metrics.jsonl, validation.jsonl, generations.jsonl, and as folders that load
            checkpoints/step-N/, best/ and final/.
        model: start from this embedded name, folder or Hub id; without it, from random weights by architecture.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        whitespace_map: code for programs in XLNet's vocabulary, which has no line breaks: they, tabs and double spaces
            become special tokens, as in the published revision code (default: as stored with the tokenizer).
        document_end: special tokens after every document, <sep><cls></s> as in the published checkpoints' training
            (default: as stored with the tokenizer, else <eod>).
        architecture: XLNetConfig fields for a model from scratch (d_model, n_layer, n_head, d_inner, ...).
        data: training text.
        masking: what is hidden, and the order of decoding.
        objective: what is predicted from what.
        optimizer: optimiser and batch.
        validation: measures on held-out text.
        seed: of weights, rows and orders.
        resume: never, auto (the option without a value: go on from the newest valid checkpoint in output_dir, begin
            where there is none) or must.
        may_change: settings, as in optimizer.lr, that a resumed run may change from here on; others of those that
            decide what is computed are refused.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints that are kept.
        log_every: steps between lines of metrics.jsonl.
        wandb: project to log to as well (WANDB_MODE=offline without a network).
        fsdp: deal weights, gradients and optimiser state out to the processes (FSDP) instead of copying them (DDP).
        gradient_checkpointing: compute a layer's activations again in the backward pass instead of keeping them.
        compile: run the layers through torch.compile.
        num_threads: CPU threads (default: all).
    """

    output_dir: str
    model: str | None = None
    revision: str = "main"
    tokenizer: str | None = None
    whitespace_map: str | None = None
    document_end: str | None = None
    architecture: dict[str, int | float | str] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    seed: int = 0
    resume: str = field(default="never", metadata={"bare": "auto"})
    may_change: list[str] = field(default_factory=list)
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    wandb: str | None = None
    fsdp: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    num_threads: int | None = None

    def __post_init__(self):
        require_run_settings(self)
        if self.model is None and not (self.architecture and self.tokenizer):
            raise ConfigError("training needs a model to start from, or an architecture and a tokenizer")
        if self.model is not None and self.architecture:
            raise ConfigError(f"model {self.model!r} fixes the architecture; remove the architecture section")
        together = self.fsdp and self.optimizer.ema_decay is not None
        require(not together, "optimizer.ema_decay", self.optimizer.ema_decay, "left out with fsdp")
