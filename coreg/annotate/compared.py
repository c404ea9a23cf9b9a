"""Which annotator: stores of the same images side by side, with and without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from coreg.data.images import TEST, TRAIN
from coreg.errors import UserError
from coreg.report.metrics import wilson_interval
from coreg.store.merge import images_of
from coreg.store.store import AnnotationStore
from coreg.weak.annotators import estimated_accuracies
from coreg.weak.rules import candidate_sets, mean_candidates
from coreg.webpage import document, percent, table, text

ENOUGH_LABELS = 100  # from which on labels decide, and not estimates
CLEARLY = 0.05  # by which an estimate has to be ahead to count


@dataclass
class Comparison:
    """Annotators of the same images.

    Attributes:
        names: of the A stores. sure: mean largest probability. candidates: mean size of the union's candidate sets.
        never: names of the classes that an annotator never finds most probable.
        same: (A, A), how often two name the same class. covers: (A, A), how often the class that the column's annotator
            names is a candidate of the row's.
        estimated: (A,) accuracies by held-out agreement; None where there are no features, or they say nothing.
        right: of each, images with a label that it names rightly; of `labelled` images. None without labels.
        by: whose features the estimates are from.
    """

    names: list[str]
    classes: int
    images: int
    sure: list[float] = field(default_factory=list)
    candidates: list[float] = field(default_factory=list)
    never: list[list[str]] = field(default_factory=list)
    same: np.ndarray | None = None
    covers: np.ndarray | None = None
    estimated: np.ndarray | None = None
    right: list[int] | None = None
    labelled: int = 0
    by: str = ""


def compare(stores: Sequence[AnnotationStore]) -> Comparison:
    """Compare annotators on the images that all of them could read.

    Raises:
        UserError: fewer than two stores, other images or classes, or sets that no annotator made.
    """
    if len(stores) < 2:
        raise UserError("compare needs two stores of the same images or more: python -m coreg.annotate compare ann1 ann2")
    for store in stores:
        store.need_annotator()
        if images_of(store) != images_of(stores[0]) or store.class_names != stores[0].class_names:
            raise UserError(
                f"{store.root} has other images or class names than {stores[0].root}; compare stores of the same"
            )
    readable = ~np.logical_or.reduce([store.unreadable for store in stores])
    rows = np.flatnonzero(readable & np.isin(stores[0].split, (TRAIN, TEST)))
    if not len(rows):
        raise UserError("there is no image that all of these annotators could read")
    probs = [store.probs()[rows] for store in stores]
    named = np.stack([table.argmax(axis=1) for table in probs])
    sets = [candidate_sets(store)[rows] for store in stores]
    names = stores[0].class_names
    made = Comparison([str(store.root) for store in stores], len(names), len(rows))
    made.sure = [float(table.max(axis=1).astype(np.float64).mean()) for table in probs]
    made.candidates = [mean_candidates(each) for each in sets]
    made.never = [[names[c] for c in range(len(names)) if not (each == c).any()] for each in named]
    made.same = np.array([[float((a == b).mean()) for b in named] for a in named])
    made.covers = np.array([[float(of[np.arange(len(rows)), b].mean()) for b in named] for of in sets])
    source = next((store for store in stores if store.manifest["features"] is not None), None)
    if source is not None and len(rows) >= 3:
        made.estimated = estimated_accuracies(source.features()[rows], probs, rows)
        made.by = str(source.root)
    labels = stores[0].labels[rows] if stores[0].labels is not None else np.full(len(rows), -1)
    if (known := labels >= 0).any():
        made.labelled = int(known.sum())
        made.right = [int((each[known] == labels[known]).sum()) for each in named]
    return made


def recommendation(made: Comparison) -> str:
    """Which annotator to take, and why, in words."""
    if made.right is not None and made.labelled >= ENOUGH_LABELS:
        shares = [right / made.labelled for right in made.right]
        best, second = np.argsort(shares)[::-1][:2]
        low, high = wilson_interval(shares[best], made.labelled)[0], wilson_interval(shares[second], made.labelled)[1]
        measured = (
            f"it is right on {shares[best]:.1%} of {made.labelled} labelled images, the next one on {shares[second]:.1%}"
        )
        if low > high:
            return f"Take {made.names[best]}: {measured}, and their 95 % intervals are apart."
        return f"Take {made.names[best]}, or merge them: {measured}, which may be chance."
    if made.estimated is None:
        return (
            "Nothing can be recommended: nobody's features tell the classes apart well enough to judge by. Label "
            f"{ENOUGH_LABELS} images, or merge the stores."
        )
    best, second = np.argsort(made.estimated)[::-1][:2]
    first, next_one = made.estimated[[best, second]]
    estimated = f"by held-out agreement it is right on about {first:.0%}, the next one on about {next_one:.0%}"
    if first - next_one > CLEARLY:
        return f"Take {made.names[best]}, or merge with --weights agreement: {estimated}. No label was used."
    return f"Merge them: {estimated}, which is no clear difference. No label was used."


_HEADS = ["annotator", "estimated accuracy", "accuracy (labels)", "mean probability", "candidates", "classes never named"]


def _rows(made: Comparison) -> list[list[str]]:
    rows = []
    for number, name in enumerate(made.names):
        right = "–"
        if made.right is not None:
            share = made.right[number] / made.labelled
            low, high = wilson_interval(share, made.labelled)
            right = f"{share:.1%} ({low:.1%} to {high:.1%})"
        estimated = None if made.estimated is None else float(made.estimated[number])
        never = ", ".join(made.never[number][:5]) + (" …" if len(made.never[number]) > 5 else "")
        shares = [percent(estimated, 0), right, percent(made.sure[number])]
        rows.append([name, *shares, f"{made.candidates[number]:.2f}", never or "none"])
    return rows


def _pairs(made: Comparison, shares: np.ndarray) -> list[list[str]]:
    return [[name, *(percent(share) for share in row)] for name, row in zip(made.names, shares)]


def _notes(made: Comparison) -> list[str]:
    labels = f"Accuracy is of {made.labelled} images with labels, with a 95 % interval." if made.right is not None else ""
    by = f"Estimates go by the features of {made.by} and by nobody's label." if made.estimated is not None else ""
    return [line for line in (f"{made.images} images that all could read.", by, labels) if line]


def as_lines(made: Comparison) -> str:
    """The comparison for a terminal."""
    blocks = [(_HEADS, _rows(made)), (["names the same as", *made.names], _pairs(made, made.same)),
              (["has as a candidate what is named by", *made.names], _pairs(made, made.covers))]  # fmt: skip
    lines = []
    for heads, rows in blocks:
        widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [heads, *rows]]
        lines.append("")
    return "\n".join([*lines, *_notes(made), recommendation(made)])


def as_page(made: Comparison) -> str:
    """The comparison as a page that loads nothing from elsewhere."""

    def cells(rows: list[list[str]]) -> list[list[str]]:
        return [[text(cell) for cell in row] for row in rows]

    names = [text(name) for name in made.names]
    return document(
        "Annotators compared",
        f"<h1>Annotators compared</h1><p><strong>{text(recommendation(made))}</strong></p>",
        table([text(head) for head in _HEADS], cells(_rows(made))),
        "<h2>How often two name the same class</h2>",
        table(["", *names], cells(_pairs(made, made.same))),
        "<h2>How often a candidate set of the row has the class that the column names</h2>",
        table(["", *names], cells(_pairs(made, made.covers))),
        "".join(f"<p>{text(line)}</p>" for line in _notes(made)),
    )
