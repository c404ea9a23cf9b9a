"""Probabilities mended by features (`coreg.weak.mixture`): how evidence is read, chosen without labels, and how sure it is.

Nothing is random; parts of the images are drawn by key. A mixture of C classes is fitted to at most 2^27 / C images: 13
million for 10 classes, 134,000 for 1,000. So beside the inputs there are, whatever N is, the projected features of these
and a table of 2^27 entries of 2 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import softmax

from coreg.data.keyed import keyed_uniform
from coreg.weak.mixture import (
    Mixture,
    Prior,
    Projection,
    Setting,
    Subset,
    Table,
    blocks,
    fit_mixture,
    fit_projection,
    normalised,
    precision,
)
from coreg.weak.temperature import fit_temperature

WEIGHTS = (0.5, 1.0, 0.0)
FOLDS = 5
ENTRIES_IN_ALL_FOLDS = 1 << 21  # of (N, C); of more, one fold of the five says enough, and five take minutes
EQUAL_CLASSES = 0.97  # effective number of classes, as a share of C, from which they count as equally frequent
JUDGED_IMAGES = 20_000  # at most, by which settings and temperature are chosen
ENTRIES_FITTED = 1 << 27  # of (N, C), at most, to which a mixture is fitted


# ---- without labels: which setting, and how sure --------------------------------------------------------------------


def foretold(z: np.ndarray, probs: np.ndarray, setting: Setting, parts: np.ndarray) -> float:
    """How well the features foretell the annotator, out of fold: the mean of log sum_c p(c|z_i) sum_j Pi_cj Q_ij.

    It compares settings and views of about the same width, not different networks: the annotator's own features always
    foretell the annotator best.

    Args:
        z: (N, d). probs: (N, C). parts: int (N,), the fold that each image is left out of, -1 for none.
    """
    each = foretold_each(z, probs, setting, parts)
    return float(sum(each[parts == part].sum() for part in np.unique(parts[parts >= 0])) / (parts >= 0).sum())


def foretold_each(z: np.ndarray, probs: np.ndarray, setting: Setting, parts: np.ndarray) -> np.ndarray:
    """What `foretold` is the mean of, (N,); NaN for images in no fold."""
    each = np.full(len(z), np.nan)
    for part in np.unique(parts[parts >= 0]):
        held, kept = parts == part, parts != part
        if not kept.any():  # one image
            kept = held
        mixture = fit_mixture(z[kept], probs[kept], setting)
        explained = mixture.observed(normalised(probs[held]))
        each[held] = np.log((softmax(mixture.of_view(z[held]).astype(np.float64), axis=1) * explained).sum(axis=1))
    return each


def choose(
    z: np.ndarray, probs: Table, ids: np.ndarray, prior: Prior | None = None, weight: float | None = None
) -> tuple[Setting, dict[float, float]]:
    """How evidence is best read, without any label, judged on at most `JUDGED_IMAGES` images.

    The prior, where none is given, is uniform if classes whose shares are estimated come out nearly equal (see
    `effective_classes`), and estimated otherwise: to balance classes that are not equally frequent costs far more than it
    brings where they are, and `foretold` does not see it. Of the weights 1/2, 1 and 0 that one is taken which
    `foretold` ranks first.

    Args:
        z: (N, d). probs: (N, C). ids: int64 (N,), who the images are, for draws.

    Returns:
        the setting, and `foretold` of each weight that was tried.
    """
    rows = drawn(ids, "judged")[:JUDGED_IMAGES]
    z, probs = z[rows], probs[rows]
    if prior is None:
        shares = fit_mixture(z, probs, Setting(0.5, "estimated")).shares
        prior = "uniform" if effective_classes(shares) >= EQUAL_CLASSES * probs.shape[1] else "estimated"
    if weight is not None:
        return Setting(weight, prior), {}
    parts = np.empty(len(rows), dtype=np.int64)
    parts[drawn(ids[rows], "folds")] = np.arange(len(rows)) * FOLDS // max(len(rows), 1)
    if probs.size > ENTRIES_IN_ALL_FOLDS:
        parts[parts > 0] = -1
    scores = {weight: foretold(z, probs, Setting(weight, prior), parts) for weight in WEIGHTS}
    return Setting(max(scores, key=scores.__getitem__), prior), scores


def effective_classes(shares: np.ndarray) -> float:
    """exp of the entropy of the classes' shares (C,): C where they are equal, 1 where one class has all."""
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum()))


