"""Which share of an evaluation a process does: from the command line, ``accelerate launch`` or Slurm."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ConfigError

Item = TypeVar("Item")

# (index, count) of a process in its job, as its starter tells them; the first pair that is set counts
PROCESS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))  # accelerate launch or torchrun; srun
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")  # of a job among those of its array


@dataclass(frozen=True)
class Shard:
    """Share ``index`` of ``count``: every ``count``-th item, from ``index`` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ConfigError(f"shard {self.index}/{self.count} does not exist; shards are numbered 0/N to N-1/N")

    @classmethod
    def of(cls, setting: str | None, environment: Mapping[str, str] = os.environ) -> "Shard":
        """``setting`` ("0/4") if it is given, else what the environment says (several processes of each job of an array
        included), else the whole."""
        if setting is not None:
            match = re.fullmatch(r"(\d+)/(\d+)", setting)
            if not match:
                raise ConfigError(f"shard must be INDEX/COUNT, 0/4 for instance, got {setting!r}")
            return cls(int(match[1]), int(match[2]))
        process, processes = next((p for name in PROCESS if (p := _pair(name, environment))), (0, 1))
        job, jobs = _array_share(environment)
        return cls(job * processes + process, jobs * processes)

    def take(self, items: list[Item]) -> list[Item]:
        return items[self.index :: self.count]

    @property
    def suffix(self) -> str:
        """Of the files that only this shard writes."""
        return f"-{self.index}of{self.count}" if self.count > 1 else ""


def _array_share(environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, count) of a job among those of its array, which Slurm numbers from MIN to MAX in steps of STEP; raises
    :class:`ConfigError` for an array with gaps, whose jobs cannot tell how many there are before them."""
    if (pair := _pair(ARRAY, environment)) is None:
        return 0, 1
    task, count = pair
    first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{key}", value)) for key, value in (("MIN", 0), ("STEP", 1)))
    last = int(environment.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step))
    tasks = range(first, last + 1, step)
    if len(tasks) != count or task not in tasks:
        raise ConfigError(
            f"job {task} of an array of {count} from {first} to {last}: an array that shares a run has no gaps, as "
            "--array=0-3 or --array=0-6:2; submit it so, or give each job its --shard INDEX/COUNT"
        )
    return tasks.index(task), count


def _pair(names: tuple[str, str], environment: Mapping[str, str]) -> tuple[int, int] | None:
    return tuple(int(environment[name]) for name in names) if all(name in environment for name in names) else None
