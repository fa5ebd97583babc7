"""Learning rate and masking range as functions of the step."""

import numpy as np

from ..config import MaskingConfig, OptimizerConfig


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


def draw_masking_rate(step: int, config: MaskingConfig, rng: np.random.Generator) -> float:
    return rng.uniform(*masking_range(step, config))
