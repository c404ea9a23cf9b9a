"""The report of a run for a person: one HTML file that stands alone and needs no true labels.

`page` is a pure function of its arguments; `write_page` puts report.html, label.html and label_next.csv into the folder.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import numpy as np

from coreg.files import write_atomically
from coreg.label.page import LABEL_NEXT, PAGE, LabelPage, write_label_page
from coreg.report import page_charts, page_classes
from coreg.report.estimate import estimate_lines
from coreg.report.metrics import METRICS, accuracy, entropy, wilson_interval, written
from coreg.report.page_charts import COLOURS, Interval, Line, interval_chart, line_chart, mixture_chart
from coreg.report.page_images import (
    SHOWN,
    changed_gallery,
    changed_rows,
    label_page,
    unsure_gallery,
    unsure_rows,
)
from coreg.report.page_record import Record, RunRecord, Split
from coreg.report.trust import trust_lines
from coreg.webpage import document, percent, table, text

STYLE = """
.kicker{color:var(--muted);margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:1.2rem 0}
.tiles div{background:var(--panel);border-radius:6px;padding:.6rem .8rem}
.tiles dt{color:var(--muted);font-size:.8125rem;line-height:1.3}
.tiles dd{margin:0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
.intervals{max-width:30rem}
.right{color:var(--good)}.wrong{color:var(--bad)}
"""


def write_page(folder: Path, record: RunRecord) -> None:
    """Write report.html, label.html and label_next.csv into the run folder.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    asked = label_page(record)
    write_label_page(folder, asked)
    write_atomically(folder / "report.html", page(record, asked))


def page(record: RunRecord, asked: LabelPage) -> str:
    """The whole page. Sections for which a run has nothing to show are left out.

    Args:
        asked: the page to label on, which lies beside it.
    """
    dataset = str(record.report["dataset"])
    sections = (_headline, _health, _curves, _division, page_classes.section, _changed)
    parts = [*(section(record) for section in sections), _unsure(record, asked), colophon(record)]
    style = STYLE + page_charts.STYLE + page_classes.STYLE
    return document(f"{record.method} on {dataset}", *parts, style=style)


def _headline(record: RunRecord) -> str:
    report, train = record.report, record.train
    facts = [
        str(report["dataset"]),
        f"annotated by {report['annotator']['name']}",
        f"{len(record.class_names)} classes",
        f"{len(record.paths):,} training images",
        *([f"{report['labels_used']:,} labels by a person"] if report.get("labels_used") else []),
    ]
    parts = [f'<p class="kicker">{text(record.method)} · {text(" · ".join(facts))}</p>']
    if record.judged is None:
        changed = int((train.predicted != train.annotator).sum())
        parts.append(f"<h1>{text(record.method)} changed {changed:,} of the annotator’s {len(record.paths):,} labels</h1>")
        parts.append(
            "<p>No true labels are known, so there is no accuracy to report: below is what can be said without.</p>"
        )
    else:
        name, split = record.judged
        before, after = accuracy(split.annotator, split.labels), accuracy(split.predicted, split.labels)
        gain = f"; the annotator had {percent(before)} ({100 * (after - before):+.1f} points)" if _is_judged(record) else ""
        parts.append(f"<h1>{percent(after)} of the {name} images are right{gain}</h1>")
        parts.append(_intervals(record, name, split))
        parts.append(_metrics(record, name, "test" if split is record.test else "train"))
    if estimated := estimate_lines(report):
        parts.append(f'<p class="note">{text(" ".join(estimated))}</p>')
    if verdict := trust_lines(report):
        kind = "good" if report["trust"]["most"] == "student" else "bad"
        parts.append(f'<p class="{kind}">{text(verdict[0])}</p><p class="note">{text(" ".join(verdict[1:]))}</p>')
    if report.get("unmatched_folders"):
        parts.append(f'<p class="note">Folders called like no class: {text(", ".join(report["unmatched_folders"]))}.</p>')
    if report.get("warnings"):
        parts.append(f'<p class="bad">Warning: {text("; ".join(report["warnings"]))}.</p>')
    return "\n".join(parts)


def _is_judged(record: RunRecord) -> bool:
    """Whether the annotator has an accuracy: candidate sets that were drawn from the truth come from nobody."""
    return bool(record.report["annotator"].get("zero_shot_accuracy"))


def _intervals(record: RunRecord, name: str, split: Split) -> str:
    known = split.labels >= 0
    n = int(known.sum())
    predictions = {"annotator": split.annotator} if _is_judged(record) else {}
    predictions[record.method] = split.predicted
    if len(split.networks) > 1:
        predictions |= {name: logits.argmax(axis=1) for name, logits in split.networks.items()}
    rows = []
    for number, (who, predicted) in enumerate(predictions.items(), start="annotator" not in predictions):
        share = accuracy(predicted, split.labels)
        rows.append(Interval(who, share, *wilson_interval(share, n), ("muted", "a", "b", "c")[min(number, 3)]))
    mended = record.report.get("refined", {}).get("accuracy", {}).get("test" if split is record.test else "train")
    if mended is not None:
        rows.insert(int(_is_judged(record)), Interval("refined labels", mended, *wilson_interval(mended, n), "muted"))
    before, after = (p[known] == split.labels[known] for p in (split.annotator, split.predicted))
    paired = (
        f" {int((~before & after).sum()):,} of the annotator’s {int((~before).sum()):,} mistakes are set right, "
        f"{int((before & ~after).sum()):,} new ones made."
    )
    paired = paired if _is_judged(record) else ""
    counts = f"{int(known.sum()):,} of {len(known):,} {name} images have a known label"
    note = f"{counts}; lines are 95% intervals (Wilson).{paired}"
    return f'<div class="intervals">{interval_chart(rows)}</div><p class="note">{note}</p>'


def _metrics(record: RunRecord, name: str, split: str) -> str:
    """What is measured of the judged split besides the accuracy."""
    measured = record.report.get("metrics", {}).get(split, {})
    if not measured:
        return ""
    rows = [(text(METRICS[metric]), written(metric, value)) for metric, value in measured.items() if metric in METRICS]
    return f"<details><summary>Other metrics, {name} images</summary>{table(('', ''), rows, 'facts')}</details>"


def _health(record: RunRecord) -> str:
    """What can be said without any label."""
    report, train = record.report, record.train
    named = [logits.argmax(axis=1) for logits in train.networks.values()]
    counts = np.bincount(train.predicted, minlength=len(record.class_names))
    balance = entropy(train.opinion.astype(np.float64).mean(axis=0))
    facts = {"labels as the annotator gave them": percent((train.predicted == train.annotator).mean())}
    if len(named) > 1:
        facts["images on which both networks agree"] = percent((named[0] == named[1]).mean())
    if record.weights:
        facts["candidate sets that are trusted"] = percent(np.mean([(weight > 0.5).mean() for weight in record.weights]))
    scores = report.get("label_free", {})
    if "train" in scores.get("covering_rate", {}):
        facts["predictions among the annotator’s candidates (covering rate)"] = percent(scores["covering_rate"]["train"])
    if "train" in scores.get("approximated_accuracy", {}):
        facts["probability on them, within the candidates (approximated accuracy)"] = percent(
            scores["approximated_accuracy"]["train"]
        )
    if "consensus" in scores:
        facts["agreement times balance of both networks (consensus)"] = percent(scores["consensus"])
    if "needs_review" in report:
        facts["labels worth a look (labels.csv)"] = f"{report['needs_review']:,}"
    facts["classes that are named at all"] = f"{int((counts > 0).sum())} of {len(counts)}"
    facts["balance of the classes (1 is even)"] = f"{balance:.2f}"
    tiles = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return f'<h2>Health, without any label</h2><p>Of the training images:</p><dl class="tiles">{tiles}</dl>'


def series(record: Record, name: str) -> np.ndarray:
    """(E,) values of a curve, NaN in epochs without one."""
    return np.array([curves.get(name, math.nan) for curves in record.curves], dtype=np.float64)


def parts_of_loss(record: Record) -> list[Line]:
    """Parts of the loss, mean over the networks."""
    names: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for curves in record.curves for key in curves):
        group, _, rest = key.partition("/")
        part = rest.partition("/")[2]
        if group == "loss" and part not in ("", "total"):
            names.setdefault(part, []).append(key)
    return [
        Line(name.replace("_", " "), np.mean([series(record, key) for key in keys], axis=0), COLOURS[n % len(COLOURS)])
        for n, (name, keys) in enumerate(names.items())
    ]


