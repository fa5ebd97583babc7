"""Settings of the evaluations. Like :mod:`asarm.config`, it imports nothing heavy."""

from dataclasses import dataclass, field, fields, replace
from inspect import formatannotation
from itertools import product
from typing import get_args, get_origin

from ..command_config import WORDS, SamplingConfig, require_use_of_draft_head
from ..config import SamplerConfig, require
from ..samplers import SAMPLERS, find_sampler
from .nlp_tasks import NLP_TASKS
from .protocols import PROTOCOLS, Protocol

ORDERS = ("any-subset", "left-to-right")
WITHOUT_SPLITS = ("auto", "samples", "english-valid")  # data sets that are files


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(SamplingConfig):
    """What every evaluation that samples has.

    Args:
        output_dir: receives config.yaml, records.jsonl and summary.json; a run that was stopped goes on there.
        samplers: sequential, assd, assd+one-pass, assd-head, assd-head+one-pass, assd-ngram, parallel (biased); with a
            k of its own: assd:8.
        baselines: further models (name, or Hub id@revision), with the same samplers in the same run, each with its own
            draft head.
        bonus_token: one more token after k accepted drafts (one-pass forms always draw it).
        verification: of drafts (assd forms): token (each by itself) or block (a round's together: fewer calls, the same
            law); default: block with assd-head, else token.
        draft_only_temperature: the temperature shapes only drafts (assd forms); the law is that of temperature 1.
        accept_slack: added to the probability of keeping a draft (assd forms, judged singly; not with greedy, top_k or
            top_p); above 0 the law is lost.
        batch_size: sequences decoded together; one that finishes makes room for the next.
        dtype: float32 or bfloat16.
        shard: INDEX/COUNT, this process's share of the run (default: from accelerate launch, torchrun or Slurm); the
            process that finishes last writes the summary.
    """

    output_dir: str
    samplers: list[str] = field(default_factory=lambda: ["assd"], metadata=WORDS)
    bonus_token: bool = True
    verification: str | None = None
    draft_only_temperature: bool = False
    accept_slack: float = 0.0
    batch_size: int = 8
    dtype: str = "float32"
    baselines: list[str] = field(default_factory=list, metadata=WORDS)
    shard: str | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "float32 or bfloat16")
        require(len(set(self.samplers)) == len(self.samplers), "samplers", self.samplers, "without repetition")
        for name in self.samplers or ["assd"]:  # the settings are checked now, whatever samplers the model will have
            self.sampler_config(name)
        require_use_of_draft_head(self.draft_head, self.samplers or SAMPLERS)

    def sampler_config(self, name: str, **settings) -> SamplerConfig:
        sampler = find_sampler(name)
        if sampler.verifies:
            settings["verification"] = self.verification
            settings["draft_only_temperature"] = self.draft_only_temperature
            settings["accept_slack"] = self.accept_slack
        elif self.draft_only_temperature:
            settings["temperature"] = 1.0
        return super().sampler_config(name, bonus_token=self.bonus_token or sampler.drafts_ahead, **settings)


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig(DecodingConfig):
    """Compare samplers on masked text: calls, time, likelihood.

    Args:
        samplers: as above (default: all that the model has).
        protocol: default, or paper: text, masks, texts for the judge, entropy and tests as in the code of Guo & Ermon
            (docs/paper.md; needs a judge and bonus_token false).
        dataset: auto (english-valid where ASARM_DATA_DIR is set, else samples), samples, english-valid, wikitext, or
            a Hub data set id or folder.
        dataset_config: configuration name of a Hub data set.
        split: of wikitext (train, validation, test) or a Hub data set (default: validation; test with protocol paper).
        data_file: raw text or JSON lines instead; with dataset wikitext split at its headings.
        num_sequences: packed sequences to mask; if the text makes fewer, those, with a warning.
        max_length: tokens in a sequence.
        visible_fraction: share of the tokens that is given.
        order: any-subset (a random subset is given, the rest drawn in ascending position) or left-to-right (the
            beginning is given).
        limit: only the first so many of the sequences.
        judge: causal language model for generative perplexity: a folder or Hub id, with @revision or without; may be
            given afterwards, over the same output_dir.
        margin: largest mean difference from sequential that counts as none: nats a token of log-probability and of
            the judge, bits of entropy.
        grid: settings to vary, each with a list of values, in a folder each; one table and figure at the end.
        replot: only draw the figures of the finished run in this folder again.
    """

    output_dir: str = "runs/speculative"
    samplers: list[str] = field(default_factory=list, metadata=WORDS)
    protocol: str = "default"
    dataset: str = "auto"
    dataset_config: str | None = None
    split: str | None = None
    data_file: str | None = None
    num_sequences: int = 64
    max_length: int = 128
    visible_fraction: float = 0.05
    order: str = "any-subset"
    limit: int | None = None
    judge: str | None = None
    margin: float = 0.1
    grid: dict[str, list] = field(default_factory=dict)
    replot: str | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.num_sequences >= 1, "num_sequences", self.num_sequences, "at least 1")
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2")
        require(0 <= self.visible_fraction < 1, "visible_fraction", self.visible_fraction, "in [0, 1)")
        require(self.order in ORDERS, "order", self.order, f"one of {', '.join(ORDERS)}")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.margin > 0, "margin", self.margin, "above 0")
        require(self.protocol in PROTOCOLS, "protocol", self.protocol, f"one of {', '.join(PROTOCOLS)}")
        self._settle_split()
        self._follow_protocol()
        self.cells()

    @property
    def rules(self) -> Protocol:
        """The protocol's record."""
        return PROTOCOLS[self.protocol]

    @property
    def wanted(self) -> int:
        """How many sequences are asked for."""
        return min(self.num_sequences, self.limit or self.num_sequences)

    def _settle_split(self) -> None:
        has_splits = self.data_file is None and self.dataset not in WITHOUT_SPLITS
        if self.split is None:
            object.__setattr__(self, "split", self.rules.split if has_splits else "validation")
        what = f"dataset {self.dataset}" if self.data_file is None else "a data_file"
        rule = f"left out with {what}, which has no splits"
        require(has_splits or self.split == "validation", "split", self.split, rule)

    def _follow_protocol(self) -> None:
        """Settings that the protocol decides: filled in, or checked."""
        with_protocol, end = f"with protocol {self.protocol}", self.rules.document_end
        if self.document_end is None:
            object.__setattr__(self, "document_end", end)
        right = end is None or self.document_end == end
        require(right, "document_end", self.document_end, f"{end} {with_protocol}")
        right = self.rules.bonus_token or not self.bonus_token
        require(right, "bonus_token", self.bonus_token, f"false {with_protocol}, which draws none: --bonus_token false")
        rule = (
            f"given {with_protocol}, whose perplexity and entropy are a judge's: --judge openai-community/gpt2-large, "
            "or a folder with that model"
        )
        require(self.judge is not None or not self.rules.entropy_by_judge, "judge", self.judge, rule)

    def cells(self) -> list["SpeculativeConfig"]:
        """The runs that ``grid`` stands for, each with its own folder."""
        known = {f.name for f in fields(self)} - {"grid", "replot", "output_dir", "json", "shard", "protocol"}
        for key, values in self.grid.items():
            require(key in known, "grid", key, "made of settings of this evaluation")
            kind = next(f.type for f in fields(self) if f.name == key)
            fits = isinstance(values, list) and bool(values) and all(_is_a(value, kind) for value in values)
            require(fits, f"grid.{key}", values, f"a list of values of type {formatannotation(kind)}")
        points = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values()) if values]
        names = [",".join(f"{key}={value}" for key, value in point.items()) for point in points]
        return [
            replace(self, **point, grid={}, output_dir=f"{self.output_dir}/{name}")
            for point, name in zip(points, names, strict=True)
        ]


