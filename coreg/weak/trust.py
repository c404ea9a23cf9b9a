"""Whom to believe, without any label: an annotator, what was trained on its evidence, or a view of the images.

A referee is a classifier of frozen features (`coreg.weak.mixture`) that was fitted to the evidence of some images and reads
others, whose evidence it has not had. A second one, fitted to further images, stands for the view itself. Where A, a
student S or another referee names a class independently of a referee R, and both are wrong into all classes alike,

    x = p_X p_R     with     x = (C P(X = R) - 1) / (C - 1)     and     p = (C accuracy - 1) / (C - 1)

(the triplets of Fu et al., "Fast and three-rious", ICML 2020). An annotator is independent of a referee that has not had
its evidence of an image, so that a = p_A p_R. Two referees are not, nor a student that began with the features which they
read: what one cannot see, the other cannot. If half of their mistakes are common to both, two that are right equally often
agree as often as each is right, r = p_R, where independent ones would have r = p_R^2. That is assumed here: p_R = r,
p_S = s, p_A = a / r. It is not known from anything, but it is on the annotator's side: it takes the view for worse, and the
annotator for better, than independence would. Mistakes that the annotator makes by rule reach student and referees alike.

Referees whose features hardly tell classes apart have far more than half of their mistakes in common: they agree with each
other, contradict a good annotator, and would be taken for better than it. What gives them away is that they contradict it
as well where it is surest, where a fair annotator is right.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from coreg.weak.mixture import Setting, Table, fit_mixture, fit_projection
from coreg.weak.refine import FOLDS, JUDGED_IMAGES, choose, drawn, foretold_each

Most = Literal["annotator", "student", "view"]
ERRORS = 2.0  # standard errors by which a difference counts as one
REFEREES_AGREE, CONTRADICTIONS = 0.5, 2.0
# the share of the images that an annotator is surest of, and how many of them, at least, fair referees take it for right on
SUREST, RIGHT_WHERE_SUREST = 0.25, 2 / 3
ENTRIES_JUDGED = 1 << 21  # of (N, C), at most, by which a view is judged before training
IMAGES_A_CLASS = 10  # from which on a view that tells nothing apart is blamed, and not the number of images


# ---- does a view tell the classes apart at all? ---------------------------------------------------------------------


@dataclass(frozen=True)
class OwnFit:
    """How well a view foretells the annotator out of fold."""

    score: float  # `coreg.weak.refine.foretold`
    shuffled: float  # the same of the same evidence, dealt out to the images anew
    error: float  # standard error of their difference
    enough: bool  # whether there are `IMAGES_A_CLASS` images a class

    @property
    def hopeless(self) -> bool:
        """Whether evidence that belongs to other images is foretold as well, although there are images enough."""
        return self.enough and not self.score - self.shuffled > ERRORS * self.error


def own_fit(z: np.ndarray, probs: Table, setting: Setting, ids: np.ndarray) -> OwnFit:
    """Judge a view.

    Args:
        z: (N, d), projected features, N >= 1. probs: (N, C). ids: int64 (N,), who the images are, for draws.
    """
    n = len(ids)
    parts, anew = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    parts[drawn(ids, "folds")] = np.arange(n) * FOLDS // n
    each = foretold_each(z, probs, setting, parts)
    anew[drawn(ids, "shuffled")] = drawn(ids, "shuffled again")
    shuffled = foretold_each(z, probs[anew], setting, parts)
    error = float((each - shuffled).std() / np.sqrt(n))
    return OwnFit(float(each.mean()), float(shuffled.mean()), error, n >= IMAGES_A_CLASS * probs.shape[1])


# ---- referees -------------------------------------------------------------------------------------------------------


def referees_of_others(z: np.ndarray, probs: Table, setting: Setting, ids: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Classes int64 (2, m) that two referees, fitted to one half of the images each, give to other images.

    Args:
        z: (N, d), N >= 2. probs: (N, C). ids: int64 (N,), for draws. others: (m, d).
    """
    order = drawn(ids, "referees")
    return np.stack([_named(z, probs, setting, order[k::2], others) for k in (0, 1)])


