"""Keys and values in slots by rank.

A token's keys and values are written at its rank in the decoding order, so that what a row may see is always a prefix
of the slots: attention need not read further than the furthest limit of a call. Nothing is ever rolled back: a
rejected draft's slot is reached by no limit until its rank is settled, and then it is overwritten. Slot N is scratch
space for the rows that only fill a ragged batch; attention never reads it.

The cache is exact, because a token's content row depends only on the prompt and on tokens of lower rank, which never
change once settled.
"""

import torch
from transformers import PreTrainedConfig


class SlotCache:
    """Preallocated slots for ``batch`` sequences of ``length`` positions, for every layer; and the relative-position
    keys of that length, [L, H, 2N, D]."""

    def __init__(self, config: PreTrainedConfig, batch: int, length: int, relative_LHPD: torch.Tensor):
        shape = (config.n_layer, batch, 2, config.n_head, length + 1, config.d_head)
        self.key_value_LB2HSD = relative_LHPD.new_zeros(shape)
        self.every_B = torch.arange(batch, device=relative_LHPD.device)
        self.length, self.relative_LHPD = length, relative_LHPD

    def write(self, layer: int, sequence_B: torch.Tensor, rank_BC: torch.Tensor, key_value_BC2HD: torch.Tensor) -> None:
        """Store the content rows of the sequences ``sequence_B`` at their ranks."""
        by_slot_BS2HD = self.key_value_LB2HSD[layer].permute(0, 3, 1, 2, 4)
        by_slot_BS2HD[sequence_B[:, None], rank_BC] = key_value_BC2HD

    def read(self, layer: int, sequence_B: torch.Tensor, n_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, S, D] of the sequences' first ``n_slots`` slots: views where all are asked for."""
        every = sequence_B is self.every_B
        key_value_B2HSD = self.key_value_LB2HSD[layer] if every else self.key_value_LB2HSD[layer, sequence_B]
        key_BHSD, value_BHSD = key_value_B2HSD[:, :, :, :n_slots].unbind(1)
        return key_BHSD, value_BHSD
