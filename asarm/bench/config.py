"""Settings of the benchmarks; imports nothing heavy."""

from dataclasses import dataclass, field

from ..command_config import WORDS, require_use_of_draft_head
from ..config import SamplerConfig, require

ARCHITECTURES = {
    "xlnet-base": {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072, "vocab_size": 32000},
    "xlnet-large": {"d_model": 1024, "n_layer": 24, "n_head": 16, "d_inner": 4096, "vocab_size": 32000},
}
POINTS = (0.25, 0.75)  # of the way through the masked tokens: where rounds are timed
WARM_UP = 3  # rounds that are not counted where rounds are recorded (the third is) or compiled; else one
LONG = 1.0  # seconds of timed rounds that are enough at a point
LEAST_LENGTH = 64
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class BenchDecodeConfig:
    """Time decoding against what one would use instead.

    Args:
        size: xlnet-base or xlnet-large (random weights), or a model by name, folder or Hub id.
        length: positions of a sequence.
        masked_fraction: share of them that is drawn.
        k: tokens drafted a round.
        batch_sizes: sequences decoded together.
        dtypes: float32, bfloat16 (default: both, without what the machine only emulates).
        samplers: as in the evaluations, all with the same k.
        compile: run rounds through torch.compile.
        rounds: timed rounds at each of two points on the way through a sequence; fewer where that is longer than a
            second.
        baseline: time Hugging Face's uncached XLNet and cached GPT-2 small as well.
        memory_lengths: lengths to measure the peak memory of one sequence at.
        acceptance_model: a trained model, for the calls per token that random weights cannot show.
        acceptance_sequences: its sequences of 128 tokens.
        draft_head: folder or Hub id (@revision) that holds the folder draft_head or is one, for the acceptance model
            (default: its own).
        num_threads: CPU threads (default: all).
        seed: of weights, masks and samples.
    """

    size: str = "xlnet-base"
    length: int = 512
    masked_fraction: float = 0.95
    k: int = 5
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16], metadata=WORDS)
    dtypes: list[str] = field(default_factory=list, metadata=WORDS)
    samplers: list[str] = field(
        default_factory=lambda: ["sequential", "assd", "assd+one-pass", "assd-head", "assd-head+one-pass"],
        metadata=WORDS,
    )
    compile: bool = False
    rounds: int = 4
    baseline: bool = True
    memory_lengths: list[int] = field(default_factory=lambda: [512], metadata=WORDS)
    acceptance_model: str = "tiny-english"
    acceptance_sequences: int = 8
    draft_head: str | None = None
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        require(self.length >= LEAST_LENGTH, "length", self.length, f"at least {LEAST_LENGTH}")
        require(0 < self.masked_fraction <= 1, "masked_fraction", self.masked_fraction, "in (0, 1]")
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.acceptance_sequences >= 1, "acceptance_sequences", self.acceptance_sequences, "at least 1")
        for batch_size in self.batch_sizes:
            require(batch_size >= 1, "batch_sizes", batch_size, "at least 1")
        left, most = round(self.masked_fraction * self.length * (1 - POINTS[-1])), self.most_drawn(self.rounds)
        require(left >= most, "rounds", self.rounds, f"fewer: they draw up to {most} tokens where {left} are left")
        least = max(LEAST_LENGTH, round(self.most_drawn(rounds=1) / (1 - POINTS[-1])))
        for length in self.memory_lengths:
            require(length >= least, "memory_lengths", length, f"at least {least} with k = {self.k}")
        _require_machine_settings(self.dtypes, self.num_threads)
        require(bool(self.samplers), "samplers", self.samplers, "a list of at least one")
        for name in self.samplers:
            self.sampler_config(name)
            require(":" not in name, "samplers", name, "without a k of their own: give one for all with --k")
        require_use_of_draft_head(self.draft_head, self.samplers)

    def most_drawn(self, rounds: int) -> int:
        """The most tokens that the rounds at one point draw: those to warm up, ``rounds``, and one whose calls are
        noted."""
        return (WARM_UP + rounds + 1) * (self.k + 1)

    def sampler_config(self, name: str, compile: bool = False) -> SamplerConfig:
        return SamplerConfig.named(name, k=self.k, compile=compile)


@dataclass(frozen=True, kw_only=True)
class BenchTrainConfig:
    """Time a training step against Hugging Face's XLNet on the same batch.

    Args:
        size: xlnet-base or xlnet-large (random weights).
        length: positions of a row.
        batch_size: rows in a step.
        masked_fraction: share of a row's tokens that is predicted.
        dropout: probability of dropout.
        dtypes: float32, bfloat16 (autocast) (default: both, without what the machine only emulates).
        repeats: timed steps; the median counts.
        compile: run this program's layers through torch.compile.
        num_threads: CPU threads (default: all).
        seed: of weights, tokens and masks.
    """

    size: str = "xlnet-base"
    length: int = 512
    batch_size: int = 1
    masked_fraction: float = 0.92
    dropout: float = 0.1
    dtypes: list[str] = field(default_factory=list, metadata=WORDS)
    repeats: int = 5
    compile: bool = False
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        require(self.size in ARCHITECTURES, "size", self.size, f"one of {', '.join(ARCHITECTURES)}")
        require(0 < self.masked_fraction < 1, "masked_fraction", self.masked_fraction, "in (0, 1)")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        for name, least in (("length", 2), ("batch_size", 1), ("repeats", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        _require_machine_settings(self.dtypes, self.num_threads)


def _require_machine_settings(dtypes: list[str], num_threads: int | None) -> None:
    for dtype in dtypes:
        require(dtype in DTYPES, "dtypes", dtype, " or ".join(DTYPES))
    require(num_threads is None or num_threads >= 1, "num_threads", num_threads, "at least 1")
