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
from ..draft_head import DraftHead, distance_to_previous, previous_ids
from ..errors import DataFileError
from ..law import Law
from ..loading import load
from ..memory import call_bytes, require_memory
from ..network import Network
from ..orders import Order, Rows, random_visible, rows_with_limit
from ..rng import generator
from ..tokenizer import TextTokenizer
from .config import ObjectiveConfig
from .head_config import HeldOutConfig, TrainHeadConfig, WindowConfig
from .objective import Batch, make_batch
from .start import require_room, start
from .trainer import HELD_OUT, Trainer

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
    model: Network, head: DraftHead, rows: list[np.ndarray], masked_fraction: float, config: TrainHeadConfig
) -> dict[str, list[float]]:
    """Mean probability that a draft, judged by itself, is accepted, given that those before it were, by index in its
    window, for both kinds of window; float32 networks, the law that samples are drawn from."""
    law, k = Law(banned_ids=(model.mask_token_id,)), config.windows.k
    rngs = [generator(config.seed, "held-out", index) for index in range(len(rows))]
    ids_BN = torch.from_numpy(np.stack(rows)).long()
    visible_BN = torch.stack([random_visible(ids_BN.shape[1], 1 - masked_fraction, rng) for rng in rngs])
    uniform_BW = torch.from_numpy(np.stack([rng.random(config.windows.per_row) for rng in rngs]))
    accepted, valid = [], []
    for ids_PN, visible_PN, uniform_PW in _parts(
        config.optimizer.rows_per_pass, model.device, ids_BN, visible_BN, uniform_BW
    ):
        windows = make_windows(model, ids_PN, Order.from_visible(visible_PN), uniform_PW, k)
        draft_XKV, target_XKV = law.probs(windows.draft_logits(head)), law.probs(windows.teacher_logits_XKV)
        accepted.append(torch.minimum(draft_XKV, target_XKV).sum(-1).where(windows.valid_XK, 0).cpu())
        valid.append(windows.valid_XK.cpu())
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
    packed = pack_all(read_documents(config.file), tokenizer, length)[: config.rows]
    rows = [row for row in packed if len(row) == length]  # only a file's last row can be shorter
    if not rows:
        raise DataFileError(f"held_out.file {config.file!r} has less than one row of {length} tokens; give more text")
    return rows


def require_memory_for_head(model: Network, config: TrainHeadConfig) -> None:
    """Raise :class:`~asarm.errors.MemoryBudgetError` where a pass would not fit."""
    batch, length = config.optimizer.rows_per_pass, config.data.max_length
    n_query = 2 * config.windows.per_row * config.windows.k
    require_memory(model, batch, length, call_bytes(model, batch, length, length + n_query, batch * n_query))


def train_draft_head(config: TrainHeadConfig) -> Path:
    """Run (or, with ``resume``, go on with) a training run; returns the folder that holds ``draft_head/``."""
    run = start(config)
    config, accelerator = run.config, run.accelerator
    model, tokenizer = load(config.model, config.revision, config.tokenizer, whitespace_map=config.whitespace_map)
    model.to(accelerator.device).requires_grad_(False)
    require_memory_for_head(model, config)
    torch.manual_seed(config.seed)
    head = DraftHead.for_trunk(model, **asdict(config.head)).train()
    self_draft = copy.deepcopy(head).eval()
    if config.start_from is not None:
        head.start_from(config.start_from)
    require_room(run, head)
    held_out = held_out_rows(config.held_out, tokenizer, config.data.max_length)
    rows = open_rows(config.data, tokenizer, config.seed, accelerator.process_index, accelerator.num_processes)
    trainer = Trainer(run, head, rows)
    o, k, per_row = config.optimizer, config.windows.k, config.windows.per_row

    def compute(step: int, rows_and_indices: tuple) -> dict[str, float]:
        arguments = (step, o.rows_per_step, config.masking, ObjectiveConfig(), config.seed)
        batch = make_batch(*rows_and_indices, *arguments).to(accelerator.device)
        uniform = np.stack([generator(config.seed, "windows", i).random(per_row) for i in batch.index_B.tolist()])
        uniform_BW = torch.from_numpy(uniform).to(accelerator.device)
        counted = torch.tensor(n_learnt(window_rows(batch.order, uniform_BW, k)), device=accelerator.device)
        n_global = accelerator.reduce(counted, "sum").clamp(min=1)

        def losses(part: tuple[Batch, torch.Tensor]) -> dict[str, torch.Tensor]:
            rows, uniform_PW = part
            sums = head_losses(model, trainer.wrapped, rows.ids_BN, rows.order, uniform_PW, step, config.windows)
            return {key: value / n_global for key, value in sums.items()}

        parts = zip(batch.parts(o.rows_per_pass), uniform_BW.split(o.rows_per_pass), strict=True)
        return trainer.accumulate(parts, losses)

    def measure(done: int) -> None:
        if not held_out or (done % config.held_out.every and done != o.steps):
            return
        if accelerator.is_main_process:
            measured_head = trainer.trained if done else self_draft
            for fraction in config.held_out.masked_fractions:
                measured = acceptance_by_index(model, measured_head, held_out, fraction, config)
                trainer.record(HELD_OUT, done, {"masked_fraction": fraction} | measured)
        accelerator.wait_for_everyone()

    if trainer.start == 0:
        measure(0)
    trainer.run(compute, measure)
    return trainer.finish(lambda final: trainer.trained.eval().save_pretrained(final))