def _is_a(value: object, kind: type) -> bool:
    """Whether a value is of a setting's type: plain, optional, or a list of plain values. Whole numbers are floats."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, *get_args(kind)) for item in value)
    kinds = get_args(kind) or (kind,)
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


@dataclass(frozen=True, kw_only=True)
class InfillEvalConfig(DecodingConfig):
    """What both infilling evaluations have.

    Args:
        limit: only the first so many texts (default: all).
    """

    limit: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.samplers), "samplers", self.samplers, "a list of at least one")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")

    def default_output_dir(self, name: str) -> None:
        """A folder for each task or benchmark, unless one is given: another's would be refused."""
        if self.output_dir is None:
            object.__setattr__(self, "output_dir", name)


@dataclass(frozen=True, kw_only=True)
class NlpInfillConfig(InfillEvalConfig):
    """Infill stories and last words, choose endings, fill the masks of a file.

    Args:
        output_dir: receives config.yaml, records.jsonl and summary.json; a run that was stopped goes on there
            (default: runs/nlp_infill/TASK).
        samplers: as above; hellaswag only scores and needs none.
        task: rocstories-1of5 (the third sentence of a story), rocstories-3of5 (the middle three), lambada (the last
            word), hellaswag (the likeliest of four endings) or infill-file (the masks of data_file).
        data_file: the task's file (default: that of ASARM_DATA_DIR; without it, for stories, those of
            eval_datasets/samples). rocstories: Story Cloze CSV, or JSON lines with "text" of five sentences. lambada:
            JSON lines with "text", or "context" and "continuation". hellaswag: "ctx", "endings" and "label".
            infill-file: "text" with <mask> and <mask:n>, and "reference" or, for several gaps, "references" if there
            are any. JSON lines may be compressed (.gz, .zst), and Parquet stands for them.
        limit: only the first so many rows of the file (default: all).
        trials: how often each gap is filled.
        max_length: longer texts are skipped, in tokens (default: the length the model was trained on, where its folder
            has a training_config.yaml that tells).
        causal_lm: left-to-right models (folder, or Hub id@revision) given the left context only, in the same run.
    """

    output_dir: str | None = None
    task: str = "rocstories-1of5"
    data_file: str | None = None
    trials: int = 1
    max_length: int | None = None
    causal_lm: list[str] = field(default_factory=list, metadata=WORDS)

    def __post_init__(self):
        super().__post_init__()
        require(self.task in NLP_TASKS, "task", self.task, f"one of {', '.join(NLP_TASKS)}")
        self.default_output_dir(f"runs/nlp_infill/{self.task}")
        with_file = NLP_TASKS[self.task].data_file or self.data_file
        require(
            bool(with_file), "data_file", self.data_file, f"given with the task {self.task}, which has none of its own"
        )
        require(self.trials >= 1, "trials", self.trials, "at least 1")
        enough = self.max_length is None or self.max_length >= 2
        require(enough, "max_length", self.max_length, "at least 2")
