"""The report of a run with several labels an image for a person: one HTML file that stands alone, as `coreg.report.page`.

`page` is a pure function of a `TagRecord`, and of the page to label on that lies beside it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from coreg.label.page import LABEL_NEXT, PAGE, LabelPage
from coreg.report import page_charts, page_classes
from coreg.report.multi_metrics import average_precisions, of_predictions, precision_recall
from coreg.report.page import STYLE, colophon, parts_of_loss, series
from coreg.report.page_charts import Curve, Line, line_chart, precision_chart
from coreg.report.page_classes import LONG, track
from coreg.report.page_images import SHOWN
from coreg.report.tag_images import (
    changed_cells,
    changed_gallery,
    doubtful_gallery,
    sure_cells,
    sure_gallery,
)
from coreg.report.tag_record import TagRecord
from coreg.report.tags import THRESHOLDS
from coreg.webpage import document, percent, table, text

LARGEST_GRID = 24  # labels whose precision-recall curves are shown at once
MEASURES = {
    "mAP": "mean average precision of the labels",
    "mAP_of_the_others": "the same of labels that some image has",
    "CF1": "F1 of mean precision and recall of the labels",
    "CP": "mean precision of the labels",
    "CR": "mean recall of the labels",
    "OF1": "F1 of all cells together",
    "OP": "precision of all cells",
    "OR": "recall of all cells",
    "example_F1": "mean F1 of the images",
}
OWN_STYLE = """
.prs{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.8rem 1rem;margin:.8rem 0;max-width:60rem}
.pr svg{display:block;width:100%;height:auto}
.pr figcaption{color:var(--ink);font-weight:600;font-size:.8125rem;white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}
.pr svg text{font-size:9px}
"""


def page(record: TagRecord, asked: LabelPage) -> str:
    """The whole page. Sections for which a run has nothing to show are left out.

    Args:
        asked: the page to label on, which lies beside it.
    """
    sections = (_headline, _health, _curves, _labels, _precision, _changed, _sure)
    parts = [*(section(record) for section in sections), _doubtful(record, asked), colophon(record)]
    style = STYLE + page_charts.STYLE + page_classes.STYLE + OWN_STYLE
    title = f"{record.method} on {record.report['dataset']}"
    return document(title, *parts, style=style)


def _headline(record: TagRecord) -> str:
    report, split = record.report, record.judged
    facts = [
        str(report["dataset"]),
        f"annotated by {report['annotator']['name']}",
        f"{len(record.class_names)} labels",
        f"{len(record.paths):,} training images",
        f"{report['labels_used']:,} observed labels",
    ]
    parts = [f'<p class="kicker">{text(record.method)} · {text(" · ".join(facts))}</p>']
    if split is None:
        mean = record.predicted.sum(axis=1).mean()
        parts.append(f"<h1>{text(record.method)} gives {mean:.1f} labels to an image</h1>")
        parts.append("<p>No true labels are known, so nothing can be measured: below is what can be said without.</p>")
        parts.append(f'<p class="note">Thresholds: {THRESHOLDS[report["thresholds_from"]]}.</p>')
        return "\n".join(parts)
    measured = report["tags"][split]
    before = measured.get("annotator")
    gain = f"; the annotator had {percent(before)} ({100 * (measured['mAP'] - before):+.1f} points)" if before else ""
    parts.append(f"<h1>{percent(measured['mAP'])} mAP on the {_name(split)} images{gain}</h1>")
    tiles = {"mAP": measured["mAP"], "CF1": measured["CF1"], "OF1": measured["OF1"]}
    shown = "".join(f"<div><dt>{name}</dt><dd>{percent(value)}</dd></div>" for name, value in tiles.items())
    parts.append(f'<dl class="tiles">{shown}</dl>')
    notes = [f"{measured['images']:,} {_name(split)} images. Thresholds: {THRESHOLDS[report['thresholds_from']]}."]
    if (epoch := report.get("epoch", len(record.curves))) != len(record.curves):
        notes.append(f"The network is that of epoch {epoch} of {len(record.curves)}, the best on validation images.")
    if missing := measured["labels_without_images"]:
        notes.append(f"{missing} labels that no such image has count 0 in the mean.")
    parts.append(f'<p class="note">{" ".join(notes)}</p>')
    rows = [(text(words), percent(measured[name])) for name, words in MEASURES.items() if name in measured]
    for k in (1, 3, 5):
        words = {"precision": f"of the {k} most probable labels, right ones", "recall": "of the right labels, among them"}
        keys = {name: f"{name}_at_{k}" for name in words}
        rows += [(words[name], percent(measured[key])) for name, key in keys.items() if key in measured]
    parts.append(f"<details><summary>Other metrics</summary>{table(('', ''), rows, 'facts')}</details>")
    return "\n".join(parts)


def _name(split: str) -> str:
    return {"train": "training"}.get(split, split)


def _health(record: TagRecord) -> str:
    """What can be said without any label."""
    predicted, observed = record.predicted, record.observed
    counts = predicted.sum(axis=0)
    facts = {
        "labels an image": f"{predicted.sum(axis=1).mean():.2f}",
        "images without any label": percent((~predicted.any(axis=1)).mean()),
        "labels that are given at all": f"{int((counts > 0).sum())} of {len(counts)}",
    }
    if (observed > 0).any():
        facts["observed labels that are predicted"] = percent(predicted[observed > 0].mean())
    if record.suggested is not None:
        suggested = record.suggested
        facts["labels an image, as the annotator suggests"] = f"{suggested.sum(axis=1).mean():.2f}"
        facts["images to which it suggests none"] = percent((~suggested.any(axis=1)).mean())
        if suggested.any():
            facts["suggested labels that are kept"] = percent(predicted[suggested].mean())
        if predicted.any():
            facts["labels that it had not suggested"] = percent((~suggested)[predicted].mean())
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return f'<h2>Health, without any label</h2><p>Of the training images:</p><dl class="tiles">{tiles}</dl>'


def _curves(record: TagRecord) -> str:
    if not record.curves:
        return ""
    judged = [Line(_name(split), series(record, f"mAP/{split}"), c) for split, c in (("test", "a"), ("validation", "c"))]
    before = record.report["tags"].get("test", {}).get("annotator")
    if before is not None and np.isfinite(judged[0].values).any():
        judged.append(Line("annotator, test", np.full(len(record.curves), before), "muted", "dashed"))
    own = (name for curves in record.curves for name in curves if name.startswith("method/"))
    parts = parts_of_loss(record)
    titles = {name: name.removeprefix("method/").replace("_", " ").capitalize() for name in own}
    charts = [
        line_chart("mAP", judged, True),
        line_chart("Loss", [Line("of the network", series(record, "loss/net1/total"), "b")], False),
        line_chart("Parts of the loss", parts, False) if len(parts) > 1 else "",
        *(line_chart(title, [Line("all images", series(record, name), "d")], False) for name, title in titles.items()),
        line_chart("Learning rate", [Line("lr", series(record, "lr"), "a")], False),
    ]
    return '<h2>How training went</h2><div class="charts">' + "\n".join(charts) + "</div>"


def _labels(record: TagRecord) -> str:
    """A row for each label: how well it is ranked, and where its threshold stands."""
    split, predicted = record.judged, record.predicted
    head = ["label"]
    if split is not None:
        measured = record.report["tags"][split]
        truth, named = record.truth[split] > 0, record.probabilities[split] >= record.thresholds
        before = _annotators(record, split)
        head += [f"{_name(split)} images"] + (["annotator’s AP"] if before is not None else [])
        head += [f"{text(record.method)}’s AP", "", "precision", "recall"]
    head += ["threshold", "observed", *(["suggested"] if record.suggested is not None else []), "given"]
    rows = []
    for c, name in enumerate(record.class_names):
        row = [text(name)]
        if split is not None:
            each = of_predictions(named[:, [c]], record.truth[split][:, [c]])
            after, first = measured["average_precision"][c], None if before is None else before[c]
            row += [f"{int(truth[:, c].sum()):,}", *([percent(first, 0)] if before is not None else []), percent(after, 0)]
            row += [track(0.0 if first is None else first, after), percent(each["OP"], 0), percent(each["OR"], 0)]
        row += [f"{record.thresholds[c]:.2f}", f"{int((record.observed[:, c] > 0).sum()):,}"]
        row += [f"{int(record.suggested[:, c].sum()):,}"] if record.suggested is not None else []
        rows.append([*row, f"{int(predicted[:, c].sum()):,}"])
    shown = table(head, rows)
    note = (
        "<p>AP is average precision: whether images that have the label are ranked before those that have not. Precision "
        "and recall are at the threshold. Observed, suggested by the annotator and given: training images.</p>"
    )
    if len(record.class_names) > LONG:
        shown = f"<details><summary>All {len(record.class_names)} labels</summary>{shown}</details>"
    return f"<h2>Labels</h2>{note}{shown}"


def _annotators(record: TagRecord, split: str) -> list[float | None] | None:
    """The annotator's average precision of each label that some image of the split has; None without an annotator."""
    if record.similarity is None:
        return None
    truth = record.truth[split]
    return [
        float(v) if some else None for v, some in zip(average_precisions(record.similarity[split], truth), truth.max(0) > 0)
    ]


