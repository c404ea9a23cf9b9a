"""What a finished run with several labels an image leaves to be shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import logit

from coreg.report.page_record import Record

CLOSEST = 1e-6  # probabilities and thresholds are kept so far from 0 and 1 where their logits are compared


@dataclass
class TagRecord(Record):
    """A finished run of L labels; its report is as `coreg.run.tags.finish_tags` gives it."""

    probabilities: dict[str, np.ndarray]  # of each split float64 (n, L)
    truth: dict[str, np.ndarray]  # of each split int8 (n, L), 0 unknown
    similarity: dict[str, np.ndarray] | None  # the annotator's, of each split float (n, L); None without an annotator
    suggested: np.ndarray | None  # bool (N, L), labels that the annotator suggests of training images; None likewise
    observed: np.ndarray  # int8 (N, L), labels that training was given
    thresholds: np.ndarray  # (L,), of the probabilities

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
