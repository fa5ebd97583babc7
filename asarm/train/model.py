"""The training run: a model, its rows and its loss in a :class:`~asarm.train.trainer.Trainer`."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import XLNetConfig

from ..data.rows import open_rows
from ..errors import ConfigError
from ..export import write_description, write_model
from ..loading import check_vocabulary, load_tokenizer
from ..memory import require_memory, training_bytes
from ..model import AnySubsetLM
from ..runlog import remove_folder, restore_folder
from ..tokenizer import TextTokenizer
from .checkpoint import Checkpoints
from .config import MaskingConfig, ObjectiveConfig, TrainConfig
from .logs import VALIDATION, TrainingLogs, settings_as_yaml
from .objective import Objective, make_batch
from .schedule import masking_range
from .start import BEST, CHECKPOINTS, FINAL, require_room, start
from .trainer import Trainer
from .validation import Validation, copy_with, keep_if_best


def build_model(
    name: str | None, revision: str, architecture: dict[str, int | float | str], vocab_size: int, seed: int
) -> AnySubsetLM:
    """The model to start from: a checkpoint, or random weights by ``architecture``, seeded."""
    torch.manual_seed(seed)
    if name is not None:
        return AnySubsetLM.from_pretrained(name, revision=revision)
    known = {f.name for f in fields(XLNetConfig)}
    if unknown := sorted(set(architecture) - known):
        raise ConfigError(f"architecture: {unknown} are no fields of XLNetConfig; it has {sorted(known)}")
    try:
        return AnySubsetLM(XLNetConfig(**{"vocab_size": vocab_size, "mem_len": None, **architecture}))
    except StrictDataclassError as error:
        raise ConfigError(f"architecture {architecture}: {error}") from error


def require_memory_for_training(
    model: AnySubsetLM, rows_per_pass: int, max_length: int, masking: MaskingConfig, n_shards: int
) -> None:
    """Raise :class:`~asarm.errors.MemoryBudgetError` where a pass would not fit."""
    masked = max(masking.start_high, masking.final_high)
    need = training_bytes(model, rows_per_pass, max_length, masked, n_shards)
    remedy = "a smaller optimizer.rows_per_pass, gradient_checkpointing or a smaller data.max_length needs less"
    require_memory(model, rows_per_pass, max_length, need, remedy)


@dataclass(frozen=True)
class TrainedModel:
    """A model that ``trainer`` trains, as folders: its weights are those of now."""

    trainer: Trainer
    model: AnySubsetLM
    tokenizer: TextTokenizer
    recipe: str

    def copy(self, device: torch.device) -> AnySubsetLM | None:
        """A model of its own with these weights, in the main process; every process has to ask."""
        weights = {name.removeprefix("model."): x for name, x in self.trainer.result_weights().items()}
        return copy_with(self.model, weights, device) if self.trainer.accelerator.is_main_process else None

    def describe(self, folder: Path) -> None:
        """Write what makes weights this model."""
        write_description(folder, self.model.config, self.tokenizer, self.recipe)

    def write(self, folder: Path, copy: AnySubsetLM) -> None:
        """Write the model with the weights of a copy."""
        write_model(folder, copy, self.tokenizer, self.recipe)


@dataclass(frozen=True)
class LossSteps:
    """The gradients of the steps in which a model is trained."""

    trainer: Trainer
    masking: MaskingConfig
    objective: ObjectiveConfig
    seed: int

    def __call__(self, step: int, rows_BN: np.ndarray, indices: list[int]) -> dict[str, float]:
        """Leave the gradient of a step's loss behind, of which the rows are this process's share; what is logged."""
        trainer, settings = self.trainer, self.trainer.settings
        batch = make_batch(rows_BN, indices, step, settings.rows_per_step, self.masking, self.objective, self.seed)
        (divisor,) = trainer.sum_over_processes(batch.divisor(self.objective.loss_average))
        parts = batch.to(trainer.accelerator.device).parts(settings.rows_per_pass)
        measured = trainer.accumulate(parts, lambda part: {"loss": trainer.wrapped(part) / divisor})
        low, high = masking_range(step, self.masking)
        return measured | {"masking_low": low, "masking_high": high}


@dataclass(frozen=True)
class ValidationSteps:
    """The steps after which a model in training is measured, and its weights are kept in ``best`` if no earlier ones
    were better."""

    validation: Validation
    trained: TrainedModel
    logs: TrainingLogs
    best: Path

    def begin(self, first_step: int) -> None:
        """Of a run that begins there is nothing to beat; of one that goes on, what there was."""
        restore_folder(self.best)
        if first_step == 0 and self.best.exists():
            remove_folder(self.best)

    def __call__(self, done: int) -> None:
        trainer = self.trained.trainer
        if not self.validation.due(done, done == trainer.settings.steps):
            return
        copy = self.trained.copy(trainer.accelerator.device)
        if copy is not None:
            measured, texts = self.validation.measure(copy)
            self.logs.record(VALIDATION, done, measured)
            self.logs.generations(done, texts)
            keep_if_best(self.best, done, measured, lambda folder: self.trained.write(folder, copy))
        trainer.accelerator.wait_for_everyone()


def train(config: TrainConfig) -> Path:
    """Run (or, with ``resume``, go on with) a training run; returns the folder of the final checkpoint."""
    run = start(config)
    config, accelerator, seed = run.config, run.accelerator, config.seed
    data, optimizer, n_processes = config.data, config.optimizer, run.accelerator.num_processes
    place = (config.model, config.revision)
    tokenizer = load_tokenizer(*place, config.tokenizer, config.whitespace_map, config.document_end)
    validation = Validation(config.validation, tokenizer, data.max_length)
    model = build_model(*place, config.architecture, len(tokenizer), seed)
    model.recompute = config.gradient_checkpointing
    if config.compile:
        model.compile_layers()
    check_vocabulary(model, tokenizer)
    model.to(accelerator.device)
    sharded = config.fsdp and n_processes > 1  # one process has nobody to deal anything out to
    n_shards, layers = (n_processes, model.transformer.layer) if sharded else (1, None)
    require_memory_for_training(model, optimizer.rows_per_pass, data.max_length, config.masking, n_shards)
    require_room(run.folder, model, optimizer.ema_decay is not None, config.keep_checkpoints)
    rows = open_rows(data, tokenizer, seed, accelerator.process_index, n_processes)
    trainer = Trainer(Objective(model, config.objective), rows, optimizer, seed, accelerator, run.checkpoint, layers)
    trained = TrainedModel(trainer, model, tokenizer, settings_as_yaml(run.settings))
    settings, keep = run.settings, config.keep_checkpoints
    logs = TrainingLogs(run.folder, accelerator, settings, trainer.first_step, config.log_every, config.wandb)
    checkpoints = Checkpoints(run.folder / CHECKPOINTS, config.checkpoint_every, keep, settings, trained.describe)
    after = ValidationSteps(validation, trained, logs, run.folder / BEST)
    if accelerator.is_main_process:
        after.begin(trainer.first_step)
    trainer.run(LossSteps(trainer, config.masking, config.objective, seed), after, logs, checkpoints)
    copy = trained.copy(torch.device("cpu"))
    return trainer.finish(run.folder / FINAL, lambda folder: trained.write(folder, copy))
