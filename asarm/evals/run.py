"""One evaluation in its output folder: which models and samplers, whose share of the work, what is done, the summary.

Any number of processes may work on one folder, each on its shard. The one that finishes last finds every record there
and writes ``summary.json``; nobody waits for anybody, so Slurm arrays will do.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from tqdm import tqdm

from ..config import SamplerConfig
from ..drafter import drafter_of
from ..infilling import InfillTask, without_special_tokens
from ..loading import load, name_and_revision
from ..network import Network
from ..runlog import prepare_output_dir, provenance, write_json
from ..samplers import SAMPLERS, form_of
from ..sampling.decoding import drafter_for, require_memory_for_decoding
from ..tokenizer import TextTokenizer
from .config import DecodingConfig
from .decode import decode
from .records import RecordLog, by_system, fingerprint, prompt_spans
from .shards import Shard

Item = TypeVar("Item")
Loader = Callable[..., tuple[Network, TextTokenizer]]  # called as :func:`~asarm.loading.load` is


@dataclass(frozen=True)
class EvaluatedModel:
    """A model under evaluation; ``prefix`` stands before the sampler in the names of its results, empty for the run's
    own model."""

    prefix: str
    model: Network
    tokenizer: TextTokenizer
    samplers: dict[str, SamplerConfig]

    def without_special_tokens(self) -> "EvaluatedModel":
        """The same, with the vocabulary's special tokens never drawn: a gap is filled with text."""
        samplers = {name: without_special_tokens(s, self.tokenizer) for name, s in self.samplers.items()}
        return replace(self, samplers=samplers)


class EvalRun:
    """The output folder of an evaluation, opened: refuses one that holds another run, knows what is recorded."""

    def __init__(self, config: DecodingConfig):
        self.config = config
        self.folder = prepare_output_dir(config.output_dir)
        self.shard = Shard.of(config.shard)
        self.defaults = asdict(type(config)())
        self.log = RecordLog(self.folder, asdict(config), self.shard, defaults=self.defaults)
        self.phases = [self.log]
        self.provenance = provenance()
        self.expected: dict[str, list[int]] = {}  # indices by system, of all shards

    def models(self, loader: Loader | None = None) -> Iterator[EvaluatedModel]:
        """The run's model, then each baseline, loaded (by ``loader``, if it is given) one at a time.

        A baseline uses the tokenizer that the run names, or its own, and those of the run's samplers that it has a
        draft head for.
        """
        config = self.config
        models = [("", config.model, config.revision, config.draft_head)]
        for baseline in config.baselines:
            models.append((f"{baseline} ", *name_and_revision(baseline), None))
        for prefix, name, revision, head in models:
            settings = {"dtype": config.dtype, "draft_head": head} | config.tokenizer_settings
            model, tokenizer = (loader or load)(name, revision, **settings)
            self.log.identify(f"{prefix}model", {"weights": model.fingerprint()})
            names = config.samplers or all_samplers(model)
            if prefix:
                has = all_samplers(model)
                names = [name for name in names if form_of(name) in has]
            yield EvaluatedModel(prefix, model, tokenizer, {name: config.sampler_config(name) for name in names})

    def todo(self, system: str, items: list[Item]) -> list[Item]:
        """This process's share of what nobody has recorded; ``items`` have an ``index``, and are all of the system's,
        in every process."""
        self.log.identify(f"{system} items", {"items": fingerprint(items)})
        self.expected[system] = [item.index for item in items]
        return [item for item in self.shard.take(items) if (system, item.index) not in self.log.records]

    def add(self, system: str, index: int, measures: dict) -> None:
        self.log.add({"sampler": system, "index": index, **measures})

    def ready(self, evaluated: EvaluatedModel, tasks: list[InfillTask]) -> dict[str, list[InfillTask]]:
        """For each of the model's samplers, what is left to do; raises for a folder that holds other tasks, a missing
        draft head and too little memory, before anything is drawn."""
        batch_size, length = min(self.config.batch_size, len(tasks)), max(len(task.ids) for task in tasks)
        n_visible = max(sum(task.visible) for task in tasks)
        for sampler in evaluated.samplers.values():
            if drafter := drafter_for(evaluated.model, sampler):
                head = {"weights": drafter.head.fingerprint()}
                self.log.identify(f"{evaluated.prefix}draft head", head)
            require_memory_for_decoding(evaluated.model, sampler, batch_size, length, n_visible)
        return {name: self.todo(evaluated.prefix + name, tasks) for name in evaluated.samplers}

    def decode(
        self, evaluated: EvaluatedModel, tasks: list[InfillTask], describe: Callable[[InfillTask, list[int]], dict]
    ) -> None:
        """Decode what is left to do with each of the model's samplers, and record it: costs, which positions were given
        (``prompt``), all ``ids``, and what ``describe`` says of them."""
        todo = self.ready(evaluated, tasks)
        bar = tqdm(total=len(self.shard.take(tasks)) * len(todo), unit="seq", desc=f"{evaluated.prefix}decode")
        bar.update(bar.total - sum(map(len, todo.values())))
        for name, left in todo.items():
            bar.set_postfix_str(name)
            sampler, seed, batch_size = evaluated.samplers[name], self.config.seed, self.config.batch_size
            for task, ids, measures in decode(evaluated.model, left, sampler, seed, batch_size):
                sequence = {"prompt": prompt_spans(task.visible), "ids": ids}
                self.add(evaluated.prefix + name, task.index, {**measures, **sequence, **describe(task, ids)})
                bar.update()
        bar.close()

    def second_phase(self, stem: str, identity: dict) -> RecordLog:
        """Records of a phase that works on the first's, a line for each of them, in ``STEM.jsonl``."""
        log = RecordLog(self.folder, asdict(self.config), self.shard, stem, self.defaults)
        log.identify(stem, identity)
        self.phases.append(log)
        return log

    def own_records(self) -> list[dict]:
        """Those of the first phase that are this process's share, all of them recorded."""
        return [
            self.log.records[system, index]
            for system, indices in self.expected.items()
            for index in self.shard.take(indices)
        ]

    def finish(self, summarise: Callable[[dict[str, list[dict]]], dict]) -> dict:
        """What ``summary.json`` holds, with what ``summarise`` makes of each system's records (those of all phases
        joined), if all are there; else how many are. Only a complete run has a summary."""
        keys = [(system, index) for system, indices in self.expected.items() for index in indices]
        recorded = 0
        for phase in self.phases:
            phase.reload()
            recorded += sum(key in phase.records for key in keys)
        expected = len(keys) * len(self.phases)
        state = {"complete": recorded == expected, "recorded": recorded, "expected": expected}
        origin = {"config": asdict(self.config), "provenance": self.provenance}
        if not state["complete"]:
            return state | origin
        for phase in self.phases:
            phase.merge(keys)
        records = by_system(*(phase.records for phase in self.phases))
        summary = state | summarise(records) | origin
        write_json(self.folder / "summary.json", summary)
        return summary


def all_samplers(model: Network) -> list[str]:
    """Every sampler that the model has what it takes for."""
    return [name for name, sampler in SAMPLERS.items() if sampler.drafts != "head" or drafter_of(model) is not None]
