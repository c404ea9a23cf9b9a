"""How often the estimate of accuracy that reports give without labels holds the truth, on finished runs that know it.

    python -m benchmarks.estimates runs/*/*

Each run is a folder DATASET/RUN. Reports of older versions have no estimate; for them its scores are made again, from
labels.csv and from what the export predicts of the test images.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import as_markdown
from coreg.config import read_yaml
from coreg.data.images import TEST
from coreg.errors import UserError, exits_with_one_line
from coreg.export.predict import load_classifier
from coreg.report.estimate import MARGIN, estimates
from coreg.report.record import SETTINGS, finished_report
from coreg.store.store import AnnotationStore

AIM = 0.9  # share of runs whose interval is to hold the truth, by which a margin is chosen


@dataclass(frozen=True)
class Case:
    """A split of a run whose accuracy is known."""

    data: str
    split: str
    scores: tuple[float, ...]
    accuracy: float

    @property
    def needed(self) -> float:
        """The margin from which on the interval holds the accuracy."""
        return max(min(self.scores) - self.accuracy, self.accuracy - max(self.scores), 0.0)

    def width(self, margin: float) -> float:
        """Of the interval."""
        return min(1.0, max(self.scores) + margin) - max(0.0, min(self.scores) - margin)


def scores_of(folder: Path, report: dict[str, Any], most: int) -> dict[str, dict[str, Any]]:
    """What the report estimates, or what it would, by predicting `most` test images."""
    if report.get("estimate"):
        return report["estimate"]
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        confidence = {"train": statistics.fmean(float(line["probability"]) for line in csv.DictReader(file))}
    if most and (folder / "export").is_dir() and report["images"].get("test"):
        store = AnnotationStore.open(read_yaml(folder / SETTINGS)["annotations"])
        rows, total = store.rows_of(TEST), 0.0
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, most).astype(int))]
        for _, probabilities, _ in load_classifier(folder / "export").batches(store.images(), 256, 1, rows):
            total += float(probabilities.max(axis=1).sum())
        confidence["test"] = total / len(rows)
    return estimates(confidence, report["label_free"], report["images"])


def cases_of(folder: Path, most: int) -> list[Case]:
    """The splits of a run whose accuracy is known and estimated; none where training was given all labels."""
    report = finished_report(folder / "report.json")
    if report["labels_used"] >= report["images"]["train"]:
        return []
    made, known = scores_of(folder, report, most), report.get("accuracy", {})
    return [
        Case(folder.parent.name, split, tuple(one["scores"].values()), known[split]["ensemble"])
        for split, one in made.items()
        if split in known
    ]


def margin_of(cases: Sequence[Case]) -> float:
    """The smallest margin that holds the truth in the share `AIM` of the cases, or more."""
    return float(np.quantile([case.needed for case in cases], AIM, method="higher"))


def table(cases: Sequence[Case], margin: float = MARGIN) -> list[dict[str, str]]:
    """A row for each data set and split, and one for each split over all data sets."""
    rows = []
    for split in ("train", "test"):
        every = [case for case in cases if case.split == split]
        for data in [*sorted({case.data for case in every}), "all"]:
            some = [case for case in every if data in ("all", case.data)]
            others = [case for case in every if case.data != data] if data != "all" else []
            elsewhere = margin_of(others) if others else None
            if not some:
                continue
            off = [statistics.median(case.scores) - case.accuracy for case in some]
            rows.append(
                {
                    "images": split,
                    "data": data,
                    "runs": str(len(some)),
                    "held the truth": _held(some, margin),
                    "mean width": f"{statistics.fmean(case.width(margin) for case in some):.2f}",
                    "mean error": f"{statistics.fmean(map(abs, off)):.3f}",
                    "mean bias": f"{statistics.fmean(off):+.3f}",
                    "held, margin of the other sets": (
                        "–" if elsewhere is None else f"{_held(some, elsewhere)} (± {elsewhere:.2f})"
                    ),
                }
            )
    return rows


def _held(cases: Sequence[Case], margin: float) -> str:
    return f"{sum(case.needed <= margin for case in cases)} of {len(cases)}"


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, DATASET/RUN; others are passed over")
    parser.add_argument("--images", type=int, default=300, help="test images to predict, spread evenly; 0: none")
    given = parser.parse_args(argv)
    finished = [folder for folder in given.runs if all((folder / name).is_file() for name in ("labels.csv", "report.json"))]
    cases = [case for folder in finished for case in cases_of(folder, given.images)]
    if not cases:
        raise UserError("none of these folders is a finished run whose accuracy is known; give runs/*/*")
    print(as_markdown(table(cases)))


if __name__ == "__main__":
    main()
