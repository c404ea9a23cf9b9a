"""Which images with several labels a person should see, and how: sure ones, changed ones, doubtful ones."""

from __future__ import annotations

import numpy as np

from coreg.report.page_images import gallery, in_turn
from coreg.report.tag_record import TagRecord
from coreg.webpage import percent, text

DOUBTFUL = 3  # labels that stand below an image


def _taking_turns(cells: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cells (n, 2) so that every group (n,) has its turn; within a group they stay in order."""
    return cells[in_turn(groups, np.arange(len(cells)))]


def sure_cells(record: TagRecord) -> np.ndarray:
    """Training images and their labels, (n, 2): of each label in turn, the most probable first, none that was observed."""
    cells = np.argwhere(record.predicted & (record.observed == 0))
    cells = cells[np.argsort(-record.probabilities["train"][tuple(cells.T)], kind="stable")]
    return _taking_turns(cells, cells[:, 1])


def changed_cells(record: TagRecord) -> np.ndarray:
    """Training images and labels, (n, 2), of which the annotator says otherwise, none that was observed.

    Of each label and each kind of change in turn, the surest first.
    """
    if record.suggested is None:
        return np.empty((0, 2), dtype=np.int64)
    cells = np.argwhere((record.predicted != record.suggested) & (record.observed == 0))
    cells = cells[np.argsort(-record.margin[tuple(cells.T)], kind="stable")]
    return _taking_turns(cells, 2 * cells[:, 1] + record.predicted[tuple(cells.T)])


def doubtful_labels(record: TagRecord, row: int) -> np.ndarray:
    """Up to three unknown labels of a training image, int64 (k,), the nearest to its threshold first."""
    margin = np.where(record.observed[row] == 0, record.margin[row], np.inf)
    order = np.argsort(margin, kind="stable")[:DOUBTFUL]
    return order[np.isfinite(margin[order])]


def sure_gallery(record: TagRecord, cells: np.ndarray) -> str:
    """Pictures with one label each, its probability, and whether it is right where that is known."""
    return _of_cells(record, cells, [text(record.class_names[c]) for c in cells[:, 1]])


def changed_gallery(record: TagRecord, cells: np.ndarray) -> str:
    """The same of labels that came or went."""
    signs = ("−" if not record.predicted[row, c] else "+" for row, c in cells)
    return _of_cells(record, cells, [f"{sign} {text(record.class_names[c])}" for sign, (_, c) in zip(signs, cells)])


def _of_cells(record: TagRecord, cells: np.ndarray, heads: list[str]) -> str:
    captions, alts = [], []
    for (row, c), head in zip(cells, heads):
        lines = [f"<b>{head}</b>", percent(record.probabilities["train"][row, c], 0)]
        if truth := int(record.truth["train"][row, c]):
            right = (truth > 0) == bool(record.predicted[row, c])
            kind, sign, word = ("right", "✓", "right") if right else ("wrong", "✗", "wrong")
            lines.append(f'<span class="{kind}">{sign} {word}</span>')
        captions.append("<br>".join(lines))
        alts.append(f"{record.paths[row]}: {record.class_names[c]}")
    return gallery(record, cells[:, 0], captions, alts)


def doubtful_gallery(record: TagRecord, rows: np.ndarray) -> str:
    """Pictures with the labels that are nearest to their thresholds: their probabilities, and thresholds in brackets."""
    captions, alts = [], []
    for number, row in enumerate(rows, start=1):
        labels = doubtful_labels(record, row)
        p, at = record.probabilities["train"][row], record.thresholds
        lines = [f"{text(record.class_names[c])} {percent(p[c], 0)} ({percent(at[c], 0)})" for c in labels]
        captions.append("<br>".join([*lines, f"{number}. {text(record.paths[row])}"]))
        alts.append(f"{record.paths[row]}: {', '.join(record.class_names[c] for c in labels)}?")
    return gallery(record, rows, captions, alts)
