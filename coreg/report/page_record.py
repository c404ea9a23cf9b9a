"""What a finished run leaves to be shown: the arrays behind the numbers of report.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import softmax


@dataclass
class Split:
    """The predictions of networks and annotator for n images, and the truth."""

    # (n, C) by name: `ensemble` (the method's own, the sum over its networks), and each of several
    logits: dict[str, np.ndarray]
    annotator: np.ndarray  # int64 (n,), its zero-shot prediction
    labels: np.ndarray  # int64 (n,), -1 unknown
    temperature: float = 1.0  # what logits are divided by for probabilities

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
class Record:
    """A finished run of any kind. Row i of everything about training images is the same image."""

    report: dict[str, Any]
    settings: dict[str, Any]  # every option by name
    curves: list[dict[str, float]]  # one mapping of scalars an epoch
    folder: str  # the run folder, as a person would type it
    annotations: str  # the store, likewise
    class_names: list[str]
    paths: list[str]  # of the N training images
    pixels: Callable[[np.ndarray], np.ndarray]  # rows (n,) -> their images, uint8 (n, c, H, W)

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.report["method"])


@dataclass
class RunRecord(Record):
    """A finished run of which an image has one label; its report is as `build_report` gives it."""

    train: Split
    test: Split | None  # None where there are no test images
    known: np.ndarray  # int64 (N,), classes that a person gave, `NONE` for none of them, -1 elsewhere
    # rows (n,) -> n images as a person should see them; None where that is the pixels
    photos: Callable[[np.ndarray], list[Image.Image]] | None = None
    none: list[str] = field(default_factory=list)  # paths of images that a person found to be of no class
    # w (N,) of each network's last division; none where the method does not divide
    weights: list[np.ndarray] = field(default_factory=list)
    # (N,) what each mixture was fitted to, NaN for images left out; none likewise
    losses: list[np.ndarray] = field(default_factory=list)

    @property
    def judged(self) -> tuple[str, Split] | None:
        """The split that the method is judged by, and its name: test images, else training images; None without truth."""
        named = {"test": self.test, "training": self.train}
        return next(((name, split) for name, split in named.items() if split and split.known), None)
