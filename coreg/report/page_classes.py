"""The part of a run's page about classes: which were taken for which, and how each one fares."""

from __future__ import annotations

import math

import numpy as np

from coreg.report.metrics import per_class_accuracy
from coreg.report.page_record import RunRecord, Split
from coreg.webpage import percent, table, text

LARGEST_MATRIX = 24  # classes; a larger matrix is no longer read by anybody
PAIRS = 12  # most frequent changes that are listed
LONG = 30  # classes; a longer table is folded
STYLE = """
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:.5rem 2rem}.side>*{min-width:0}
.matrix td{padding:.1rem .15rem;min-width:2.1rem;height:1.7rem;text-align:center;border:1px solid var(--paper);
background:rgb(var(--moved)/var(--s))}
.matrix td.same{background:rgb(var(--heat)/var(--s))}
.matrix td:first-child,.matrix th:first-child{background:none;border:0;padding-right:.5rem;max-width:9rem;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap;text-align:right;color:var(--muted)}
.matrix th{border:0;padding:.2rem 0;text-align:center}
.matrix th span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:8rem;overflow:hidden;text-overflow:ellipsis;
white-space:nowrap}
.pairs{list-style:none;margin:.4rem 0;padding:0;columns:13rem;font-size:.875rem}
.pairs li{break-inside:avoid;padding:.12rem 0}.pairs b{font-variant-numeric:tabular-nums;margin-left:.3rem}
.track{position:relative;display:inline-block;width:7rem;height:.5rem;border-radius:3px;background:var(--track);
vertical-align:middle}
.track i{position:absolute;top:0;bottom:0;border-radius:3px;background:var(--good)}.track i.down{background:var(--bad)}
.track b{position:absolute;top:-.2rem;width:.2rem;height:.9rem;margin-left:-.1rem;border-radius:1px;background:var(--ink)}
"""


def counts_of_pairs(first: np.ndarray, second: np.ndarray, n_classes: int) -> np.ndarray:
    """int64 (C, C): images that `first` calls the row's class and `second` the column's. int64 (n,) each, in 0..C-1."""
    return np.bincount(first * n_classes + second, minlength=n_classes**2).reshape(n_classes, n_classes)


def section(record: RunRecord) -> str:
    """Confusions, the most frequent changes, and a row for each class."""
    train, names = record.train, record.class_names
    parts = ["<h2>Classes</h2>"]
    if len(names) <= LARGEST_MATRIX:
        counts = counts_of_pairs(train.annotator, train.predicted, len(names))
        matrices = [_matrix(counts, names, f"Annotator → {record.method}, training images")]
        if record.judged is not None:
            name, split = record.judged
            known = split.labels >= 0
            truth = counts_of_pairs(split.labels[known], split.predicted[known], len(names))
            matrices.append(_matrix(truth, names, f"Truth → {record.method}, {name} images"))
        parts.append("<p>Rows are the first, columns the second. What is off the diagonal was changed, or is wrong.</p>")
        parts.append(f'<div class="side">{"".join(matrices)}</div>')
    return "\n".join([*parts, _pairs(train, names), _table(record)])


def _matrix(counts: np.ndarray, names: list[str], title: str) -> str:
    """Each row's counts, shaded by their share of the row; what is on the diagonal agrees."""
    head = ["", *(f'<span title="{text(name)}">{text(name)}</span>' for name in names)]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for i, name in enumerate(names):
        cells = [f'<td title="{text(name)}">{text(name)}</td>']
        for j, count in enumerate(counts[i]):
            same = ' class="same"' if i == j else ""
            # half strength at most, so that the number stays readable
            cells.append(f'<td{same} style="--s:{0.5 * math.sqrt(shares[i, j]):.2f}">{count or ""}</td>')
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div><h3>{text(title)}</h3><div class="scroll"><table class="matrix">{"".join(lines)}</table></div></div>'


def _pairs(train: Split, names: list[str]) -> str:
    changed = np.flatnonzero(train.annotator != train.predicted)
    if not len(changed):
        return ""
    pairs, counts = np.unique(np.stack([train.annotator, train.predicted])[:, changed], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:PAIRS]
    rows = "".join(
        f"<li>{text(names[a])} → {text(names[b])} <b>{n:,}</b></li>" for (a, b), n in zip(pairs.T[order], counts[order])
    )
    return f'<h3>Most frequent changes of the annotator’s labels</h3><ul class="pairs">{rows}</ul>'


def _table(record: RunRecord) -> str:
    train, names = record.train, record.class_names
    before, after = (np.bincount(p, minlength=len(names)) for p in (train.annotator, train.predicted))
    sure = np.bincount(train.predicted, weights=train.sure, minlength=len(names)) / np.maximum(after, 1)
    trusted = np.mean([weight > 0.5 for weight in record.weights], axis=0) if record.weights else np.zeros(len(train.sure))
    trusted = np.bincount(train.annotator, weights=trusted, minlength=len(names)) / np.maximum(before, 1)
    head = ["class"]
    if record.judged:
        split = record.judged[1]
        right, own = (per_class_accuracy(p, split.labels, len(names)) for p in (split.annotator, split.predicted))
        images = np.bincount(split.labels[split.labels >= 0], minlength=len(names))
        head += [f"{record.judged[0]} images", "annotator right", f"{text(record.method)} right", "from → to"]
    head += ["annotator’s images", f"{text(record.method)}’s images", "sure, mean"]
    head += ["trusted"] if record.weights else []
    rows = []
    for c, name in enumerate(names):
        row = [text(name)]
        if record.judged:
            row += [f"{images[c]:,}", percent(right[c], 0), percent(own[c], 0), track(right[c], own[c])]
        row += [f"{before[c]:,}", f"{after[c]:,}", percent(sure[c] if after[c] else None, 0)]
        row += [percent(trusted[c] if before[c] else None, 0)] if record.weights else []
        rows.append(row)
    shown = table(head, rows)
    if len(names) > LONG:
        return f"<details><summary>All {len(names)} classes</summary>{shown}</details>"
    return f"<h3>Each class</h3>{shown}"


def track(before: float | None, after: float | None) -> str:
    """From one share to another as a bar; empty where one is not known."""
    if before is None or after is None:
        return ""
    low, high, kind = min(before, after), max(before, after), ' class="down"' if after < before else ""
    return (
        f'<span class="track"><i{kind} style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<b style="left:{100 * after:.1f}%"></b></span>'
    )
