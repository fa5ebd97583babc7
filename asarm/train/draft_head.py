"""Training a draft head: windows of consecutive ranks, against the trunk's own exact conditionals.

One call of the trunk holds, for every rank of a window, a query row with the limit that a round would give it (the
state that the head starts from) and one with its own rank as limit (the teacher). The trunk stays as it is. The loss
fades from KL(teacher, draft) to their total variation, which is the probability that a draft is rejected (Leviathan et
al. 2023, arXiv 2211.17192).
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.packing import pack_all
from ..data.rows import open_rows
from ..data.sources import read_documents
from ..density import query_states
from ..draft_head import FOLDER, DraftHead, distance_to_previous, previous_ids
from ..errors import DataFileError
from ..law import Law
from ..loading import RECIPE, load
from ..memory import call_bytes, require_memory
from ..network import Network
from ..orders import Order, Rows, random_visible, rows_with_limit
from ..rng import generator
from ..tokenizer import TextTokenizer
from .checkpoint import Checkpoints
from .config import MaskingConfig, ObjectiveConfig
from .head_config import HeldOutConfig, TrainHeadConfig, WindowConfig
from .logs import HELD_OUT, TrainingLogs, settings_as_yaml
from .objective import Batch, make_batch
from .schedule import masking_range
from .start import CHECKPOINTS, FINAL, require_room, start
from .trainer import Trainer

NEVER = -1e4  # a banned token's logit: probability zero, and differences of log-probabilities stay finite


@dataclass(frozen=True)
class Windows:
    """Windows of a batch as rows of their own (X = B W): what the head is given, the teacher's logits, and which
    ranks are there to predict."""

    states_XKE: torch.Tensor
    base_logits_XKV: torch.Tensor
    teacher_logits_XKV: torch.Tensor
    previous_ids_XK: torch.Tensor
    distance_XK: torch.Tensor
    missing_XK: torch.Tensor
    valid_XK: torch.Tensor

    @property
    def learnt_XK(self) -> torch.Tensor:
        """Where the state misses a token: elsewhere the draft is exact."""
        return self.valid_XK & (self.missing_XK > 0)

    def draft_logits(self, head: DraftHead) -> torch.Tensor:
        return head(self.states_XKE, self.base_logits_XKV, self.previous_ids_XK, self.distance_XK, self.missing_XK)


def window_rows(order: Order, uniform_BW: torch.Tensor, k: int) -> Rows:
    """The query rows [B, W k] of windows at random settled counts n, all of a window with the limit n.

    Even windows hold the ranks n .. n+k-1 (two passes a round: the state has seen the token before the window), odd
    ones n+1 .. n+k (one pass a round: it has not).
    """
    settled_BW = order.n_visible_B[:, None] + (uniform_BW * order.n_masked_B[:, None]).long()
    first_W = torch.arange(uniform_BW.shape[1], device=uniform_BW.device) % 2
    rank_BWK = (settled_BW + first_W)[..., None] + torch.arange(k, device=uniform_BW.device)
    limit_BWK = settled_BW[..., None].expand_as(rank_BWK)
    return rows_with_limit(order, rank_BWK.flatten(1), limit_BWK.flatten(1), order.length_B)


@torch.no_grad()
def make_windows(model: Network, ids_BN: torch.Tensor, order: Order, uniform_BW: torch.Tensor, k: int) -> Windows:
    """One call of the trunk: a state and a teacher for every rank of every window."""
    draft = window_rows(order, uniform_BW, k)
    teacher = rows_with_limit(order, draft.rank_BR, draft.rank_BR, order.length_B)
    hidden_BQE = query_states(model, ids_BN, order, draft.followed_by(teacher))
    states_XKE, teacher_XKE = (h.unflatten(1, (-1, k)).flatten(0, 1) for h in hidden_BQE.chunk(2, dim=1))
    missing_BQ = (draft.rank_BR - draft.limit_BR).where(draft.valid_BR, 0)
    return Windows(
        states_XKE,
        model.logits(states_XKE),
        model.logits(teacher_XKE),
        previous_ids(ids_BN, order, draft.rank_BR, model.mask_token_id).view(-1, k),
        distance_to_previous(order, draft.rank_BR).view(-1, k),
        missing_BQ.view(-1, k),
        draft.valid_BR.view(-1, k),
    )


def divergences(
    teacher_logits: torch.Tensor, draft_logits: torch.Tensor, banned_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher, draft) and total variation of the laws of logits [..., V] at temperature 1 in float32, each [...]."""
    banned = torch.tensor([banned_id], device=draft_logits.device)
    teacher_logp, draft_logp = (
        logits.float().index_fill(-1, banned, NEVER).log_softmax(-1) for logits in (teacher_logits, draft_logits)
    )
    teacher = teacher_logp.exp()
    kl = (teacher * (teacher_logp - draft_logp)).sum(-1)
    return kl, (teacher - draft_logp.exp()).abs().sum(-1) / 2