def fit_two_halves(z: np.ndarray, probs: Table, setting: Setting, ids: np.ndarray) -> float:
    """A temperature for log q: each half of the images is to be as sure of its class as the other half's mixture agrees.

    The smallest mean of -log softmax(x / T)[argmax y] over the images and both orders, where x and y are the logits of two
    mixtures, each fitted to one half. At least 1: two halves that agree are no reason to be surer than the mixture is.
    """
    rows = drawn(ids, "halves")[:JUDGED_IMAGES]
    if len(rows) < 2:
        return 1.0
    z, probs = z[rows], probs[rows]
    logits = np.empty((2, *probs.shape))
    for k in (0, 1):
        mixture = fit_mixture(z[k::2], probs[k::2], setting)
        for block in blocks(*probs.shape):
            logits[k, block] = mixture.of_both(z[block], normalised(probs[block])) + mixture.balance
    named = logits[::-1].argmax(axis=2).ravel()
    return max(1.0, fit_temperature(logits.reshape(2 * len(z), -1), named))


def drawn(ids: np.ndarray, purpose: str) -> np.ndarray:
    """All positions of `ids` in an order that depends on them and on the purpose alone."""
    keys = keyed_uniform(("refine", purpose), torch.from_numpy(np.asarray(ids, dtype=np.int64)), 1)[:, 0].numpy()
    return np.lexsort((ids, keys))


# ---- all of it ------------------------------------------------------------------------------------------------------


@dataclass
class Refinement:
    """What `refine` gives: how any image's probabilities are mended, done block by block when they are asked for."""

    setting: Setting  # how evidence was read
    scores: dict[float, float]  # `foretold` of every weight tried
    temperature: float  # q's
    classes: float  # effective number of classes of the images that the mixture was fitted to
    projection: Projection  # this and the mixture are the classifier of other images
    mixture: Mixture
    features: np.ndarray  # as they were given
    evidence: np.ndarray  # likewise
    role: np.ndarray  # int8 (N,), see `_KEPT`, `_MENDED`, `_SEEN`

    @property
    def probs(self) -> np.ndarray:
        """Mended probabilities of all images, float16 (N, C)."""
        return self.part(slice(0, len(self.evidence)))

    def part(self, rows: slice) -> np.ndarray:
        """Mended probabilities of some rows, float16 (n, C)."""
        out = self.evidence[rows].astype(np.float16)
        exact, role = precision(*self.evidence.shape), self.role[rows]
        for kind in (_MENDED, _SEEN):
            places = np.flatnonzero(role == kind)
            for block in blocks(len(places), out.shape[1] + self.features.shape[1]):
                chosen = places[block]
                z = self.projection(self.features[rows][chosen]).astype(exact)
                if kind == _MENDED:
                    scores = self.mixture.of_both(z, normalised(self.evidence[rows][chosen], exact))
                    scores += self.mixture.balance.astype(exact)
                else:
                    scores = self.mixture.of_view(z)
                scores /= exact(self.temperature)
                out[chosen] = softmax(scores, axis=1)
        return out


def fitted_rows(train: np.ndarray, classes: int) -> tuple[np.ndarray, float]:
    """The rows that a mixture is fitted to, drawn by key from very many, and the slack with which it balances them.

    Args:
        train: int64 (n,), rows of the images. classes: C.

    Returns:
        int64, all of `train` or `ENTRIES_FITTED` / C of it, ascending; and the `slack` of `balanced`, 0 for all of it.
    """
    most = max(1, ENTRIES_FITTED // classes)
    if len(train) <= most:
        return train, 0.0
    # classes that are equally frequent are not quite so in a part: twice the error
    return np.sort(train[drawn(train, "fitted")[:most]]), 2 * (classes / most) ** 0.5


_KEPT, _MENDED, _SEEN = range(3)  # a row's probabilities: kept; mended with them as evidence; by the features alone


def refine(
    features: np.ndarray,
    probs: np.ndarray,
    train: np.ndarray,
    others: np.ndarray,
    prior: Prior | None = None,
    weight: float | None = None,
) -> Refinement:
    """Mend an annotator's probabilities by features.

    Args:
        features: (N, D) of any float type. probs: (N, C) of any float type, the annotator's; uniform rows where it says
            nothing. Both may be mapped from disk; a block of rows is read at a time.
        train: int64, rows whose evidence is mended; the mixture is fitted to them, or to a part of very many.
        others: int64, rows that are classified by their features alone, so that no evidence of theirs is used; what is in
            neither keeps its probabilities.
        prior, weight: see `Setting`; None to choose without labels (`choose`).

    Raises:
        ValueError: there is no training row.
    """
    if not len(train):
        raise ValueError("there are no training rows to fit a mixture to")
    fitted, slack = fitted_rows(train, probs.shape[1])
    projection = fit_projection(Subset(features, fitted), probs.shape[1])
    z, evidence = projection(Subset(features, fitted)), Subset(probs, fitted)
    setting, scores = choose(z, evidence, fitted, prior, weight)
    temperature = fit_two_halves(z, evidence, setting, fitted)
    mixture = fit_mixture(z, evidence, setting, slack=slack)
    role = np.full(len(probs), _KEPT, dtype=np.int8)
    role[train], role[others] = _MENDED, _SEEN
    classes = effective_classes(mixture.shares)
    return Refinement(setting, scores, temperature, classes, projection, mixture, features, probs, role)