def _curves(record: RunRecord) -> str:
    if not record.curves:
        return ""

    def lines(names: dict[str, str], colours: str) -> list[Line]:
        return [Line(label, series(record, name), colour) for (name, label), colour in zip(names.items(), colours)]

    tested = {"accuracy/test/ensemble": record.method, "accuracy/test/net1": "net1", "accuracy/test/net2": "net2"}
    tested = lines(tested, "abc")
    zero_shot = record.report["annotator"].get("zero_shot_accuracy", {}).get("test")
    if zero_shot is not None and np.isfinite(tested[0].values).any():
        tested.append(Line("annotator", np.full(len(record.curves), zero_shot), "muted", "dashed"))
    trust = {"division/trusted": "size of P", "truth/accuracy_in_P": "right in P", "truth/accuracy_in_U": "right in U"}
    agreement = {
        "division/agreement_of_nets": "networks with each other",
        "division/agreement_with_annotator": "networks with the annotator",
    }
    divided = np.flatnonzero(np.isfinite(series(record, "division/trusted")))
    since = int(divided[0]) if len(divided) else 0
    several = len(record.train.networks) > 1
    charts = [
        line_chart("Accuracy on the test images", tested, True, since),
        line_chart("Trusted images P, as a share of all", lines(trust, "acb"), True, since),
        line_chart("Agreement on the training images", lines(agreement, "ac"), True, since),
        line_chart("Loss", lines({f"loss/net{n}/total": f"net{n}" for n in (1, 2)}, "bc"), False, since),
        line_chart("Parts of the loss" + (", mean over networks" if several else ""), parts_of_loss(record), False, since),
        line_chart("Prototypes: mean cosine", lines({"prototypes/mean_cosine": "of different classes"}, "a"), False, since),
        line_chart("Learning rate", lines({"lr": "lr"}, "a"), False, since),
    ]
    notes = ["Shaded epochs are the warm-up, before the first division."] if since else []
    chosen = record.report.get("chosen_epoch")
    if chosen and chosen["epoch"] < chosen["epochs"]:
        notes.append(f"By what can be said without labels, epoch {chosen['epoch']} was the best: it is in export_chosen.")
    return f'<h2>How training went</h2><p>{" ".join(notes)}</p><div class="charts">' + "\n".join(charts) + "</div>"


