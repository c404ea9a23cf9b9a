"""Several annotators of the same images against each other, without any label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coreg.weak.mixture import Table, fit_projection
from coreg.weak.refine import JUDGED_IMAGES, choose, drawn
from coreg.weak.trust import REFEREES_AGREE, beyond_chance, referees_in_turn

MOST_SURE = 0.999  # nobody's evidence counts without bound


def estimated_accuracies(features: Table, evidence: Sequence[Table], ids: np.ndarray) -> np.ndarray | None:
    """How often each annotator is right, by what the evidence of the others lets a classifier of features foretell.

    Two referees are fitted to the evidence of each annotator X and read images whose evidence they have not had
    (`coreg.weak.trust`). Where r_X is how often they agree with each other and y how often they agree with annotator Y,
    both beyond chance, Y is right in y / r_X beyond chance. The mean over all X but Y is taken, of those whose referees
    agree on at least half of the images; Y's own referees judge it where there are no others. Mistakes that all
    annotators have in common count for nobody.

    Args:
        features: (N, D), N >= 3. evidence: A tables (N, C) of probabilities. ids: int64 (N,), for draws.

    Returns:
        float64 (A,), shares; None where nobody's referees agree on half of the images, so that nothing can be said.
    """
    classes = evidence[0].shape[1]
    rows = drawn(ids, "annotators")[:JUDGED_IMAGES]
    z, ids = fit_projection(features[rows], classes)(features[rows]), ids[rows]
    tables = [np.asarray(table)[rows] for table in evidence]
    named = np.stack([table.argmax(axis=1) for table in tables])
    judged = np.full((len(tables), len(tables)), np.nan)  # by the referees of X, of Y
    for number, table in enumerate(tables):
        referees = referees_in_turn(z, table, choose(z, table, ids)[0], ids)
        agree = beyond_chance(np.array((referees[0] == referees[1]).mean()), classes)
        if agree >= REFEREES_AGREE:
            each = (referees[:, None] == named).mean(axis=(0, 2))
            judged[number] = np.clip(beyond_chance(each, classes) / agree, 0, 1)
    if np.isnan(judged).all():
        return None
    own = np.eye(len(tables), dtype=bool)
    by_others = np.where(own, np.nan, judged)
    there = ~np.isnan(by_others).all(axis=0)
    beyond = np.full(len(tables), np.nan)
    beyond[there] = np.nanmean(by_others[:, there], axis=0)
    beyond[~there] = judged[own][~there]  # the only one that can be judged, or one beside others that cannot judge
    return ((classes - 1) * beyond + 1) / classes


def weights_of(accuracies: np.ndarray, classes: int) -> np.ndarray:
    """Weights of annotators' probabilities, log((C - 1) a / (1 - a)) of an accuracy a, not below 0, of mean 1.

    That is how much a vote of one that is right in a and errs into all classes alike counts by Bayes' rule. Whoever is not
    better than chance counts nothing; if nobody is, all count alike.

    Args:
        accuracies: float (A,). classes: C.
    """
    a = np.clip(accuracies, 1e-9, MOST_SURE)
    weights = np.maximum(np.log((classes - 1) * a / (1 - a)), 0.0)
    return weights / weights.mean() if weights.any() else np.ones(len(a))
