"""What a finished run leaves to be shown: the arrays behind the numbers of report.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import softmax


@dataclass
class Split:
    """What networks, annotator and truth say about n images.

    logits: (n, C) by name: `ensemble`, the method's own prediction (the sum over its networks), and each network where
    there are several. annotator: int64 (n,), its zero-shot prediction. labels: int64 (n,), -1 unknown. temperature: what
    logits are divided by for probabilities.
    """

    logits: dict[str, np.ndarray]
    annotator: np.ndarray
    labels: np.ndarray
    temperature: float = 1.0

    @property
    def known(self) -> bool:
        """Whether there is any truth."""
        return bool((self.labels >= 0).any())

    @cached_property
    def predicted(self) -> np.ndarray:
        """int64 (n,), the method's own prediction."""
        return self.logits["ensemble"].argmax(axis=1)

    @property
    def networks(self) -> dict[str, np.ndarray]:
        """(n, C) logits of each network by name; a method with one network has `ensemble` alone."""
        several = {name: rows for name, rows in self.logits.items() if name != "ensemble"}
        return several or self.logits

    @cached_property
    def sure(self) -> np.ndarray:
        """(n,), the probability of the own prediction, as in labels.csv: of the networks' mean logits."""
        return softmax(self.logits["ensemble"] / (len(self.networks) * self.temperature), axis=1).max(axis=1)

    @cached_property
    def opinion(self) -> np.ndarray:
        """(n, C), mean of the networks' probabilities: low at the top where one doubts, or where two contradict."""
        return np.mean([softmax(logits / self.temperature, axis=1) for logits in self.networks.values()], axis=0)


@dataclass
class RunRecord:
    """A finished run. Row i of everything about training images is the same image.

    report: as `build_report` gives it. settings: every option by name. curves: one mapping of scalars an epoch.
    folder: the run folder and annotations the store, as a person would type them.
    paths: of the N training images. pixels: rows (n,) -> their images, uint8 (n, c, H, W).
    train, test: test is None where there are no test images. known: int64 (N,), classes that a person gave, -1 elsewhere.
    weights: w (N,) of each network's last division; losses: (N,) what its mixture was fitted to, NaN for images left out;
    both empty where the method does not divide.
    """

    report: dict[str, Any]
    settings: dict[str, Any]
    curves: list[dict[str, float]]
    folder: str
    annotations: str
    class_names: list[str]
    paths: list[str]
    pixels: Callable[[np.ndarray], np.ndarray]
    train: Split
    test: Split | None
    known: np.ndarray
    weights: list[np.ndarray] = field(default_factory=list)
    losses: list[np.ndarray] = field(default_factory=list)

    @property
    def method(self) -> str:
        """Its name."""
        return str(self.report["method"])

    @property
    def judged(self) -> tuple[str, Split] | None:
        """The split that the method is judged by, and its name: test images, else training images; None without truth."""
        named = {"test": self.test, "training": self.train}
        return next(((name, split) for name, split in named.items() if split and split.known), None)