def _division(record: RunRecord) -> str:
    if not record.losses:
        return ""
    last = record.curves[-1] if record.curves else {}
    charts = []
    for number, (losses, weight) in enumerate(zip(record.losses, record.weights), start=1):
        values = [
            tuple(last.get(f"gmm/net{number}_{what}_{size}", math.nan) for what in ("mean", "deviation", "share"))
            for size in ("small", "large")
        ]
        parts = [value for value in values if all(map(math.isfinite, value))]
        charts.append(mixture_chart(f"Division by net{number}", losses, weight > 0.5, parts))
    return (
        "<h2>The last division</h2><p>Each network scores every candidate set by its loss (scaled to 0..1, mean of the "
        "last epochs); a mixture of two normal distributions splits the images. Two separate hills are a good sign. "
        "Heights are roots of counts.</p>" + '<div class="charts">' + "\n".join(charts) + "</div>"
    )


def _changed(record: RunRecord) -> str:
    train, rows = record.train, changed_rows(record)
    if not len(rows):
        return "<h2>Labels that were changed</h2><p>None: every label is the annotator’s.</p>"
    note = f"{len(rows):,} of {len(record.paths):,} labels differ from the annotator’s."
    known = rows[train.labels[rows] >= 0]
    if len(known):
        before, after = (p[known] == train.labels[known] for p in (train.annotator, train.predicted))
        note += (
            f" Of {len(known):,} whose truth is known, {int(after.sum()):,} became right, {int(before.sum()):,} became "
            f"wrong, {int((~before & ~after).sum()):,} stay wrong."
        )
    note += f" Shown are {min(SHOWN, len(rows))}: each kind of change in turn, the surest first. All are in labels.csv."
    if record.weights:
        note += " Trust is how far each network believes the candidate set (above 0.5: P)."
    return f"<h2>Labels that were changed</h2><p>{note}</p>" + changed_gallery(record, rows[:SHOWN])


def _unsure(record: RunRecord, asked: LabelPage) -> str:
    if not asked.images:
        return ""
    folder = Path(record.folder)
    command = shlex.join(["coreg-label", str(folder)])
    return (
        f"<h2>Label these next</h2><p>The {len(asked.images)} images whose label would teach most: those it is least sure "
        f'of, each class in turn. <a href="{PAGE}">{text(folder / PAGE)}</a> asks for one after the other, by keys or '
        f"buttons, and saves a file; <code>{text(command)}</code> asks likewise and writes the file into the run folder. "
        f"Or fill in the column <code>label</code> of <code>{text(folder / LABEL_NEXT)}</code> by hand; rows that stay "
        f"empty do not count. Then train again:</p><pre>{text(asked.next_command(folder))}</pre>"
    ) + unsure_gallery(record, unsure_rows(record)[:SHOWN])


def colophon(record: Record) -> str:
    """How the run was made: command, times, versions, settings."""
    report = record.report
    measured = {
        "parameters of a network": ("parameters", "{:,}"),
        "of them trained": ("trainable_parameters", "{:,}"),
        "tuned": ("tuning", "{}"),
        "images a second in training": ("images_per_second", "{:,.0f}"),
        "training, seconds": ("training_seconds", "{:,.0f}"),
        "in all, seconds": ("wall_seconds", "{:,.0f}"),
        "peak memory, MB": ("peak_memory_mb", "{:,.0f}"),
        "processes": ("processes", "{}"),
        "seed": ("seed", "{}"),
        "hardware": ("hardware", "{}"),
    }
    rows = [
        (label, text(form.format(report[key]))) for label, (key, form) in measured.items() if report.get(key) is not None
    ]
    rows += [(text(name), text(version)) for name, version in report.get("versions", {}).items()]
    settings = table(("option", "value"), ((text(k), text(v)) for k, v in record.settings.items()), "facts")
    return (
        f"<h2>How it was made</h2><pre>{text(report.get('command', ''))}</pre>{table(('', ''), rows, 'facts')}"
        f"<details><summary>All {len(record.settings)} settings</summary>{settings}</details>"
    )
