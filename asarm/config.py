"""Settings of sampling and training: one dataclass a section, filled from a YAML file and overridden on the command
line. Those of the other commands are in :mod:`asarm.evals.config`.

Imports nothing heavy, so that ``--help`` answers at once. Ranges are checked when a section is made.
"""

from dataclasses import dataclass, field, replace

from .errors import ConfigError

SAMPLERS = ("sequential", "assd", "assd-head", "assd-ngram", "parallel")
ONE_PASS = "+one-pass"
ONE_PASS_SAMPLERS = ("assd", "assd-head")


def require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True)
class SamplerConfig:
    """How masked tokens are drawn.

    Args:
        name: sequential (one token a call), assd (self draft), assd-head (draft head of the model), assd-ngram (context
            bigram draft) or parallel (biased baseline).
        k: tokens drafted a round (assd forms) or drawn a call (parallel).
        temperature: of the distribution that is sampled from, above 0.
        greedy: always the most likely token.
        top_k: draw only from so many most likely tokens.
        top_p: draw only from the fewest tokens that hold this share of the probability.
        bonus_token: after k accepted drafts, draw one more from the verification pass.
        one_pass: draft in the pass that verifies the drafts before, one call a round (assd and assd-head; default: on
            a GPU,
            where a call's time hardly depends on its rows, and not on a CPU, where it does).
        draft_only_temperature: the temperature shapes only the drafts after the first; the law is that of temperature 1
            (an ablation of Guo & Ermon 2025).
        accept_slack: added to the probability of keeping a draft; above 0 the law is lost (an ablation of Guo & Ermon
            2025).
        banned_ids: token ids that are never drawn; the mask token always is one.
        compile: run the network through torch.compile (CUDA graphs on a GPU); pays for itself in long runs.
    """

    name: str = "assd"
    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    top_k: int | None = None
    top_p: float | None = None
    bonus_token: bool = True
    one_pass: bool | None = None
    draft_only_temperature: bool = False
    accept_slack: float = 0.0
    banned_ids: tuple[int, ...] = ()
    compile: bool = False

    def __post_init__(self):
        require(self.name in SAMPLERS, "sampler", self.name, f"one of {', '.join(SAMPLERS)}")
        require(self.k >= 1, "k", self.k, "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0 (for the most likely token use greedy)")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(
            not self.one_pass or self.name in ONE_PASS_SAMPLERS, "one_pass", self.name, "used with assd or assd-head"
        )
        require(
            not self.one_pass or self.bonus_token, "bonus_token", False, "true with one_pass, which always draws it"
        )
        drafts = self.name.startswith("assd")
        require(drafts or not self.draft_only_temperature, "draft_only_temperature", self.name, "used with assd")
        require(self.accept_slack >= 0, "accept_slack", self.accept_slack, "0 or more")
        require(drafts or not self.accept_slack, "accept_slack", self.name, "used with assd")

    @classmethod
    def named(cls, name: str, one_pass: bool | None = False, **settings) -> "SamplerConfig":
        """From a name as in the evaluations' tables: ``assd-head``, ``assd-head+one-pass`` and, with a ``k`` of its own
        instead of that of ``settings``, ``assd-head+one-pass:8``."""
        form, _, k = name.partition(":")
        if k:
            require(k.isdecimal(), "k", k, f"a whole number after the colon of {name!r}")
            settings["k"] = int(k)
        base = form.removesuffix(ONE_PASS)
        return cls(base, one_pass=True if base != form else one_pass, **settings)

    @property
    def full_name(self) -> str:
        """The name in the evaluations' tables."""
        return self.name + ONE_PASS * bool(self.one_pass)

    @property
    def lossless(self) -> bool:
        """Whether what is drawn has the model's law."""
        return self.name != "parallel" and self.accept_slack == 0

    def on(self, device_type: str) -> "SamplerConfig":
        """With ``one_pass`` settled for a kind of device (``cuda``, ``cpu``)."""
        if self.one_pass is not None:
            return self
        able = self.name in ONE_PASS_SAMPLERS and self.bonus_token
        return replace(self, one_pass=able and device_type == "cuda")


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
        require(self.max_length >= 2, "data.max_length", self.max_length, "at least 2")
        for pattern, weight in self.source_weights.items():
            require(weight >= 0, f"data.source_weights[{pattern!r}]", weight, "0 or more")


@dataclass(frozen=True)
class MaskingConfig:
    """Which of a row's tokens are predicted.

    Args:
        start_low: the share of the tokens is uniform in start_low..start_high at first
        start_high: (Guo & Ermon 2025),
        final_low: and in final_low..final_high
        final_high: from warmup_steps on.
        warmup_steps: steps over which the range moves.
        span_fraction: share of the rows whose predicted tokens are a few contiguous spans instead of a random subset.
    """

    start_low: float = 0.15
    start_high: float = 0.15
    final_low: float = 0.85
    final_high: float = 0.99
    warmup_steps: int = 5000
    span_fraction: float = 0.0

    def __post_init__(self):
        require(0 <= self.span_fraction <= 1, "masking.span_fraction", self.span_fraction, "in [0, 1]")
        require(self.warmup_steps >= 0, "masking.warmup_steps", self.warmup_steps, "0 or more")
        for which in ("start", "final"):
            low, high = getattr(self, f"{which}_low"), getattr(self, f"{which}_high")
            require(0 < low <= high < 1, f"masking.{which}_low..{which}_high", (low, high), "a range inside (0, 1)")


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
        require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        require(self.steps >= 1, "optimizer.steps", self.steps, "at least 1")
        require(self.rows_per_pass >= 1, "optimizer.rows_per_pass", self.rows_per_pass, "at least 1")
        require(
            self.rows_per_step % self.rows_per_pass == 0,
            "optimizer.rows_per_step",
            self.rows_per_step,
            f"a multiple of rows_per_pass ({self.rows_per_pass})",
        )
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(self.grad_clip > 0, "optimizer.grad_clip", self.grad_clip, "above 0")
        require(self.precision in ("bf16", "fp32"), "optimizer.precision", self.precision, "bf16 or fp32")


def require_run_settings(config) -> None:
    """The checks that every training run's settings share."""
    require(config.seed >= 0, "seed", config.seed, "0 or more")
    require(config.checkpoint_every >= 1, "checkpoint_every", config.checkpoint_every, "at least 1")
    require(config.log_every >= 1, "log_every", config.log_every, "at least 1")
    require(bool(config.data.files), "data.files", config.data.files, "a list of at least one file")


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
        require_run_settings(self)
        if self.model is None and not (self.architecture and self.tokenizer):
            raise ConfigError("training needs a model to start from, or an architecture and a tokenizer")
        if self.model is not None and self.architecture:
            raise ConfigError(f"model {self.model!r} fixes the architecture; remove the architecture section")
