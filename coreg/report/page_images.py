"""Which images a person should see, and how: labels that the method changed, and images it is unsure of."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np
from PIL import Image

from coreg.data.labels import NONE_OF_THESE
from coreg.label.page import Asked, LabelPage, photo
from coreg.report.page_record import Record, RunRecord
from coreg.webpage import percent, picture, picture_of, text

SHOWN = 24  # pictures of a gallery
ASKED = 100  # images that a person is asked about
LIKELY = 9  # classes that are named of each, as many as there are digits to press


def in_turn(groups: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows so that every group has its turn: the first of each group in `order`, then the second of each, and so on.

    Args:
        groups: int (N,). order: rows (n,), the wanted order within a group; within a turn groups come in this order too.

    Returns:
        The same rows (n,).
    """
    by_group = order[np.argsort(groups[order], kind="stable")]
    _, starts, counts = np.unique(groups[by_group], return_index=True, return_counts=True)
    turn = np.empty(len(groups), dtype=np.int64)
    turn[by_group] = np.arange(len(by_group)) - np.repeat(starts, counts)
    return order[np.argsort(turn[order], kind="stable")]


def changed_rows(record: RunRecord) -> np.ndarray:
    """Training images whose label differs from the annotator's and that nobody labelled, (n,).

    One of each pair (annotator's class, own class) after the other, the surest first.
    """
    train = record.train
    rows = np.flatnonzero((train.predicted != train.annotator) & (record.known == -1))
    order = rows[np.argsort(-train.sure[rows], kind="stable")]
    return in_turn(train.annotator * len(record.class_names) + train.predicted, order)


def unsure_rows(record: RunRecord) -> np.ndarray:
    """Training images that nobody labelled, those first whose label is worth most, (n,).

    That is a small margin between the two likeliest classes of the networks' mean opinion (margin sampling; a
    contradiction of two sure networks gives one too). Classes take turns, by the own label, so that one class that is hard
    throughout does not take all places.
    """
    rows = np.flatnonzero(record.known == -1)
    top = np.partition(record.train.opinion[rows], -2, axis=1)[:, -2:]
    order = rows[np.argsort(top[:, 1] - top[:, 0], kind="stable")]
    return in_turn(record.train.predicted, order)


def label_page(record: RunRecord) -> LabelPage:
    """What a person is asked after a run, the image whose label is worth most first."""
    rows, names = unsure_rows(record)[:ASKED], record.class_names
    photos = record.photos(rows) if record.photos else [picture_of(pixels) for pixels in record.pixels(rows)]
    known = [[record.paths[row], names[record.known[row]]] for row in np.flatnonzero(record.known >= 0)]
    return LabelPage(
        run=record.folder,
        several=False,
        class_names=names,
        images=asked([record.paths[row] for row in rows], record.train.opinion[rows], photos),
        others=known + [[path, NONE_OF_THESE] for path in record.none],
        script=script_of(record.report),
        annotations=record.annotations,
        few_shot=bool(record.settings.get("few_shot")),
    )


def asked(paths: list[str], shares: np.ndarray, photos: list[Image.Image]) -> list[Asked]:
    """Images to ask about, in order. shares: (n, C), probabilities of the classes."""
    likely = np.argsort(-shares, axis=1, kind="stable")[:, :LIKELY]
    return [
        Asked(path, [(int(index), round(float(row[index]), 4)) for index in best], photo(image))
        for path, row, best, image in zip(paths, shares, likely, photos)
    ]


def script_of(report: dict[str, Any]) -> str:
    """The script that made a report."""
    return next(iter(shlex.split(report.get("command", ""))), "train_coreg.py")


def changed_gallery(record: RunRecord, rows: np.ndarray) -> str:
    """Pictures with both labels, how sure the own one is, trust w in the candidate set, and the truth where it is known."""
    train, names = record.train, record.class_names
    predicted, sure = train.predicted, train.sure
    captions = []
    for row in rows:
        before, after = names[train.annotator[row]], names[predicted[row]]
        lines = [f"{text(before)} → <b>{text(after)}</b>", f"sure {percent(sure[row], 0)}"]
        if record.weights:
            lines.append("trust " + ", ".join(f"{weight[row]:.2f}" for weight in record.weights))
        if train.labels[row] >= 0:
            right = train.labels[row] == predicted[row]
            wrong = f'<span class="wrong">✗ is {text(names[train.labels[row]])}</span>'
            lines.append('<span class="right">✓ right</span>' if right else wrong)
        captions.append("<br>".join(lines))
    alts = [f"{record.paths[row]}: {names[train.annotator[row]]} became {names[predicted[row]]}" for row in rows]
    return gallery(record, rows, captions, alts)


def unsure_gallery(record: RunRecord, rows: np.ndarray) -> str:
    """Pictures with the two likeliest classes and their probabilities."""
    names, opinion = record.class_names, record.train.opinion[rows]
    captions, alts = [], []
    for number, (row, shares) in enumerate(zip(rows, opinion), start=1):
        first, second = np.argsort(-shares, kind="stable")[:2]
        guess = f"{text(names[first])} {percent(shares[first], 0)}<br>{text(names[second])} {percent(shares[second], 0)}"
        captions.append(f"{guess}<br>{number}. {text(record.paths[row])}")
        alts.append(f"{record.paths[row]}: {names[first]} or {names[second]}")
    return gallery(record, rows, captions, alts)


def gallery(record: Record, rows: np.ndarray, captions: list[str], alts: list[str]) -> str:
    """Pictures of training images `rows` (n,), each with a caption, HTML, and what stands for it as text."""
    figures = [
        f"<figure>{picture(picture_of(pixels), alt)}<figcaption>{caption}</figcaption></figure>"
        for pixels, caption, alt in zip(record.pixels(rows), captions, alts)
    ]
    return '<div class="gallery">' + "\n".join(figures) + "</div>"
