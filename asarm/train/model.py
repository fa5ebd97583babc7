"""The training run: a model, its rows and its loss in a :class:`~asarm.train.trainer.Trainer`."""

from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import XLNetConfig

from ..data.rows import open_rows
from ..errors import ConfigError
from ..loading import check_vocabulary, load_tokenizer
from ..memory import require_memory, training_bytes
from ..model import AnySubsetLM
from .config import TrainConfig
from .objective import Batch, Objective, make_batch
from .start import require_room, start
from .trainer import VALIDATION, Trainer
from .validation import Validation, copy_with


def build_model(config: TrainConfig, vocab_size: int) -> AnySubsetLM:
    """The model to start from: a checkpoint, or random weights by ``architecture``, seeded."""
    torch.manual_seed(config.seed)
    if config.model is not None:
        model = AnySubsetLM.from_pretrained(config.model, revision=config.revision)
    else:
        known = {f.name for f in fields(XLNetConfig)}
        if unknown := sorted(set(config.architecture) - known):
            raise ConfigError(f"architecture: {unknown} are no fields of XLNetConfig; it has {sorted(known)}")
        try:
            model = AnySubsetLM(XLNetConfig(**{"vocab_size": vocab_size, "mem_len": None, **config.architecture}))
        except StrictDataclassError as error:
            raise ConfigError(f"architecture {config.architecture}: {error}") from error
    model.recompute = config.gradient_checkpointing
    if config.compile:
        model.compile_layers()
    return model


def require_memory_for_training(model: AnySubsetLM, config: TrainConfig, n_shards: int) -> None:
    """Raise :class:`~asarm.errors.MemoryBudgetError` where a pass would not fit."""
    batch, length = config.optimizer.rows_per_pass, config.data.max_length
    masked = max(config.masking.start_high, config.masking.final_high)
    need = training_bytes(model, batch, length, masked, n_shards)
    remedy = "a smaller optimizer.rows_per_pass, gradient_checkpointing or a smaller data.max_length needs less"
    require_memory(model, batch, length, need, remedy)


def train(config: TrainConfig) -> Path:
    """Run (or, with ``resume``, go on with) a training run; returns the folder of the final checkpoint."""
    run = start(config)
    config, accelerator = run.config, run.accelerator
    tokenizer = load_tokenizer(
        config.model, config.revision, config.tokenizer, config.whitespace_map, config.document_end
    )
    length, o = config.data.max_length, config.optimizer
    validation = Validation(config.validation, tokenizer, length)
    model = build_model(config, len(tokenizer))
    check_vocabulary(model, tokenizer)
    model.to(accelerator.device)
    sharded = config.fsdp and accelerator.num_processes > 1  # one process has nobody to deal anything out to
    require_memory_for_training(model, config, accelerator.num_processes if sharded else 1)
    require_room(run, model)
    rows = open_rows(config.data, tokenizer, config.seed, accelerator.process_index, accelerator.num_processes)
    objective = Objective(model, config.objective)
    trainer = Trainer(run, objective, rows, model.transformer.layer if sharded else None)

    def weights() -> dict[str, torch.Tensor]:
        return {name.removeprefix("model."): x for name, x in trainer.state_dict().items()}

    def compute(step: int, rows_and_indices: tuple) -> dict[str, float]:
        arguments = (step, o.rows_per_step, config.masking, config.objective, config.seed)
        batch = make_batch(*rows_and_indices, *arguments).to(accelerator.device)
        n_targets = accelerator.reduce(torch.tensor(batch.n_targets, device=accelerator.device), "sum")

        def losses(part: Batch) -> dict[str, torch.Tensor]:
            return {"loss": trainer.wrapped(part) / n_targets}

        return trainer.accumulate(batch.parts(o.rows_per_pass), losses)

    def validate(done: int) -> None:
        if not validation.due(done, done == o.steps):
            return
        whole = weights()
        if accelerator.is_main_process:
            copy = copy_with(model, whole, accelerator.device)
            trainer.record(VALIDATION, done, validation.measure(copy))
        accelerator.wait_for_everyone()

    trainer.run(compute, validate)
    whole = weights()

    def write(final: Path) -> None:
        copy_with(model, whole, torch.device("cpu")).save_pretrained(final)
        tokenizer.save_pretrained(final, length)

    return trainer.finish(write)
