"""When a step happens, and what goes by it: learning rates and weights of losses."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """When a step happens."""

    epoch: int  # finished epochs
    epochs: int  # in all
    step: int = 0  # finished steps of this epoch
    steps: int = 1  # of every epoch

    @property
    def taken(self) -> int:
        """Finished steps of all epochs."""
        return self.epoch * self.steps + self.step

    def reached(self, part: float) -> bool:
        """Whether this share of all epochs is over."""
        return self.epoch >= part * self.epochs


def cosine_lr(epoch: int, peak: float, floor: float, horizon: int) -> float:
    """Learning rate of an epoch: floor + (peak - floor) (1 + cos(pi epoch / horizon)) / 2."""
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(epoch, horizon) / horizon)) / 2


def ramp(progress: float, length: float) -> float:
    """lambda_u's factor after `progress` epochs since warm-up: linear from 0 to 1 over `length` epochs."""
    return min(max(progress / length, 0.0), 1.0) if length else 1.0
