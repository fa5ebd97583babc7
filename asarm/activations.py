"""Activations by the names that Hugging Face's configurations use."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .config import require

PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}


def activation_of(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function; raises :class:`~asarm.errors.ConfigError` for an unknown ``name``."""
    if name in PLAIN:
        return PLAIN[name]
    from transformers.activations import ACT2FN  # imports PyTorch's compiler: a second

    require(name in ACT2FN, "ff_activation", name, f"one of {', '.join(ACT2FN)}")
    return ACT2FN[name]
