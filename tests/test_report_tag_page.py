"""The page of a run with several labels an image: numbers by hand, safe with any names, and a list to fill in."""

import html
import math

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve
from test_report_page import EVIL, Page

from coreg.report.multi_metrics import precision_recall
from coreg.report.tag_images import changed_cells, doubtful_labels, sure_cells
from coreg.report.tag_page import page
from coreg.report.tag_record import TagRecord
from coreg.report.tags import measured_splits, tag_page

NAMES = ["sky", "tree", "car", "dog"]


def record_of(names=NAMES, n=40, labelled=True, annotator=True, observed="one", **changed):
    rng, size = np.random.default_rng(0), len(names)
    images = rng.integers(0, 256, (n, 3, 8, 8)).astype(np.uint8)
    truth = {split: np.where(rng.random((rows, size)) < 0.4, 1, -1).astype(np.int8) for split, rows in SPLITS(n)}
    scores = {split: 1 / (1 + np.exp(-rng.normal(size=table.shape) - table)) for split, table in truth.items()}
    similarity = {split: rng.normal(size=table.shape) + 0.3 * table for split, table in truth.items()}
    given = np.zeros((n, size), np.int8)
    if observed == "one":
        rows = np.flatnonzero((truth["train"] > 0).any(axis=1))
        given[rows, (truth["train"][rows] > 0).argmax(axis=1)] = 1
    if observed == "all":
        given = truth["train"].copy()
    at = np.linspace(0.4, 0.7, size)
    if not labelled:
        truth = {split: np.zeros_like(table) for split, table in truth.items()}
    report = {
        "method": "VLPL", "dataset": "pets", "annotator": {"name": "clip"}, "command": "baselines/spml.py --seed 3",
        "labels_used": int((given != 0).sum()), "thresholds_from": "validation labels" if labelled else "predictions",
        "tags": measured_splits(scores, truth, similarity if annotator else None, at), "seed": 3,
        "versions": {"torch": "2.0"}, "hardware": "CPU", "parameters": 1234567,
    }  # fmt: skip
    fields = {
        "report": report, "settings": {"lr": 0.1}, "folder": "runs/a", "annotations": "ann", "class_names": list(names),
        "curves": [{"lr": 0.1, "mAP/test": 0.4 + 0.1 * k, "loss/net1/total": 1 - 0.1 * k, "method/present": 1.0 + k}
                   for k in range(3)],
        "paths": [f"train/{i:03d}.png" for i in range(n)], "pixels": lambda rows: images[rows], "probabilities": scores,
        "truth": truth, "similarity": similarity if annotator else None, "observed": given, "thresholds": at,
        "suggested": similarity["train"] > 0.5 if annotator else None,
    }  # fmt: skip
    return TagRecord(**(fields | changed))


def SPLITS(n):  # noqa: N802
    return (("train", n), ("validation", 20), ("test", 30))


def asked_of(record, known=None):
    """The page to label on that lies beside the page of `record`."""
    known = np.zeros_like(record.observed) if known is None else known
    pictures = lambda rows: [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in record.pixels(rows)]  # noqa: E731
    where = (record.folder, record.annotations, record.paths, record.probabilities["train"])
    return tag_page(record.report | {"class_names": record.class_names}, *where, known, pictures)


def cells_of(text, heading, column):
    """The texts of a column of the table below a heading."""
    table = text.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    rows = [[html.unescape(cell.split(">")[-1]) for cell in row.split("</td>")] for row in table.split("<tr>")[1:]]
    head = [cell.split(">")[-1] for cell in table.split("<tr>")[1].split("</th>")]
    return [row[head.index(column)] for row in rows[1:]]


def test_the_headline_and_the_labels():
    record = record_of()
    text = page(record, asked_of(record))
    shown, truth, scores = Page(text), record.truth["test"], record.probabilities["test"]
    each = [average_precision_score(truth[:, c] > 0, scores[:, c]) for c in range(4)]
    before = [average_precision_score(truth[:, c] > 0, record.similarity["test"][:, c]) for c in range(4)]
    gain = 100 * (np.mean(each) - np.mean(before))
    assert (
        f"{np.mean(each):.1%} mAP on the test images; the annotator had {np.mean(before):.1%} ({gain:+.1f}" in shown.plain
    )
    assert cells_of(text, "Labels", "VLPL’s AP") == [f"{value:.0%}" for value in each]
    assert cells_of(text, "Labels", "annotator’s AP") == [f"{value:.0%}" for value in before]
    assert cells_of(text, "Labels", "test images") == [str((truth[:, c] > 0).sum()) for c in range(4)]
    for column, of in (("precision", lambda named, there: named), ("recall", lambda named, there: there)):
        wanted = []
        for c in range(4):
            named, there = scores[:, c] >= record.thresholds[c], truth[:, c] > 0
            wanted.append(f"{(named & there).sum() / of(named, there).sum():.0%}")
        assert cells_of(text, "Labels", column) == wanted
    given = (record.probabilities["train"] >= record.thresholds).sum(axis=0)
    assert cells_of(text, "Labels", "given") == [str(count) for count in given]
    named = (record.probabilities["train"] >= record.thresholds).sum(axis=1)
    assert f"labels an image {named.mean():.2f} images without any label {(named == 0).mean():.1%}" in shown.plain


