"""How sure a class has to be: a cut-off beyond which an image is of none of the classes, and prediction sets.

All are chosen on images that a person labelled and training has not seen, by split conformal prediction, which assumes
nothing of the probabilities: of new images like those, the share that was asked for is kept, or has its class in the set
(on average over the draw of the labelled images; Vovk et al., "Algorithmic Learning in a Random World", 2005; Sadinle, Lei
and Wasserman, JASA 2019; for a least probability Bates et al., "Testing for outliers with conformal p-values", 2023).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coreg.data.images import ImageList, lookup
from coreg.data.labels import NONE, NONE_OF_THESE, csv_lines, read_labels
from coreg.data.sources import open_images
from coreg.data.tags import BETWEEN
from coreg.errors import UserError
from coreg.export.distance import KEPT, largest
from coreg.export.tagging import chosen
from coreg.weak.prefilter import conformal_threshold

FEWEST = 50  # labelled images, with fewer the share that is kept varies too much from one set of them to the next
LISTS = (".csv", ".json")


@dataclass
class CutOff:
    """What is given of an image's probabilities, and how many images came out how."""

    class_names: Sequence[str]
    least: float | None = None  # the probability of the best class below which an image is of none of them
    member: float | None = None  # the probability from which on a class is in the prediction set
    coverage: float | None = None  # the share of images whose class is to be in the set
    farthest: float | None = None  # the distance beyond which an image is of none of them
    none: int = 0  # images of none of the classes
    sizes: Counter[int] = field(default_factory=Counter)  # size of a prediction set -> images

    @property
    def columns(self) -> list[str]:
        """Heads of the columns that `cells` fills."""
        wanted = {
            "best": self.least is not None or self.farthest is not None,
            "distance": self.farthest is not None,
            "prediction_set": self.member is not None,
        }
        return [name for name, there in wanted.items() if there]

    def is_none(self, probabilities: np.ndarray, distance: float = 0) -> bool:
        """Whether an image of probabilities (C,) and a distance from the training images is of none of the classes."""
        return bool(
            (self.least is not None and probabilities.max() < self.least)
            or (self.farthest is not None and distance > self.farthest)
        )

    @property
    def why_none(self) -> str:
        """What is true of images of none of the classes."""
        sides = []
        if self.least is not None:
            sides.append(f"no class has a probability of {self.least:.4f} or more")
        if self.farthest is not None:
            sides.append(f"the distance from the training images is above {self.farthest:.4g}")
        return ", or ".join(sides)

    @property
    def called_none(self) -> str:
        """The label of images of none of the classes: none, where a class is called `none of these`."""
        return "" if lookup(self.class_names)(NONE_OF_THESE) >= 0 else NONE_OF_THESE

    def prediction_set(self, probabilities: np.ndarray) -> list[str]:
        """Names of the classes that (C,) probabilities leave possible, the most probable first; there may be none."""
        return [self.class_names[c] for c in chosen(probabilities, np.full(len(probabilities), self.member))]

    def cells(self, probabilities: np.ndarray, distance: float = 0) -> list[str]:
        """What stands in `columns` for probabilities (C,) and a distance, which are counted."""
        cells = []
        if self.why_none:
            self.none += self.is_none(probabilities, distance)
            cells.append(self.class_names[int(probabilities.argmax())])
        if self.farthest is not None:
            cells.append(f"{distance:.4g}")
        if self.member is not None:
            names = self.prediction_set(probabilities)
            self.sizes[len(names)] += 1
            cells.append(BETWEEN.join(names))
        return cells

    def summary(self) -> list[str]:
        """How the images came out, a line each for a person."""
        lines = []
        if self.why_none:
            lines.append(f"{self.none} of none of these: {self.why_none}")
        if self.member is not None and (total := self.sizes.total()):
            mean = sum(size * images for size, images in self.sizes.items()) / total
            lines.append(
                f"prediction sets of the classes from {self.member:.4f} on, for {self.coverage:.1%} coverage: {mean:.2f} "
                f"labels on average; {self.sizes[1]} sets of one label, {self.sizes[0]} of none"
            )
        return lines

    def lines(self, probabilities: np.ndarray, distance: float = 0) -> list[str]:
        """What is said of a single image besides its best classes, from probabilities (C,) and its distance."""
        lines = []
        if self.is_none(probabilities, distance):
            lines.append(f"{NONE_OF_THESE}: {self.why_none}")
        if self.member is not None:
            names = BETWEEN.join(self.prediction_set(probabilities)) or "no class"
            lines.append(f"prediction set for {self.coverage:.1%} coverage: {names}")
        return lines


