"""Is an annotation store fit to be trained on with several labels an image? What can be said without labels, and with some.

    python -m coreg.annotate health ann --task multi

writes ann/report.html and ann/report.txt, as `coreg.annotate.health` does where an image has one label.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

import numpy as np

from coreg.annotate.health import GALLERY, NEARLY_ALWAYS, notes_of, some
from coreg.annotate.health_html import picture_in
from coreg.annotate.tag_evidence import label_evidence
from coreg.data.folders import counts_line, labelled_counts
from coreg.data.images import ImageList
from coreg.files import write_atomically
from coreg.learn.multi_options import VLPLOptions
from coreg.plaintext import printable
from coreg.report.multi_metrics import average_precisions
from coreg.scripts import launched
from coreg.store.store import AnnotationStore
from coreg.webpage import bar, document, percent, table, text

FEW_IMAGES = 20  # below this a network hardly learns a label (rule of thumb)
TOGETHER = 0.95  # share of the images of either label that have the other one, too
FEWEST_TOGETHER = 5  # images of a label; fewer may be together by chance
SHOWN = 3  # verdicts on the terminal; the report has them all
OF_PARTS = 0.5  # threshold of the largest probability in an image or a part of it


@dataclass
class TagHealth:
    """What a store suggests; of the images that could be read."""

    threshold: float  # of `evidence`
    by: str  # what evidence is of, in words
    evidence: np.ndarray  # float (N, L), how probable the annotator holds each label
    suggested: np.ndarray  # bool (N, L), none of unreadable images
    sizes: np.ndarray  # int (L + 1,), sizes[k] images have k labels
    together: list[tuple[int, int, int]]  # pairs of labels that always go together, and images that have both
    # (L,), average precision, NaN of labels that no image is known to have; None without truth
    precision: np.ndarray | None
    doubtful: np.ndarray  # rows of the images of which a label is nearest to the threshold, most doubtful first
    verdicts: list[str] = field(default_factory=list)  # what is wrong, in plain words; empty when nothing is


def is_tagged(store: AnnotationStore, task: str | None) -> bool:
    """Whether a store is reported on as one of several labels an image.

    Args:
        task: `single` or `multi` as a person asks; None for whatever the store is of.
    """
    compares = store.manifest["features"] is not None and not store.manifest["model"]["spec"].startswith("run:")
    return task == "multi" or (task is None and compares and (store.tags is not None or bool(store.manifest.get("tiles"))))


def suggestions_of(store: AnnotationStore) -> tuple[np.ndarray, float, str]:
    """Evidence float64 (N, L), the threshold above which a label is suggested, and what the evidence is of.

    Where the store has tiles it is the largest probability in an image or a part of it, and the threshold a half; else the
    softmax over the labels with VLPL's numbers (Xing et al., CVPR workshops 2024).

    Raises:
        UserError: as `label_evidence`.
    """
    if store.manifest.get("tiles"):
        return label_evidence(store, "tiles", 0.0), OF_PARTS, "the largest probability in an image or a part of it"
    evidence = label_evidence(store, "image", VLPLOptions.temperature)
    return (
        evidence,
        VLPLOptions.suggestion_threshold,
        f"a softmax over the labels at temperature {VLPLOptions.temperature:g}",
    )


def suggested_labels(store: AnnotationStore) -> np.ndarray:
    """bool (N, L), labels that the annotator suggests; means nothing for images that could not be read.

    Raises:
        UserError: as `label_evidence`.
    """
    evidence, threshold, _ = suggestions_of(store)
    return evidence > threshold


def always_together(suggested: np.ndarray) -> list[tuple[int, int, int]]:
    """Pairs of labels of which either one's images nearly all have the other one, and how many have both; bool (n, L)."""
    table = suggested.astype(np.float32)
    both, counts = (table.T @ table).astype(np.int64), suggested.sum(axis=0)
    larger = np.maximum(counts[:, None], counts[None, :])
    pairs = np.argwhere(np.triu((both >= TOGETHER * larger) & (both >= FEWEST_TOGETHER), 1))
    return sorted(((int(a), int(b), int(both[a, b])) for a, b in pairs), key=lambda pair: -pair[2])


