"""What the speculative comparison fills in: packed rows with a random subset masked."""

from collections.abc import Callable

import numpy as np

from ..infilling import InfillTask
from ..orders import random_visible
from ..rng import generator


def mask_rows(
    rows: list[np.ndarray], visible_fraction: float, seed: int, rounded: Callable[[float], int] = round
) -> list[InfillTask]:
    """Packed rows as tasks, each with its own random visible subset (:func:`~asarm.orders.random_visible`)."""
    tasks = []
    for index, row in enumerate(rows):
        visible_N = random_visible(len(row), visible_fraction, generator(seed, "mask", index), rounded)
        tasks.append(InfillTask(row.tolist(), visible_N.tolist(), index))
    return tasks