def test_precision_and_recall_are_those_of_scikit_learn():
    record = record_of()
    for c in range(4):
        truth, scores = record.truth["test"][:, c], np.round(record.probabilities["test"][:, c], 1)
        hidden = np.where(np.arange(30) % 7 == 0, 0, truth)
        precision, recall = precision_recall(scores, hidden)
        known = hidden != 0
        theirs = precision_recall_curve(hidden[known] > 0, scores[known])
        # theirs ends at recall 0 and is in the other order
        np.testing.assert_allclose(precision[::-1], theirs[0][:-1], atol=1e-12)
        np.testing.assert_allclose(recall[::-1], theirs[1][:-1], atol=1e-12)


def test_pictures_are_sure_ones_changed_ones_and_doubtful_ones():
    record = record_of()
    p, at, given = record.probabilities["train"], record.thresholds, record.observed

    def turns(cells, group):
        """One of each group after the other, in the order of `cells`."""
        counts, keyed = {}, []
        for place, cell in enumerate(cells):
            turn = counts[group(cell)] = counts.get(group(cell), -1) + 1
            keyed.append((turn, place, cell))
        return [cell for _, _, cell in sorted(keyed)]

    every = [(row, c) for row in range(40) for c in range(4) if given[row, c] == 0]
    sure = sorted((cell for cell in every if p[cell] >= at[cell[1]]), key=lambda cell: -p[cell])
    assert sure_cells(record).tolist() == [list(cell) for cell in turns(sure, lambda cell: cell[1])]

    def margin(cell):
        odds = [math.log(x / (1 - x)) for x in (p[cell], at[cell[1]])]
        return abs(odds[0] - odds[1])

    changed = [cell for cell in every if (p[cell] >= at[cell[1]]) != record.suggested[cell]]
    changed = turns(sorted(changed, key=lambda cell: -margin(cell)), lambda cell: (cell[1], record.suggested[cell]))
    assert changed_cells(record).tolist() == [list(cell) for cell in changed]
    for row in range(40):
        wanted = sorted((cell for cell in every if cell[0] == row), key=margin)[:3]
        assert doubtful_labels(record, row).tolist() == [c for _, c in wanted]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("annotator", [True, False])
@pytest.mark.parametrize("observed", ["one", "all", "none"])
def test_whatever_there_is_not_is_left_out(labelled, annotator, observed):
    record = record_of(labelled=labelled, annotator=annotator, observed=observed)
    shown = Page(page(record, asked_of(record)))
    assert ("mAP on the test images" in shown.plain) == labelled == ("What a threshold costs" in shown.plain)
    assert ("the annotator had" in shown.plain) == (labelled and annotator)
    assert ("What changed from the annotator" in shown.plain) == (annotator and observed != "all")
    assert ("Most confident" in shown.plain) == (observed != "all") and "label these next" in shown.plain
    assert "label these next" not in Page(page(record, asked_of(record, record.truth["test"][:1].repeat(40, 0) | 1))).plain
    assert ("became right" in shown.plain) == (labelled and annotator and observed != "all")


def test_the_epoch_that_was_kept_is_named():
    record = record_of()
    assert "The network is that of epoch" not in page(record, asked_of(record))
    for epoch in (3, 2):
        record.report["epoch"] = epoch
        assert ("that of epoch 2 of 3, the best" in page(record, asked_of(record))) == (epoch == 2)


def test_nothing_predicted_and_nothing_there():
    record = record_of(thresholds=np.full(4, 1.5))
    shown = Page(page(record, asked_of(record)))
    assert "images without any label 100.0%" in shown.plain and "0 of 4" in shown.plain and "nan" not in shown.plain
    record = record_of()
    record.truth["test"][:, 1] = -1
    record.report["tags"] = measured_splits(record.probabilities, record.truth, record.similarity, record.thresholds)
    shown = Page(page(record, asked_of(record)))
    assert "1 labels that no such image has count 0" in shown.plain
    assert not any("of tree" in label for label in shown.labels("aria-label") if label.startswith("precision over"))


def test_names_cannot_break_out():
    evil = [*EVIL, "</svg><script>"]
    record = record_of(evil, paths=[f"{name}/{i}.png" for i in range(10) for name in evil])
    shown = Page(page(record, asked_of(record)))  # complains about what does not match
    assert "script" not in shown.tags and set(shown.tags) >= {"svg", "img", "table"}
    assert all(name in shown.plain for name in (EVIL[0], EVIL[1], "</svg><script>"))
    assert all(source.startswith("data:image/") or source == "label.html" for source in shown.sources)
    assert "--tags runs/a/label_next.csv --output_dir runs/a-labelled" in shown.plain


def test_many_labels_are_folded():
    record = record_of([f"label {number}" for number in range(40)])
    shown = Page(page(record, asked_of(record)))
    assert "All 40 labels" in shown.plain and len(shown.pictures()) <= 72