def examine(store: AnnotationStore) -> TagHealth:
    """Look at a store.

    Raises:
        UserError: as `label_evidence`.
    """
    evidence, threshold, by = suggestions_of(store)
    readable = np.flatnonzero(~store.unreadable)
    suggested = (evidence > threshold) & ~store.unreadable[:, None]
    precision = None
    if store.tags is not None and store.tags.any():
        there = (store.tags[readable] > 0).any(axis=0)
        precision = np.where(there, average_precisions(evidence[readable], store.tags[readable]), np.nan)
    near = np.abs(evidence[readable] - threshold).min(axis=1, initial=np.inf)
    health = TagHealth(
        threshold=threshold,
        by=by,
        evidence=evidence,
        suggested=suggested,
        sizes=np.bincount(suggested[readable].sum(axis=1), minlength=evidence.shape[1] + 1),
        together=always_together(suggested[readable]),
        precision=precision,
        doubtful=readable[np.argsort(near, kind="stable")][:GALLERY],
    )
    health.verdicts = _verdicts(store, health)
    return health


def _verdicts(store: AnnotationStore, health: TagHealth) -> list[str]:
    """What a person should know before training, most serious first."""
    names, total, bad = store.class_names, len(store), int(store.unreadable.sum())
    readable = total - bad
    if not readable:
        return ["No image could be read: see errors.csv for the reasons."]
    counts, verdicts = health.suggested.sum(axis=0), []
    mean, nothing = counts.sum() / readable, health.sizes[0] / readable
    never, few = np.flatnonzero(counts == 0), np.flatnonzero((counts > 0) & (counts < FEW_IMAGES))
    always = np.flatnonzero(counts >= NEARLY_ALWAYS * readable)
    if len(never):
        verdicts.append(
            f"Never above the threshold: {some(names, never)}. Either no image shows them, or the model does not "
            "know the name; try another wording."
        )
    if len(always):
        verdicts.append(
            f"Above the threshold in nearly every image: {some(names, always)}. Either all of them show it, or the name is "
            "too general; try a narrower one."
        )
    for a, b, both in health.together[:5]:
        verdicts.append(
            f"Always together: {names[a]} and {names[b]} ({both} images). If they are not the same, other words may "
            "part them."
        )
    if nothing > 0.2:
        verdicts.append(
            f"{nothing:.0%} of the images have no label: what they show is not in the list, or is not recognised; add "
            "labels, or try a larger --vlm."
        )
    if mean < 1.5 and not store.manifest.get("tiles"):
        verdicts.append(
            f"An image has {mean:.1f} labels, since labels share one probability: a model that compares whole images with "
            "texts sees one thing at a time. Annotate with --tiles 2 3, and parts of images are looked at, too."
        )
    if len(few):
        verdicts.append(
            f"Fewer than {FEW_IMAGES} images lead to: {some(names, few)}. They will be learned badly; add images."
        )
    if bad > 0.05 * total:
        verdicts.append(f"{bad} of {total} images cannot be read: see errors.csv.")
    return verdicts


def next_command(store: AnnotationStore) -> str:
    """What to type to train on the store."""
    method = "soft" if store.manifest.get("tiles") else "vlpl"
    where = f"--annotations {shlex.quote(str(store.root))} --output_dir runs/tags"
    return f"{launched('baselines/spml.py')} --method {method} {where}"


def summary(store: AnnotationStore) -> str:
    """What a person wants to know about a store, in a few lines, with the next command to type."""
    health = examine(store)
    lines = [f"{store.root}: {len(store)} images, {len(store.class_names)} labels, several an image"]
    lines += [f"  {line}" for line in [*about(store), *facts(store, health)]]
    lines += [f"  ! {line}" for line in health.verdicts[:SHOWN]]
    lines += [f"  more                    {store.root / 'report.html'}", f"next: {next_command(store)}"]
    return printable("\n".join(lines), lines=True)


def about(store: AnnotationStore) -> list[str]:
    """Images of each split and of how many of them labels are known, and how the list came about; one line each."""
    known = None if store.tags is None else np.where(store.tags.any(axis=1), 0, -1)
    return [f"images: {counts_line(labelled_counts(store.split, known))}", *notes_of(store.manifest)]


def facts(store: AnnotationStore, health: TagHealth) -> list[str]:
    """What can be said in a few lines."""
    readable = max(1, int(health.sizes.sum()))
    mean = np.arange(len(health.sizes)) @ health.sizes / readable
    lines = [
        f"labels an image         {mean:.2f} of {len(store.class_names)}",
        f"images without a label  {health.sizes[0] / readable:.1%}",
        f"labels never suggested  {some(store.class_names, np.flatnonzero(health.suggested.sum(axis=0) == 0)) or 'none'}",
        f"unreadable images       {int(store.unreadable.sum())}",
    ]
    if health.precision is not None and np.isfinite(health.precision).any():
        known = int(np.isfinite(health.precision).sum())
        lines.append(f"average precision       {np.nanmean(health.precision):.1%}, a mean over {known} labels")
    return lines


