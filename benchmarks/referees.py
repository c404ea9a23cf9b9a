"""How often a report is right about whom to trust, on stores whose truth is known, by every view that lies beside them.

    python -m benchmarks.referees runs/evidence/*/annotations

Each view, and the annotator's own features where they are there, judges the annotator as it is, with a part of its mistakes
mended, and spoiled: a part of the images have the evidence of others. The student is what the view says by itself, so that
`student` and `view` are the same. It is right where at most 3 points of test accuracy are lost against the better of the
annotator and the view.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.tables import as_markdown
from coreg.annotate.view import View
from coreg.data.images import TEST, TRAIN
from coreg.errors import UserError, exits_with_one_line
from coreg.store.store import AnnotationStore
from coreg.weak.mixture import fit_mixture, fit_projection
from coreg.weak.refine import choose
from coreg.weak.trust import verdict

LOST = 0.03  # of test accuracy, from which on an answer is wrong
MENDED, SPOILED = (0.3, 0.6), (0.2, 0.4)


@dataclass(frozen=True)
class Case:
    """An annotator and a view of its images."""

    data: str
    view: str
    evidence: str
    annotator: float  # accuracy on the test images
    by_view: float
    most: str

    @property
    def lost(self) -> float:
        """Test accuracy that the answer costs."""
        named = self.annotator if self.most == "annotator" else self.by_view
        return max(self.annotator, self.by_view) - named


def changed(probs: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The evidence (N, C) as it is, mended and spoiled; images and shares are drawn with seed 0."""
    yield "as it is", probs
    rng = np.random.default_rng(0)
    for share in MENDED:
        mended, wrong = probs.copy(), np.flatnonzero(probs.argmax(axis=1) != labels)
        rows = rng.permutation(wrong)[: int(share * len(wrong))]
        named, truth = mended[rows].argmax(axis=1), labels[rows]
        mended[rows, named], mended[rows, truth] = probs[rows, truth], probs[rows, named]
        yield "mended", mended
    for share in SPOILED:
        spoiled, rows = probs.copy(), rng.permutation(len(probs))[: int(share * len(probs))]
        spoiled[rows] = probs[rng.permutation(rows)]
        yield "spoiled", spoiled


def cases_of(store: AnnotationStore) -> Iterator[Case]:
    """Every view of a store, on every evidence; the images whose label is unknown are left out.

    Raises:
        UserError: no training or no test image has a label, or there are no features to judge by.
    """
    features = {} if store.manifest["features"] is None else {"own": store.features()}
    for place in sorted((store.root / "views").glob("*/manifest.json")):
        features[place.parent.name] = View.open(place.parent, store).features()
    labels = np.full(len(store.paths), -1) if store.labels is None else store.labels
    train, test = (rows[labels[rows] >= 0] for rows in (store.rows_of(TRAIN), store.rows_of(TEST)))
    if not (len(train) and len(test) and features):
        raise UserError(
            f"{store.root} has {len(train)} training and {len(test)} test images with labels and {len(features)} kinds of "
            f"features; this needs some of each (a view is made by python -m coreg.annotate.view)"
        )
    for view, every in features.items():
        seen = {"train": np.asarray(every[train], dtype=np.float32), "test": np.asarray(every[test], dtype=np.float32)}
        for evidence, probs in changed(store.probs().astype(np.float64), labels):
            classes = {"train": probs[train], "test": probs[test]}
            project = fit_projection(seen["train"], probs.shape[1])
            z = project(seen["train"])
            mixture = fit_mixture(z, classes["train"], choose(z, classes["train"], train)[0])
            student = mixture.of_view(project(seen["test"])).argmax(axis=1)
            most = verdict(seen, classes, train, student, refined=False)["most"]
            right = [float((named == labels[test]).mean()) for named in (classes["test"].argmax(axis=1), student)]
            yield Case(store.root.parent.name, view, evidence, *right, most)


def table(cases: Sequence[Case]) -> list[dict[str, str]]:
    """A row for each data set and kind of evidence."""
    rows = []
    for data, evidence in dict.fromkeys((case.data, case.evidence) for case in cases):
        some = [case for case in cases if (case.data, case.evidence) == (data, evidence)]
        best = [max(case.annotator, case.by_view) for case in some]
        always = {
            who: statistics.fmean(b - getattr(case, who) for b, case in zip(best, some, strict=True))
            for who in ("annotator", "by_view")
        }
        below = [case.annotator - case.by_view for case in some if case.most != "annotator"]
        rows.append(
            {
                "data": data,
                "evidence": evidence,
                "cases": str(len(some)),
                "right": f"{sum(case.lost <= LOST for case in some)} of {len(some)}",
                "mean points lost": f"{100 * statistics.fmean(case.lost for case in some):.1f}",
                "most below the annotator": f"{100 * max([0, *below]):.1f}",
                "always annotator": f"{100 * always['annotator']:.1f}",
                "always view": f"{100 * always['by_view']:.1f}",
            }
        )
    return rows


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and below it every case in which points were lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", nargs="+", type=Path, help="stores whose true labels are known")
    args = parser.parse_args(argv)
    cases = [case for place in args.stores for case in cases_of(AnnotationStore.open(place))]
    print(as_markdown(table(cases)))
    for case in sorted((case for case in cases if case.lost > LOST), key=lambda case: -case.lost):
        print(
            f"{case.data}, {case.view}, {case.evidence}: annotator {case.annotator:.1%}, view {case.by_view:.1%}, "
            f"the answer {case.most} loses {100 * case.lost:.1f}"
        )


if __name__ == "__main__":
    main()
