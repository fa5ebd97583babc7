"""Which number types a benchmark times on this machine."""

import sys

import torch

from ..engine import multiplies_bfloat16, warn_if_emulated
from .config import DTYPES


def timed_dtypes(named: list[str], device: torch.device) -> list[str]:
    """Those that are named, with a warning where the device only emulates one; else all that it multiplies itself, and
    a word on standard error about what is left out."""
    for dtype in named:
        warn_if_emulated(device, getattr(torch, dtype), "--dtypes float32")
    if named:
        return named
    own = [dtype for dtype in DTYPES if dtype != "bfloat16" or multiplies_bfloat16(device)]
    for dtype in sorted({*DTYPES} - {*own}):
        print(f"{dtype} is left out: this {device.type} only emulates it (--dtypes {dtype} times it)", file=sys.stderr)
    return own