def n_learnt(rows: Rows) -> int:
    """The number of drafted ranks that a loss on these windows counts."""
    return int((rows.valid_BR & (rows.rank_BR > rows.limit_BR)).sum())


def head_losses(
    model: Network,
    head: torch.nn.Module,
    ids_BN: torch.Tensor,
    order: Order,
    uniform_BW: torch.Tensor,
    step: int,
    windows: WindowConfig,
) -> dict[str, torch.Tensor]:
    """Sums over the drafted ranks of KL(teacher, draft), of their total variation, and of the loss between the two."""
    made = make_windows(model, ids_BN, order, uniform_BW, windows.k)
    kl_XK, tv_XK = divergences(made.teacher_logits_XKV, made.draft_logits(head), model.mask_token_id)
    kl, tv = kl_XK[made.learnt_XK].sum(), tv_XK[made.learnt_XK].sum()
    kl_weight = max(0.0, 1 - step / windows.kl_steps)
    return {"loss": kl_weight * kl + (1 - kl_weight) * tv, "kl": kl, "total_variation": tv}


@torch.no_grad()
def acceptance_by_index(
    model: Network,
    head: DraftHead,
    rows: list[np.ndarray],
    masked_fraction: float,
    windows: WindowConfig,
    seed: int,
    batch_size: int,
) -> dict[str, list[float]]:
    """Mean probability that a draft, judged by itself, is accepted, given that those before it were, by index in its
    window, for both kinds of window; float32 networks, the law that samples are drawn from."""
    law, k = Law(banned_ids=(model.mask_token_id,)), windows.k
    rngs = [generator(seed, "held-out", index) for index in range(len(rows))]
    ids_BN = torch.from_numpy(np.stack(rows)).long()
    visible_BN = torch.stack([random_visible(ids_BN.shape[1], 1 - masked_fraction, rng) for rng in rngs])
    uniform_BW = torch.from_numpy(np.stack([rng.random(windows.per_row) for rng in rngs]))
    accepted, valid = [], []
    for ids_PN, visible_PN, uniform_PW in _parts(batch_size, model.device, ids_BN, visible_BN, uniform_BW):
        made = make_windows(model, ids_PN, Order.from_visible(visible_PN), uniform_PW, k)
        draft_XKV, target_XKV = law.probs(made.draft_logits(head)), law.probs(made.teacher_logits_XKV)
        accepted.append(torch.minimum(draft_XKV, target_XKV).sum(-1).where(made.valid_XK, 0).cpu())
        valid.append(made.valid_XK.cpu())
    sum_2K, n_2K = (torch.cat(x).view(len(rows), -1, k) for x in (accepted, valid))
    return {
        kind: (sum_2K[:, which::2].sum((0, 1)) / n_2K[:, which::2].sum((0, 1)).clamp(min=1)).tolist()
        for which, kind in enumerate(("two_pass", "one_pass"))
    }


def _parts(size: int, device: torch.device, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(x.to(device).split(size) for x in tensors), strict=True)


def held_out_rows(config: HeldOutConfig, tokenizer: TextTokenizer, length: int) -> list[np.ndarray]:
    """The first rows of the held-out file, none where no file is named; raises :class:`DataFileError` for a file
    without a whole row."""
    if config.file is None:
        return []
    packed = pack_all(read_documents(config.file), tokenizer, length, config.rows)
    rows = [row for row in packed if len(row) == length]  # only a file's last row can be shorter
    if not rows:
        raise DataFileError(f"held_out.file {config.file!r} has less than one row of {length} tokens; give more text")
    return rows


def require_memory_for_head(model: Network, rows_per_pass: int, max_length: int, windows: WindowConfig) -> None:
    """Raise :class:`~asarm.errors.MemoryBudgetError` where a pass would not fit."""
    n_query = 2 * windows.per_row * windows.k
    need = call_bytes(model, rows_per_pass, max_length, max_length + n_query, rows_per_pass * n_query)
    require_memory(model, rows_per_pass, max_length, need)