def as_text(store: AnnotationStore, health: TagHealth) -> str:
    """The report for a terminal."""
    readable = max(1, int(health.sizes.sum()))
    lines = [f"{store.root}: {len(store)} images, {len(store.class_names)} labels, several an image", *about(store), ""]
    lines += [*(f"! {line}" for line in health.verdicts)] or ["Nothing looks wrong."]
    lines += [
        f"next: {next_command(store)}",
        "",
        *facts(store, health),
        "",
        f"A label is suggested above {health.threshold:g}: ",
    ]
    lines[-1] += f"{health.by}.\n"
    lines.append("labels  images")
    lines += [f"{k:6d}  {n:6d}  {'#' * round(40 * (n / readable))}" for k, n in enumerate(health.sizes) if n]
    lines += ["", f"{'label':30}  suggested for" + ("  average precision" if health.precision is not None else "")]
    for c, name in enumerate(store.class_names):
        line = f"{name[:30]:30}  {health.suggested[:, c].sum():13d}"
        lines.append(line + (f"  {percent(health.precision[c]):>17}" if health.precision is not None else ""))
    return "\n".join(lines) + "\n"


def page(store: AnnotationStore, health: TagHealth, images: ImageList | None) -> str:
    """The report as one HTML file. images: where pictures come from; None for a report without them."""
    readable, spec = max(1, int(health.sizes.sum())), store.manifest["model"].get("spec", "")
    verdicts = "".join(f'<p class="bad">{text(line)}</p>' for line in health.verdicts)
    sizes = [(str(k), f"{n:,}", bar(n / readable)) for k, n in enumerate(health.sizes) if n]
    head = ["label", "suggested for", ""] + (["average precision", ""] if health.precision is not None else [])
    rows = []
    for c, name in enumerate(store.class_names):
        count = int(health.suggested[:, c].sum())
        row = [text(name), f"{count:,}", bar(count / readable)]
        if health.precision is not None:
            row += [percent(health.precision[c]), bar(float(np.nan_to_num(health.precision[c])))]
        rows.append(row)
    pairs = [(text(store.class_names[a]), text(store.class_names[b]), f"{both:,}") for a, b, both in health.together]
    parts = [
        f"<h1>Annotation health: {text(store.root)}</h1>",
        f"<p>{len(store):,} images, {len(store.class_names)} labels, several an image, by {text(spec)}</p>",
        "".join(f"<p>{text(line)}</p>" for line in about(store)),
        verdicts or '<p class="good">Nothing looks wrong.</p>',
        f"<p>Next: <code>{text(next_command(store))}</code></p>",
        "<h2>How many labels an image has</h2>",
        f"<p>A label is suggested above {health.threshold:g}: {text(health.by)}.</p>",
        table(("labels", "images", ""), sizes),
        f"<h2>Labels</h2>{table(head, rows)}",
        f"<h2>Labels that always go together</h2>{table(('', '', 'images'), pairs)}" if pairs else "",
        f'<h2>Most doubtful images</h2><p>A label is nearest to the threshold.</p><div class="gallery">'
        f"{''.join(_figures(store, health, images))}</div>",
    ]
    return document("Annotation health", *parts)


def _figures(store: AnnotationStore, health: TagHealth, images: ImageList | None) -> list[str]:
    """Doubtful images with their most probable labels."""
    figures = []
    for row in map(int, health.doubtful):
        best = np.argsort(-health.evidence[row], kind="stable")[:3]
        named = "<br>".join(f"{text(store.class_names[c])} {percent(health.evidence[row, c], 0)}" for c in best)
        figures.append(
            f"<figure>{picture_in(images, row)}<figcaption>{text(store.paths[row])}<br>{named}</figcaption></figure>"
        )
    return figures


def write_report(store: AnnotationStore, images: ImageList | None) -> TagHealth:
    """Write report.html and report.txt into the store's folder.

    Args:
        images: where the pictures come from; None for a report without pictures.

    Raises:
        UserError: the folder cannot be written, or as `label_evidence`.
    """
    health = examine(store)
    write_atomically(store.root / "report.txt", as_text(store, health).encode("utf-8", "replace"))
    write_atomically(store.root / "report.html", page(store, health, images).encode("utf-8", "replace"))
    return health
