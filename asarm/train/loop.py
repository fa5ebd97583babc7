"""The training loop: rows, joint loss, AdamW, metrics, checkpoints. A draft head is trained with the same steps."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import XLNetConfig

from ..config import TrainConfig
from ..data.packing import PackedRows
from ..data.sources import read_documents
from ..errors import ConfigError, OutputDirError
from ..loading import check_vocabulary, load_tokenizer
from ..memory import require_memory, training_bytes
from ..model import AnySubsetLM
from ..runlog import append_line, prepare_output_dir, provenance, read_lines, write_atomic, write_json
from .checkpoint import checkpoints, load_newest, save_checkpoint
from .head_config import TrainHeadConfig
from .objective import accumulate_gradients, step_batch
from .schedule import lr_factor, masking_range

HELD_OUT_LOG = "held_out.jsonl"


def build_model(config: TrainConfig, vocab_size: int) -> AnySubsetLM:
    """The model to start from: a checkpoint, or random weights by ``architecture``, seeded."""
    torch.manual_seed(config.seed)  # weights and dropout
    if config.model is not None:
        return AnySubsetLM.from_pretrained(config.model, revision=config.revision)
    known = {f.name for f in fields(XLNetConfig)}
    if unknown := sorted(set(config.architecture) - known):
        raise ConfigError(f"architecture: {unknown} are no fields of XLNetConfig; it has {sorted(known)}")
    try:
        return AnySubsetLM(XLNetConfig(**{"vocab_size": vocab_size, "mem_len": None, **config.architecture}))
    except StrictDataclassError as error:
        raise ConfigError(f"architecture {config.architecture}: {error}") from error


def build_optimizer(model: torch.nn.Module, config: TrainConfig | TrainHeadConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    o = config.optimizer
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), fused=True)


def train(config: TrainConfig) -> Path:
    """Run (or, with ``resume``, go on with) a training run; returns the folder of the final checkpoint."""
    out = open_run(config)
    documents = [d for name in config.data.files for d in read_documents(name)]
    tokenizer = load_tokenizer(config.model, config.revision, config.tokenizer)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(config, len(tokenizer)).to(device).train()
    check_vocabulary(model, tokenizer)
    rows_per_pass, length = config.optimizer.rows_per_pass, config.data.max_length
    require_memory(model, rows_per_pass, length, training_bytes(model, rows_per_pass, length))
    optimizer = build_optimizer(model, config)
    start = restore(out, config, model, optimizer) if config.resume else 0
    rows = PackedRows(documents, tokenizer, config.data.max_length, config.seed, config.data.source_weights)

    def compute(step: int) -> dict:
        batch = step_batch(rows, step, config.optimizer.rows_per_step, config.masking, config.seed)
        low, high = masking_range(step, config.masking)
        loss = accumulate_gradients(model, batch, rows_per_pass, config.optimizer.precision)
        return {"loss": loss, "masking_low": low, "masking_high": high}

    begin_records(out, config, start)
    run_steps(config, out, model, optimizer, compute, start)
    final = out / "final"
    model.eval().save_pretrained(final)
    tokenizer.backend.save(str(final / "tokenizer.json"))
    return final


def open_run(config: TrainConfig | TrainHeadConfig) -> Path:
    """The output folder; one that holds a run already is refused unless the run is resumed."""
    out = prepare_output_dir(config.output_dir)
    if not config.resume and (checkpoints(out / "checkpoints") or (out / "final").exists()):
        raise OutputDirError(f"{out} already holds a run; go on with it with --resume, or choose another --output_dir")
    return out


def begin_records(out: Path, config: TrainConfig | TrainHeadConfig, start: int) -> None:
    """Write the settings and the provenance, and drop what was logged after ``start``: those steps are run again."""
    write_atomic(out / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
    write_json(out / "provenance.json", provenance() | {"first_step": start})
    for log in (out / "metrics.jsonl", out / HELD_OUT_LOG):
        if log.exists():
            kept = (record for record in read_lines(log) if start and record["step"] <= start)
            write_atomic(log, "".join(json.dumps(record) + "\n" for record in kept))


def restore(
    out: Path, config: TrainConfig | TrainHeadConfig, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load the newest checkpoint of the run, if any; returns the step to go on with."""
    state = load_newest(out / "checkpoints")
    if state is None:
        return 0
    free = {"resume", "output_dir", "num_threads", "checkpoint_every", "log_every"}
    now = asdict(config)
    changed = [key for key in now if key not in free and now[key] != state["config"][key]]
    if changed:
        raise ConfigError(
            f"{out} was trained with other settings of {', '.join(changed)}; restore them, "
            "or choose another --output_dir"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"]


def run_steps(
    config: TrainConfig | TrainHeadConfig,
    out: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    compute: Callable[[int], dict],
    start: int,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """The steps from ``start`` on: ``compute(step)`` leaves gradients behind and returns what is logged ("loss" and
    more); ``after(steps done)`` is called after each."""
    o = config.optimizer
    bar = tqdm(total=o.steps, initial=start, unit="step", desc="train", smoothing=0.05)
    clock, clock_step = time.perf_counter(), start
    for step in range(start, o.steps):
        lr = o.lr * lr_factor(step, o)
        for group in optimizer.param_groups:
            group["lr"] = lr
        measured = compute(step)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        done = step + 1
        if done % config.log_every == 0 or done == o.steps:
            seconds = time.perf_counter() - clock
            tokens_per_second = (done - clock_step) * o.rows_per_step * config.data.max_length / seconds
            record = {"step": done, "grad_norm": grad_norm, "lr": lr, "tokens_per_second": tokens_per_second}
            append_line(out / "metrics.jsonl", measured | record)
            bar.set_postfix(loss=f"{measured['loss']:.3f}", tok_s=f"{tokens_per_second:.0f}")
            clock, clock_step = time.perf_counter(), done
        after(done)
        if done % config.checkpoint_every == 0 or done == o.steps:
            save_checkpoint(out / "checkpoints", done, model, optimizer, asdict(config))
    bar.close()