def read_bound(given: str | None, option: str, highest: float, otherwise: str) -> float | None:
    """An option as a number from 0 to `highest`; None for `auto`, or where nothing is given.

    Raises:
        UserError: it is neither; `otherwise` says what to give.
    """
    if given in (None, "auto"):
        return None
    try:
        bound = float(given)
    except ValueError:
        bound = math.nan
    if not 0 <= bound <= highest:
        raise UserError(f"--{option} is {given!r}; give {otherwise}")
    return bound


def labelled_images(source: str, images: ImageList, class_names: Sequence[str]) -> tuple[ImageList, np.ndarray, np.ndarray]:
    """The images that a person labelled.

    Args:
        source: a CSV file with `path,label` (or Label Studio's answers, .json), whose paths are those of `images` or
            relative to the file; or a folder with a folder for each class, or whatever else `open_images` reads labels of.

    Returns:
        The list that they are in, rows int64 (n,) and classes int64 (n,), `NONE` for none of the classes.

    Raises:
        UserError: the labels cannot be read.
    """
    if source.lower().endswith(LISTS):
        paths = [line["path"] for _, line in csv_lines(source, ("path", "label"))]
        beside = paths and (Path(source).parent / paths[0]).is_file()
        if beside and source.lower().endswith(".csv") and not set(images.paths).issuperset(paths):
            images = open_images(source)
        return images, *read_labels(source, images.paths, class_names)
    images = open_images(source, class_names)
    rows = np.zeros(0, int) if images.labels is None else np.flatnonzero(images.labels >= 0)
    return images, rows, np.zeros(0, int) if images.labels is None else images.labels[rows]


def calibrated(
    class_names: Sequence[str],
    probs: np.ndarray,
    classes: np.ndarray,
    source: str,
    least: float | None,
    coverage: float | None,
    automatic: bool,
    distances: np.ndarray | None = None,
    farthest: float | None = None,
) -> CutOff:
    """The cut-off for labelled images.

    Args:
        probs: float (n, C). classes: int64 (n,), `NONE` for none of the classes, whose images only show how many such are
            recognised. source: where they are from.
        least: the least probability, if a person gave one. coverage: of prediction sets, None without.
        automatic: whether to choose the least probability, such that `coverage`, or `KEPT`, of the images of the classes
            are kept.
        distances: float (n,), where the largest distance is to be chosen likewise. farthest: if a person gave one.

    Raises:
        UserError: too few images are labelled.
    """
    known = classes >= 0
    share, count = coverage or KEPT, int(known.sum())
    if count < FEWEST or math.ceil((count + 1) * share) > count:
        enough = max(FEWEST, math.ceil(share / (1 - share) - 1e-9))
        raise UserError(
            f"{source} has {count} readable images with a label of the {len(class_names)} classes; {share:.1%} takes at "
            f"least {enough}, as rows path,label"
        )
    own = probs[known]
    if automatic:
        best = own.max(axis=1, keepdims=True)
        least = conformal_threshold(best, np.zeros(count, int), 1 - share)
    member = None if coverage is None else conformal_threshold(own, classes[known], 1 - coverage)
    farthest = farthest if distances is None else largest(distances[known], share)
    return CutOff(class_names, least, member, coverage, farthest)


def calibration_line(
    cutoff: CutOff, probs: np.ndarray, classes: np.ndarray, source: str, distances: np.ndarray | None = None
) -> str:
    """What the labelled images say, for a person; arguments as those of `calibrated`, `distances` those of all cut-offs."""
    known = classes >= 0
    right = float((probs[known].argmax(axis=1) == classes[known]).mean())
    line = f"{source}: {int(known.sum())} labelled images, {right:.1%} of them named rightly"
    none = np.flatnonzero(classes == NONE)
    if not (cutoff.why_none and len(none)):
        return line
    recognised = sum(cutoff.is_none(probs[row], 0 if distances is None else distances[row]) for row in none)
    return f"{line}; {recognised} of {len(none)} labelled {NONE_OF_THESE!r} are recognised"