@dataclass(frozen=True)
class HeadSteps:
    """The gradients of the steps in which a head is trained for ``model``."""

    trainer: Trainer
    model: Network
    masking: MaskingConfig
    windows: WindowConfig
    seed: int

    def __call__(self, step: int, rows_BN: np.ndarray, indices: list[int]) -> dict[str, float]:
        """Leave the gradient of a step's loss behind, of which the rows are this process's share; what is logged."""
        trainer, settings, windows = self.trainer, self.trainer.settings, self.windows
        device, size = trainer.accelerator.device, settings.rows_per_pass
        batch = make_batch(rows_BN, indices, step, settings.rows_per_step, self.masking, ObjectiveConfig(), self.seed)
        batch = batch.to(device)
        drawn = [generator(self.seed, "windows", i).random(windows.per_row) for i in batch.index_B.tolist()]
        uniform_BW = torch.from_numpy(np.stack(drawn)).to(device)
        (counted,) = trainer.sum_over_processes(n_learnt(window_rows(batch.order, uniform_BW, windows.k)))

        def losses(part: tuple[Batch, torch.Tensor]) -> dict[str, torch.Tensor]:
            rows, uniform_PW = part
            sums = head_losses(self.model, trainer.wrapped, rows.ids_BN, rows.order, uniform_PW, step, windows)
            return {key: value / max(counted, 1) for key, value in sums.items()}

        measured = trainer.accumulate(zip(batch.parts(size), uniform_BW.split(size), strict=True), losses)
        low, high = masking_range(step, self.masking)
        return measured | {"masking_low": low, "masking_high": high}


@dataclass(frozen=True)
class AcceptanceSteps:
    """The steps after which a head in training is measured on held-out rows; before the first one, the self draft."""

    trainer: Trainer
    model: Network
    untrained: DraftHead
    rows: list[np.ndarray]
    held_out: HeldOutConfig
    windows: WindowConfig
    seed: int
    logs: TrainingLogs

    def __call__(self, done: int) -> None:
        settings = self.trainer.settings
        if not self.rows or (done % self.held_out.every and done != settings.steps):
            return
        if self.trainer.accelerator.is_main_process:
            head = self.trainer.result if done else self.untrained
            for fraction in self.held_out.masked_fractions:
                arguments = (fraction, self.windows, self.seed, settings.rows_per_pass)
                measured = acceptance_by_index(self.model, head, self.rows, *arguments)
                self.logs.record(HELD_OUT, done, {"masked_fraction": fraction} | measured)
        self.trainer.accelerator.wait_for_everyone()


def train_draft_head(config: TrainHeadConfig) -> Path:
    """Run (or, with ``resume``, go on with) a training run; returns the folder that holds ``draft_head/``."""
    run = start(config)
    config, accelerator, seed = run.config, run.accelerator, config.seed
    data, optimizer, windows = config.data, config.optimizer, config.windows
    stored = {"whitespace_map": config.whitespace_map, "document_end": config.document_end}
    model, tokenizer = load(config.model, config.revision, config.tokenizer, **stored)
    model.to(accelerator.device).requires_grad_(False)
    require_memory_for_head(model, optimizer.rows_per_pass, data.max_length, windows)
    torch.manual_seed(seed)
    head = DraftHead.for_trunk(model, **asdict(config.head)).train()
    untrained = copy.deepcopy(head).eval()
    if config.start_from is not None:
        head.start_from(config.start_from)
    require_room(run.folder, head, optimizer.ema_decay is not None, config.keep_checkpoints)
    held_out = held_out_rows(config.held_out, tokenizer, data.max_length)
    rows = open_rows(data, tokenizer, seed, accelerator.process_index, accelerator.num_processes)
    trainer = Trainer(head, rows, optimizer, seed, accelerator, run.checkpoint)
    settings, keep = run.settings, config.keep_checkpoints

    def describe(folder: Path) -> None:
        head.config.save_pretrained(folder / FOLDER)
        (folder / FOLDER / RECIPE).write_text(settings_as_yaml(settings), encoding="utf-8")

    logs = TrainingLogs(run.folder, accelerator, settings, trainer.first_step, config.log_every, config.wandb)
    checkpoints = Checkpoints(run.folder / CHECKPOINTS, config.checkpoint_every, keep, settings, describe)
    measure = AcceptanceSteps(trainer, model, untrained, held_out, config.held_out, windows, seed, logs)
    if trainer.first_step == 0:
        measure(0)
    trainer.run(HeadSteps(trainer, model, config.masking, windows, seed), measure, logs, checkpoints)
    return trainer.finish(run.folder / FINAL, lambda final: trainer.result.eval().save_pretrained(final))
