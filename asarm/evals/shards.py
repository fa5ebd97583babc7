"""Which share of an evaluation a process does: from the command line, ``accelerate launch`` or Slurm."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ConfigError

Item = TypeVar("Item")

# (index, count) as the starter of the processes tells them; the first pair that is set counts
ENVIRONMENT = (
    ("RANK", "WORLD_SIZE"),  # accelerate launch, torchrun
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


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
        """``setting`` ("0/4") if it is given, else what the environment says, else the whole."""
        if setting is not None:
            match = re.fullmatch(r"(\d+)/(\d+)", setting)
            if not match:
                raise ConfigError(f"shard must be INDEX/COUNT, 0/4 for instance, got {setting!r}")
            return cls(int(match[1]), int(match[2]))
        for index, count in ENVIRONMENT:
            if index in environment and count in environment:
                first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0)) if "ARRAY" in index else 0
                return cls(int(environment[index]) - first, int(environment[count]))
        return cls()

    def take(self, items: list[Item]) -> list[Item]:
        return items[self.index :: self.count]

    @property
    def suffix(self) -> str:
        """Of the files that only this shard writes."""
        return f"-{self.index}of{self.count}" if self.count > 1 else ""
