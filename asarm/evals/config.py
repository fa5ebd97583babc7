"""Settings of infilling, scoring and the evaluations; like :mod:`asarm.config`, it imports nothing heavy."""

from dataclasses import dataclass, field

from ..config import ONE_PASS, SamplerConfig, require

NLP_TASKS = ("rocstories-1of5", "rocstories-3of5")
CODE_BENCHMARKS = {"single-line": "SingleLine", "multi-line": "MultiLine"}  # name in the published files


@dataclass(frozen=True)
class InfillConfig:
    """Fill the gaps of a text.

    Args:
        text: with <mask> (one token) and <mask:n> (n tokens) where something is to be filled in; - reads standard
            input.
        model: embedded name (tiny-english), folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        sampler: sequential, assd, assd+one-pass, assd-ngram or parallel (biased).
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
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        self.sampler_config()

    def sampler_config(self) -> SamplerConfig:
        return SamplerConfig.named(self.sampler, k=self.k, temperature=self.temperature, greedy=self.greedy)


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

    text: str = ""
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
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(
            bool(self.text) != bool(self.data_file), "text, data_file", (self.text, self.data_file), "one of the two"
        )
        for fraction in self.masked_fractions:
            require(0 < fraction <= 1, "masked_fractions", fraction, "in (0, 1]")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(
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
        samplers: to compare: sequential, assd, assd+one-pass, assd-ngram, parallel.
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
    samplers: list[str] = field(
        default_factory=lambda: ["sequential", "assd", "assd+one-pass", "assd-ngram", "parallel"],
        metadata={"separator": ","},
    )
    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    bonus_token: bool = True
    batch_size: int = 8
    dtype: str = "float32"
    seed: int = 0
    json: bool = False

    def __post_init__(self):
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.num_sequences >= 1, "num_sequences", self.num_sequences, "at least 1")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        require(0 <= self.visible_fraction < 1, "visible_fraction", self.visible_fraction, "in [0, 1)")
        _check_decoding(self)


@dataclass(frozen=True)
class NlpInfillConfig:
    """Infill sentences of five-sentence stories; ROUGE against the sentences that were there.

    Args:
        task: rocstories-1of5 (the third sentence) or rocstories-3of5 (the middle three).
        data_file: Story Cloze CSV, or JSON lines with "text" of five sentences (default: the Story Cloze validation
            file of
            ASARM_DATA_DIR, else the stories of eval_datasets/samples).
        model: embedded name (tiny-english), folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        output_dir: receives config.yaml, records.jsonl and summary.json; a run that was stopped goes on there.
        limit: only the first so many (default: all).
        samplers: sequential, assd, assd+one-pass, assd-ngram, parallel.
        k: tokens drafted a round (drawn a call, for parallel).
        temperature: above 0.
        greedy: always the most likely token.
        batch_size: sequences decoded together; seconds per sequence are a batch's divided by it.
        dtype: float32 or bfloat16.
        seed: of the samples.
        json: print the summary as one JSON object instead of the table.
    """

    task: str = "rocstories-1of5"
    data_file: str | None = None
    model: str = "tiny-english"
    revision: str = "main"
    tokenizer: str | None = None
    output_dir: str = "runs/nlp_infill"
    limit: int | None = None
    samplers: list[str] = field(default_factory=lambda: ["assd"], metadata={"separator": ","})
    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    batch_size: int = 16
    dtype: str = "float32"
    seed: int = 0
    json: bool = False

    def __post_init__(self):
        require(self.task in NLP_TASKS, "task", self.task, f"one of {', '.join(NLP_TASKS)}")
        _check_infill_eval(self)


@dataclass(frozen=True)
class CodeInfillConfig:
    """Infill lines of HumanEval solutions; samples.jsonl for the published evaluator, exact match and edit similarity.

    Args:
        benchmark: single-line or multi-line.
        data_file: the benchmark's JSON lines (default: the published file's name in
            ASARM_DATA_DIR/eval/humaneval_infill).
        model: embedded name (tiny-english), folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id with a tokenizer.json (default: the model's own).
        output_dir: receives config.yaml, records.jsonl and summary.json; a run that was stopped goes on there.
        limit: only the first so many (default: all).
        samplers: sequential, assd, assd+one-pass, assd-ngram, parallel.
        k: tokens drafted a round (drawn a call, for parallel).
        temperature: above 0.
        greedy: always the most likely token.
        batch_size: sequences decoded together; seconds per sequence are a batch's divided by it.
        dtype: float32 or bfloat16.
        seed: of the samples.
        json: print the summary as one JSON object instead of the table.
    """

    benchmark: str = "single-line"
    data_file: str | None = None
    model: str = "tiny-english"
    revision: str = "main"
    tokenizer: str | None = None
    output_dir: str = "runs/code_infill"
    limit: int | None = None
    samplers: list[str] = field(default_factory=lambda: ["assd"], metadata={"separator": ","})
    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    batch_size: int = 16
    dtype: str = "float32"
    seed: int = 0
    json: bool = False

    def __post_init__(self):
        require(self.benchmark in CODE_BENCHMARKS, "benchmark", self.benchmark, f"one of {', '.join(CODE_BENCHMARKS)}")
        _check_infill_eval(self)


def _check_infill_eval(config: NlpInfillConfig | CodeInfillConfig) -> None:
    require(config.seed >= 0, "seed", config.seed, "0 or more")
    require(config.limit is None or config.limit >= 1, "limit", config.limit, "at least 1")
    _check_decoding(config)


def _check_decoding(config) -> None:
    """What every evaluation that samples has to check."""
    require(config.batch_size >= 1, "batch_size", config.batch_size, "at least 1")
    require(config.dtype in ("float32", "bfloat16"), "dtype", config.dtype, "float32 or bfloat16")
    require(bool(config.samplers), "samplers", config.samplers, "a list of at least one")
    require(len(set(config.samplers)) == len(config.samplers), "samplers", config.samplers, "without repetition")
    for name in config.samplers:
        sampler_of(config, name)


def sampler_of(config, name: str) -> SamplerConfig:
    """The sampler that an evaluation's settings mean by ``name``; a one-pass form always has its bonus token."""
    bonus_token = getattr(config, "bonus_token", True) or name.endswith(ONE_PASS)
    return SamplerConfig.named(
        name, k=config.k, temperature=config.temperature, greedy=config.greedy, bonus_token=bonus_token
    )