def _precision(record: TagRecord) -> str:
    """Precision over recall of each label that is known to be present somewhere."""
    split = record.judged
    if split is None:
        return ""
    truth, scores, charts = record.truth[split], record.probabilities[split], []
    for c in np.flatnonzero((truth > 0).any(axis=0)):
        precision, recall = precision_recall(scores[:, c], truth[:, c])
        curves = [Curve(recall, precision, "a")]
        if record.similarity is not None:
            precision, recall = precision_recall(record.similarity[split][:, c], truth[:, c])
            curves.append(Curve(recall, precision, "muted", "dashed"))
        named = of_predictions(scores[:, [c]] >= record.thresholds[c], truth[:, [c]])
        charts.append(precision_chart(record.class_names[c], curves, (named["OR"], named["OP"])))
    shown = f'<div class="prs">{"".join(charts)}</div>'
    if len(charts) > LARGEST_GRID:
        shown = f"<details><summary>All {len(charts)} labels</summary>{shown}</details>"
    dashed = ", dashed the annotator" if record.similarity is not None else ""
    note = f"Precision (up) over recall (right) in %, {_name(split)} images{dashed}. The dot is where the threshold stands."
    return f"<h2>What a threshold costs</h2><p>{note}</p>{shown}"


def _changed(record: TagRecord) -> str:
    if record.suggested is None or (record.observed != 0).all():
        return ""
    cells = changed_cells(record)
    if not len(cells):
        return "<h2>What changed from the annotator</h2><p>Nothing: labels that nobody gave are as it suggests.</p>"
    came = record.predicted[tuple(cells.T)]
    note = (
        f"{int(came.sum()):,} labels came (+) that the annotator does not suggest, and {int((~came).sum()):,} went (−) "
        f"that it does. "
    )
    truth = record.truth["train"][tuple(cells.T)]
    if known := int((truth != 0).sum()):
        note += f"Of {known:,} whose truth is known, {int(((truth > 0) == came)[truth != 0].sum()):,} became right. "
    note += f"Shown are {min(SHOWN, len(cells))}: each kind of change in turn, the surest first."
    return f"<h2>What changed from the annotator</h2><p>{note}</p>" + changed_gallery(record, cells[:SHOWN])