def referees_in_turn(z: np.ndarray, probs: Table, setting: Setting, ids: np.ndarray) -> np.ndarray:
    """Classes int64 (2, N) that two referees give to the images themselves: to each third of them, fitted to another one.

    Args:
        z: (N, d), N >= 3. probs: (N, C). ids: int64 (N,), for draws.
    """
    order, named = drawn(ids, "referees"), np.empty((2, len(z)), dtype=np.int64)
    for k in range(3):
        for referee in (0, 1):
            fitted = order[(k + 1 + referee) % 3 :: 3]
            named[referee, order[k::3]] = _named(z, probs, setting, fitted, z[order[k::3]])
    return named


def _named(z: np.ndarray, probs: Table, setting: Setting, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    return fit_mixture(z[rows], probs[rows], setting).of_view(others).argmax(axis=1)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def agreements(referees: np.ndarray, annotator: np.ndarray, student: np.ndarray | None = None) -> dict[str, float]:
    """How often a referee agrees with each, as shares, mean over both referees; `view` is the other referee.

    Args:
        referees: int64 (2, n), n >= 1. annotator, student: int64 (n,).
    """
    named = {"annotator": annotator} | ({} if student is None else {"student": student})
    shares = {who: float((referees == classes).mean()) for who, classes in named.items()}
    return shares | {"view": float((referees[0] == referees[1]).mean())}


def surest(probs: np.ndarray) -> np.ndarray:
    """The share `SUREST` of the images that an annotator is surest of, and all that it is as sure of: bool (n,).

    Args:
        probs: float (n, C), n >= 1, each row a distribution over the classes.
    """
    sure = probs.max(axis=1)
    return sure >= np.sort(sure)[int((1 - SUREST) * len(sure))]


def doubted(referees: np.ndarray, annotator: np.ndarray, sure: np.ndarray, classes: int) -> bool:
    """Whether referees contradict an annotator where it is surest, so that they are not believed themselves.

    There, too, its accuracy would be a / r; below `RIGHT_WHERE_SUREST` it is the referees that are taken for wrong. An
    annotator that is as sure of all images gives nothing to doubt them by.

    Args:
        referees: int64 (2, n). annotator: int64 (n,). sure: bool (n,), as `surest` gives it. classes: C.
    """
    a, r = (beyond_chance((referees == each)[:, sure].mean(), classes) for each in (annotator, referees[::-1]))
    return bool(not sure.all() and a < RIGHT_WHERE_SUREST * r)


def most_trusted(referees: np.ndarray, annotator: np.ndarray, student: np.ndarray, classes: int, refined: bool) -> Most:
    """Who is to be trusted most by referees that are believed: the annotator, unless another is clearly ahead of it.

    With a, s and r the agreement of annotator, student and the other referee with a referee, beyond chance, the annotator's
    accuracy is taken for a / r, the student's for s and the view's for r, and clearly ahead is who is so by `ERRORS`
    standard errors. Nobody can agree with a referee more often than it is right but by the same mistakes, so that s counts
    as r at most. Referees that do not agree on half of the images (r below `REFEREES_AGREE`) judge nothing.

    Of a student and a view that are both ahead, a student that was trained on the annotator's own evidence gives way where
    r is clearly larger than s. One that was trained on refined labels gives way where it contradicts the referees more
    than `CONTRADICTIONS` times as often as they contradict each other, which is what a student does that is wrong as
    often as they are, in other places.

    Args:
        referees: int64 (2, n), n >= 1. annotator, student: int64 (n,). classes: C. refined: what the student learned from.
    """
    named = (annotator, student, referees[::-1])  # to each referee the other one is the view
    a, s, r = (beyond_chance((referees == each).mean(axis=0), classes) for each in named)
    if r.mean() < REFEREES_AGREE:
        return "annotator"
    if s.mean() > r.mean():
        s = r
    # of a product of means, each image's part in the error
    ahead = {
        who: _clearly_positive(x * r.mean() + x.mean() * r - a, x.mean() * r.mean() - a.mean())
        for who, x in (("student", s), ("view", r))
    }
    if not all(ahead.values()):
        return next((who for who, is_ahead in ahead.items() if is_ahead), "annotator")
    if not _clearly_positive(r - s, r.mean() - s.mean()):
        return "student"
    each_other = (referees[0] != referees[1]).mean()
    return "student" if refined and (referees != student).mean() <= CONTRADICTIONS * each_other else "view"


def beyond_chance(agreement: np.ndarray, classes: int) -> np.ndarray:
    """Agreement (C x - 1) / (C - 1): 0 for one that guesses among C classes, 1 at best."""
    return (classes * agreement - 1) / max(classes - 1, 1)


def _clearly_positive(parts: np.ndarray, value: float) -> bool:
    """Whether a value is above 0 by `ERRORS` standard errors; parts: (n,), what each image adds to it, up to a constant."""
    return bool(value > ERRORS * parts.std() / np.sqrt(len(parts)))


def view_fit(z: np.ndarray, probs: Table, setting: Setting, ids: np.ndarray) -> dict[str, Any] | None:
    """How well a view tells the classes apart by itself, before anything is trained on it; None of fewer than 3 images.

    It is judged by at most `JUDGED_IMAGES` images and `ENTRIES_JUDGED` probabilities, drawn by key.

    Args:
        z: (N, d), projected features. probs: (N, C). ids: int64 (N,), for draws.

    Returns:
        what `OwnFit` has; how often two fits agree on images whose evidence neither has had, with each other (`itself`) and
        with the `annotator`; and `mends`, whether evidence is worth mending by this view: the fits agree with each other on
        at least half of the images, beyond chance, and clearly more often than with the annotator, and are not `doubted`.
        That asks less of the view than `most_trusted`, because what is mended keeps the annotator's evidence.
    """
    if len(z) < 3:
        return None
    enough = len(z) >= IMAGES_A_CLASS * probs.shape[1]
    rows = drawn(ids, "judged")[: max(3, min(JUDGED_IMAGES, ENTRIES_JUDGED // probs.shape[1]))]
    z, probs, ids = z[rows], probs[rows], ids[rows]
    fit = replace(own_fit(z, probs, setting, ids), enough=enough)
    referees, annotator, classes = referees_in_turn(z, probs, setting, ids), probs.argmax(axis=1), probs.shape[1]
    a, r = (beyond_chance((referees == each).mean(axis=0), classes) for each in (annotator, referees[::-1]))
    shares = agreements(referees, annotator)
    ahead = r.mean() >= REFEREES_AGREE and _clearly_positive(r - a, r.mean() - a.mean())
    believed = not fit.hopeless and not doubted(referees, annotator, surest(probs), classes)
    return asdict(fit) | {
        "hopeless": fit.hopeless,
        "annotator": shares["annotator"],
        "itself": shares["view"],
        "mends": bool(ahead and believed),
    }


def verdict(
    features: dict[str, np.ndarray], evidence: dict[str, np.ndarray], ids: np.ndarray, student: np.ndarray, refined: bool
) -> dict[str, Any]:
    """Who is to be trusted `most`, with every one's `agreement` with the referees and the view's own `fit`.

    `surest` are the agreements on the images that the annotator is surest of; where they are so few that referees are
    `doubted`, it is to be trusted.

    Args:
        features, evidence: float (n, D) and (n, C) of training images and, where those are to be judged, of test images.
        ids: int64 (n,), who the training images are. student: int64 (m,), its classes of the images judged.
        refined: whether it was trained on refined labels.
    """
    project = fit_projection(features["train"], evidence["train"].shape[1])
    z, probs = project(features["train"]), evidence["train"]
    setting = choose(z, probs, ids)[0]
    fit = own_fit(z, probs, setting, ids)
    if "test" in features:
        referees = referees_of_others(z, probs, setting, ids, project(features["test"]))
    else:
        referees = referees_in_turn(z, probs, setting, ids)
    judged, classes = evidence["test" if "test" in features else "train"], probs.shape[1]
    annotator, sure = judged.argmax(axis=1), surest(judged)
    doubt = doubted(referees, annotator, sure, classes)
    none = fit.hopeless or doubt
    return {
        "most": "annotator" if none else most_trusted(referees, annotator, student, classes, refined),
        "images": len(annotator),
        "doubted": doubt,
        "surest": agreements(referees[:, sure], annotator[sure]),
        "agreement": agreements(referees, annotator, student),
        "fit": asdict(fit) | {"hopeless": fit.hopeless},
    }
