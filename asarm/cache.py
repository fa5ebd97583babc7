"""Keys and values in slots by position.

A token's keys and values are written at its position. Nothing is ever rolled back: a rejected draft's slot has a rank
that no limit reaches until the position is settled, and then it is overwritten. Slot N is scratch space for the rows
that only fill a ragged batch; attention never reads it.

The cache is exact, because a token's content row depends only on the prompt and on tokens of lower rank, which never
change once settled.
"""

import torch


class SlotCache:
    """Preallocated slots for ``batch`` sequences of ``length`` positions, for every layer of ``model``.

    Also holds each layer's relative-position keys, which depend on the length alone.
    """

    def __init__(self, model, batch: int, length: int):
        config = model.config
        shape = (config.n_layer, batch, config.n_head, length + 1, config.d_head)
        self.key_LBHSD = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.value_LBHSD = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.relative_key_LHPD = model.relative_keys(length)
        self.length = length

    def write(self, layer: int, position_BC: torch.Tensor, key_BHCD: torch.Tensor, value_BHCD: torch.Tensor):
        """Store content rows at their positions and return all N slots of the layer."""
        index_BHCD = position_BC[:, None, :, None].expand_as(key_BHCD)
        self.key_LBHSD[layer].scatter_(2, index_BHCD, key_BHCD.to(self.key_LBHSD.dtype))
        self.value_LBHSD[layer].scatter_(2, index_BHCD, value_BHCD.to(self.value_LBHSD.dtype))
        return self.key_LBHSD[layer, :, :, : self.length], self.value_LBHSD[layer, :, :, : self.length]
