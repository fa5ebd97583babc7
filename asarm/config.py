"""Settings of sampling and of training text: one dataclass a section, filled from a YAML file and overridden on the
command line. Those of the commands are in :mod:`asarm.evals.config`, :mod:`asarm.train.config` and
:mod:`asarm.bench.config`.

Imports nothing heavy, so that ``--help`` answers at once. Ranges are checked when a section is made.
"""

from dataclasses import dataclass, field, replace

from .errors import ConfigError
from .samplers import ONE_PASS, SAMPLERS, Sampler, find_sampler

VERIFICATIONS = ("token", "block")


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
        one_pass: draft in the pass that verifies the drafts before, one call a round (assd and assd-head; default: with
            assd-head on a GPU, where that was measured to take least at batch 1).
        verification: of drafts: token (each by itself, as in Guo & Ermon 2025) or block (those of a round together, Sun
            et al. 2025: fewer calls, the same law); default: block with assd-head, token otherwise.
        draft_only_temperature: the temperature shapes only the drafts after the first; the law is that of temperature 1
            (an ablation of Guo & Ermon 2025).
        accept_slack: added to the probability of keeping a draft; above 0 the law is lost (an ablation of Guo & Ermon
            2025; drafts are then judged singly; not with greedy, top_k or top_p).
        banned_ids: token ids that are never drawn; the mask token always is one.
        compile: run rounds through torch.compile; pays for itself in long runs on a GPU.
    """

    name: str = "assd"
    k: int = 5
    temperature: float = 1.0
    greedy: bool = False
    top_k: int | None = None
    top_p: float | None = None
    bonus_token: bool = True
    one_pass: bool | None = None
    verification: str | None = None
    draft_only_temperature: bool = False
    accept_slack: float = 0.0
    banned_ids: tuple[int, ...] = ()
    compile: bool = False

    def __post_init__(self):
        find_sampler(self.name)
        require(self.k >= 1, "k", self.k, "at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "above 0 (for the most likely token use greedy)")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        have = [name.removesuffix(ONE_PASS) for name in SAMPLERS if name.endswith(ONE_PASS)]
        require(not self.one_pass or self.name in have, "one_pass", self.name, f"used with {' or '.join(have)}")
        require(
            not self.one_pass or self.bonus_token, "bonus_token", False, "true with one_pass, which always draws it"
        )
        verifies = self.sampler.verifies
        require(self.verification in (None, *VERIFICATIONS), "verification", self.verification, "token or block")
        require(verifies or self.verification is None, "verification", self.name, "used with assd")
        require(verifies or not self.draft_only_temperature, "draft_only_temperature", self.name, "used with assd")
        require(self.accept_slack >= 0, "accept_slack", self.accept_slack, "0 or more")
        require(verifies or not self.accept_slack, "accept_slack", self.name, "used with assd")
        singly = self.verification != "block"
        require(singly or not self.accept_slack, "accept_slack", self.accept_slack, "0 with verification block")
        whole = not self.greedy and self.top_k is None and self.top_p is None
        rule = "0 with greedy, top_k or top_p, under which a draft that is kept too readily can have probability 0"
        require(whole or not self.accept_slack, "accept_slack", self.accept_slack, rule)

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
    def sampler(self) -> Sampler:
        """The sampler's record."""
        return SAMPLERS[self.full_name]

    @property
    def verifies_blocks(self) -> bool:
        """Whether the drafts of a round are judged together."""
        if self.verification is None:
            return self.sampler.judges_blocks and self.accept_slack == 0
        return self.verification == "block"

    @property
    def lossless(self) -> bool:
        """Whether what is drawn has the model's law."""
        return self.sampler.exact and self.accept_slack == 0

    def on(self, device_type: str) -> "SamplerConfig":
        """With ``one_pass`` settled for a kind of device (``cuda``, ``cpu``)."""
        if self.one_pass is not None:
            return self
        return replace(self, one_pass=device_type in self.sampler.one_pass_on and self.bonus_token)


@dataclass(frozen=True)
class DataConfig:
    """Training text: files that are read into memory, or files or a Hub data set that are streamed.

    Args:
        files: JSON lines, Parquet or raw text (a document a file, or when streamed one for some 64,000 characters),
            compressed (.gz, .zst) or not; environment variables and wildcards are expanded.
        dataset: instead of files, a Hub data set (Skylion007/openwebtext, bigcode/starcoderdata) or a folder in its
            form; always streamed.
        dataset_config: configuration name of the data set.
        data_dir: folder inside the data set (python, of bigcode/starcoderdata).
        split: of the data set.
        revision: of the data set; a commit, where a run that is resumed later must see the same text.
        text_column: where a record of JSON lines, Parquet or the data set holds its text.
        source_weights: how often a document of a source appears in an epoch, by pattern over its "source"; not of
            streamed text.
        max_length: tokens in a packed row.
        streaming: read files piece by piece instead of into memory.
        streams: shares into which streamed text is dealt; a multiple of processes times num_workers is fastest.
        shuffle_buffer: rows of a stream that are shuffled together.
        num_workers: worker processes that tokenise and pack streamed text for each training process; 0 for none.
    """

    files: list[str] = field(default_factory=list)
    dataset: str | None = None
    dataset_config: str | None = None
    data_dir: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    source_weights: dict[str, float] = field(default_factory=dict)
    max_length: int = 512
    streaming: bool = False
    streams: int = 8
    shuffle_buffer: int = 1000
    num_workers: int = 2

    def __post_init__(self):
        require(self.max_length >= 2, "data.max_length", self.max_length, "at least 2")
        for pattern, weight in self.source_weights.items():
            require(weight >= 0, f"data.source_weights[{pattern!r}]", weight, "0 or more")
        weighted = bool(self.source_weights) and self.streamed
        require(not weighted, "data.source_weights", self.source_weights, "empty where text is streamed")
        for name in ("dataset_config", "data_dir", "revision"):
            value = getattr(self, name)
            require(value is None or self.dataset is not None, f"data.{name}", value, "used with data.dataset")
        require(self.streams >= 1, "data.streams", self.streams, "at least 1")
        require(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, "at least 1 (no shuffling)")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")

    @property
    def streamed(self) -> bool:
        return self.streaming or self.dataset is not None

    def require_source(self) -> None:
        """Raise :class:`~asarm.errors.ConfigError` unless there is something to read, from one place."""
        if bool(self.files) == bool(self.dataset):
            what = "both are" if self.files else "nothing is"
            raise ConfigError(f"training reads its text from data.files or from data.dataset, and {what} given")
