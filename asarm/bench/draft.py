"""What a round's draft steps take with a draft head, for three ways to reach the vocabulary."""

import torch

from ..draft_head import DraftHead
from ..drafter import Drafter, Window
from ..engine import Projection, can_pack
from ..law import Law, argmin, exponential_noise
from ..network import Network
from .clock import as_decoded, median_seconds

FREQUENT = 8192  # tokens of a frequency-ranked draft vocabulary


@torch.no_grad()
def ways_to_draft(model: Network) -> dict[str, tuple[Drafter, int]]:
    """Drafters of ``model`` with the size of their vocabulary.

    ``low_rank``: a correction of rank 128 to the trunk's logits, as the head does it. ``full``: a correction of full
    rank, which reads as much as the trunk's vocabulary projection. ``frequent``: the same onto the 8,192 tokens that a
    frequency-ranked draft vocabulary would hold.
    """
    c = model.config
    low_rank, full = (
        Drafter(DraftHead.for_trunk(model, rank=rank).to(model.dtype).eval())
        for rank in (min(128, c.d_model), c.d_model)
    )
    frequent = Drafter(full.head)
    weight_VE = full.head.vocabulary.weight.detach()[:FREQUENT]
    frequent.vocabulary = Projection(weight_VE, None, None, can_pack(model.device, model.dtype))
    return {
        "low_rank": (low_rank, c.vocab_size),
        "full": (full, c.vocab_size),
        "frequent": (frequent, min(FREQUENT, c.vocab_size)),
    }


@torch.no_grad()
def draft_step_seconds(
    model: Network, ways: dict[str, tuple[Drafter, int]], k: int, batch_size: int
) -> dict[str, float]:
    """Seconds for the k steps of a round in each of the ``ways``, distributions and draws included."""
    c, device, dtype = model.config, model.device, model.dtype
    generator = torch.Generator().manual_seed(0)
    states_BKE = torch.randn(batch_size, k, c.d_model, generator=generator).to(device, dtype)
    uniform_BK = torch.rand(batch_size, k, generator=generator, dtype=torch.float64).to(device)
    distance_BK = torch.ones(batch_size, k, dtype=torch.long, device=device)
    base_logits_BKV, window = model.logits(states_BKE), Window(states_BKE, distance_BK, n_missing=0)

    def seconds(drafter: Drafter, vocab_size: int) -> float:
        law = Law(banned_ids=(model.mask_token_id,))

        def steps() -> None:
            token_B = torch.zeros(batch_size, dtype=torch.long, device=device)
            nothing_BC = token_B.new_empty(batch_size, 0)
            started = drafter.begin(window, base_logits_BKV[..., :vocab_size], first_B=token_B, known_ids_BC=nothing_BC)
            noise_BKX = exponential_noise(uniform_BK, vocab_size)
            for j in range(k):
                token_B = argmin(law.probs(started.step(j, token_B)), noise_BKX[:, j])

        return median_seconds(as_decoded(steps, device), device, repeats=9)

    return {name: seconds(*way) for name, way in ways.items()}
