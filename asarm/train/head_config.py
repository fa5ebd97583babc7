"""Settings of training a draft head; like :mod:`asarm.config`, it imports nothing heavy."""

from dataclasses import dataclass, field

from ..config import DataConfig, require
from .config import MaskingConfig, OptimizerConfig, require_run_settings


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a draft head.

    Args:
        width: of its rows; n_head must divide it.
        n_head: attention heads.
        rank: of its correction to the trunk's logits, at most the trunk's width.
    """

    width: int = 256
    n_head: int = 4
    rank: int = 128

    def __post_init__(self):
        require(self.width >= 1, "head.width", self.width, "at least 1")
        require(self.n_head >= 1 and self.width % self.n_head == 0, "head.n_head", self.n_head, "a divisor of width")
        require(self.rank >= 1, "head.rank", self.rank, "at least 1")


@dataclass(frozen=True)
class WindowConfig:
    """What a draft head learns from: windows of consecutive ranks, half of them as in two passes a round (the state has
    seen the token before the window), half as in one (it has not).

    Args:
        k: ranks in a window.
        per_row: windows in a packed row.
        kl_steps: steps over which the loss fades from KL(trunk, draft) to their total variation, the rate at
            which a draft that is judged by itself is refused.
    """

    k: int = 8
    per_row: int = 16
    kl_steps: int = 1000

    def __post_init__(self):
        require(2 <= self.k <= 16, "windows.k", self.k, "between 2 and 16")
        require(self.per_row >= 2, "windows.per_row", self.per_row, "at least 2, one of each kind")
        require(self.kl_steps >= 1, "windows.kl_steps", self.kl_steps, "at least 1")


@dataclass(frozen=True)
class HeldOutConfig:
    """Text on which acceptance by draft index is measured while a draft head is trained.

    Args:
        file: JSON lines or raw text; without it nothing is measured.
        rows: packed rows from its beginning.
        masked_fractions: shares of a row's tokens that are masked.
        every: steps between measurements; the last step is always measured.
    """

    file: str | None = None
    rows: int = 32
    masked_fractions: list[float] = field(default_factory=lambda: [0.5, 0.95])
    every: int = 250

    def __post_init__(self):
        require(self.rows >= 1, "held_out.rows", self.rows, "at least 1")
        require(self.every >= 1, "held_out.every", self.every, "at least 1")
        for fraction in self.masked_fractions:
            require(0 < fraction <= 1, "held_out.masked_fractions", fraction, "in (0, 1]")


@dataclass(frozen=True)
class TrainHeadConfig:
    """A draft head's training run, for a trunk that stays as it is.

    Args:
        output_dir: receives config.yaml, metrics.jsonl, held_out.jsonl, checkpoints/ and final/draft_head/.
        model: the trunk: embedded name, folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the trunk's own).
        whitespace_map: as in the trunk's training (default: as stored with the tokenizer).
        document_end: as in the trunk's training (default: as stored with the tokenizer, else <eod>).
        head: shape of the head.
        start_from: a folder, embedded name or Hub id whose draft_head/ the head starts as, of this trunk or of another
            with the same tokenizer (default: untrained).
        data: training text.
        masking: masking-rate range.
        windows: what the head learns from.
        optimizer: optimiser and batch.
        held_out: text to measure acceptance on.
        seed: of weights, rows, orders and windows.
        resume: never, auto (the option without a value: go on from the newest valid checkpoint in output_dir, begin
            where there is none) or must.
        may_change: settings, as in optimizer.lr, that a resumed run may change from here on.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints that are kept.
        log_every: steps between lines of metrics.jsonl.
        wandb: project to log to as well (WANDB_MODE=offline without a network).
        num_threads: CPU threads (default: all).
    """

    output_dir: str
    model: str = "tiny-english"
    revision: str = "main"
    tokenizer: str | None = None
    whitespace_map: str | None = None
    document_end: str | None = None
    head: HeadConfig = field(default_factory=HeadConfig)
    start_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=lambda: MaskingConfig(0.3, 0.97, 0.3, 0.97, 0))
    windows: WindowConfig = field(default_factory=WindowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    seed: int = 0
    resume: str = field(default="never", metadata={"bare": "auto"})
    may_change: list[str] = field(default_factory=list)
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    wandb: str | None = None
    num_threads: int | None = None

    def __post_init__(self):
        require_run_settings(self)
