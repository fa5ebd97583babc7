"""Learning rate and masking rates as functions of the step."""

import numpy as np

from ..rng import generator
from .config import MaskingConfig, OptimizerConfig


def lr_factor(step: int, config: OptimizerConfig) -> float:
    """Linear from 0 to 1 over the warm-up, then linear to 0 at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return max(0.0, (config.steps - step) / max(1, config.steps - config.warmup_steps))


def masking_range(step: int, config: MaskingConfig) -> tuple[float, float]:
    """The (low, high) masking rate at ``step``."""
    done = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    low = config.start_low + done * (config.final_low - config.start_low)
    high = config.start_high + done * (config.final_high - config.start_high)
    return low, high


def masking_rates(step: int, n_rows: int, config: MaskingConfig, seed: int) -> np.ndarray:
    """The masking rate of each of a step's rows [n_rows]: one in each n-th part of the range, in random order.

    Each of them is uniform in the range, and their mean varies far less than that of independent draws.
    """
    rng = generator(seed, "rates", step)
    low, high = masking_range(step, config)
    strata = (rng.random() + rng.permutation(n_rows) / n_rows) % 1
    return low + (high - low) * strata
