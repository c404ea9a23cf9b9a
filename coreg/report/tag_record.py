"""What a finished run with several labels an image leaves to be shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import logit

CLOSEST = 1e-6  # probabilities and thresholds are kept so far from 0 and 1 where their logits are compared


@dataclass
class TagRecord:
    """A finished run of N training images and L labels. Row i of everything about training images is the same image."""

    report: dict[str, Any]  # as `coreg.run.tags.finish_tags` gives it
    settings: dict[str, Any]  # every option by name
    curves: list[dict[str, float]]  # one mapping of scalars an epoch
    folder: str  # the run folder, as a person would type it
    annotations: str  # the store, likewise
    class_names: list[str]
    paths: list[str]  # of the training images
    pixels: Callable[[np.ndarray], np.ndarray]  # rows (n,) -> their images, uint8 (n, c, H, W)
    probabilities: dict[str, np.ndarray]  # of each split float64 (n, L)
    truth: dict[str, np.ndarray]  # of each split int8 (n, L), 0 unknown
    similarity: dict[str, np.ndarray] | None  # the annotator's, of each split float (n, L); None without an annotator
    suggested: np.ndarray | None  # bool (N, L), labels that the annotator suggests of training images; None likewise
    observed: np.ndarray  # int8 (N, L), labels that training was given
    thresholds: np.ndarray  # (L,), of the probabilities

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.report["method"])

    @cached_property
    def predicted(self) -> np.ndarray:
        """bool (N, L), labels of the training images."""
        return self.probabilities["train"] >= self.thresholds

    @cached_property
    def margin(self) -> np.ndarray:
        """(N, L), distance of the logits of training images from those of their thresholds; small where it is doubtful."""
        p, at = (values.clip(CLOSEST, 1 - CLOSEST) for values in (self.probabilities["train"], self.thresholds))
        return np.abs(logit(p) - logit(at))

    @property
    def judged(self) -> str | None:
        """The split that the method is judged by; None without true labels."""
        return next((split for split in ("test", "validation", "train") if split in self.report["tags"]), None)