def _sure(record: TagRecord) -> str:
    cells = sure_cells(record)
    if not len(cells):
        return ""
    note = "Labels that nobody gave and that are most probable, each in turn. If some of these are wrong, do not go on."
    return f"<h2>Most confident</h2><p>{note}</p>" + sure_gallery(record, cells[:SHOWN])


def _doubtful(record: TagRecord, asked: LabelPage) -> str:
    if not asked.images:
        return ""
    folder = Path(record.folder)
    command, place = shlex.join(["coreg-label", str(folder)]), {path: row for row, path in enumerate(record.paths)}
    rows = np.array([place[image.path] for image in asked.images[:SHOWN]])
    return (
        f"<h2>Most doubtful: label these next</h2><p>The {len(asked.images)} images of which most labels are likely to be "
        f'wrong, the likeliest labels in turn. <a href="{PAGE}">{text(folder / PAGE)}</a> asks for one after the other and '
        f"saves a file; <code>{text(command)}</code> asks likewise and writes the file into the run folder. Or fill in the "
        f"columns <code>labels</code> and <code>absent</code> of <code>{text(folder / LABEL_NEXT)}</code> by hand, "
        f"<code>;</code> between names; rows that stay empty do not count. Then train again:</p>"
        f"<pre>{text(asked.next_command(folder))}</pre><p>Below each stand the labels that are nearest to their "
        f"thresholds: probability, and threshold in brackets.</p>"
    ) + doubtful_gallery(record, rows)
