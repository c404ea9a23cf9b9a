"""The health report as one HTML file: every text is escaped, pictures are inside, nothing is loaded and nothing runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coreg.annotate.changes import before_and_after
from coreg.annotate.confused import more_words
from coreg.data.decode import UnreadableImage
from coreg.webpage import bar, document, percent, picture, table, text

if TYPE_CHECKING:
    from coreg.annotate.health import Health
    from coreg.data.images import ImageList
    from coreg.store.store import AnnotationStore

SHOWN_PAIRS = 40
SHOWN_TEMPLATES = 40  # a larger agreement matrix is no longer read by anybody


def page(store: AnnotationStore, health: Health, images: ImageList | None, command: str) -> str:
    """The whole report.

    Args:
        store: the annotation store.
        health: what `examine` gave.
        images: where pictures come from; None for a report without them.
        command: what to type next.
    """
    manifest = store.manifest
    verdicts = "".join(f'<p class="bad">{text(line)}</p>' for line in health.verdicts)
    total = max(1, int(health.sizes.sum()))
    sizes = [(str(k), str(n), bar(n / total)) for k, n in enumerate(health.sizes) if n]
    parts = [
        f"<h1>Annotation health: {text(store.root)}</h1>",
        f"<p>{len(store)} images, {len(store.class_names)} classes, {len(store.templates)} templates, "
        f"by {text(manifest['model'].get('spec', ''))}</p>",
        "".join(f"<p>{text(line)}</p>" for line in health.about),
        *(f"<p>{text(line)}</p>" for line in before_and_after(manifest)),
        verdicts or '<p class="good">Nothing looks wrong.</p>',
        f"<p>Next: <code>{text(command)}</code></p>",
        "<h2>How many candidates an image has</h2>",
        table(("candidates", "images", ""), sizes),
        "<h2>Classes</h2>",
        _classes(store, health),
        "<h2>Confused pairs</h2>",
        _pairs(store, health),
        "<h2>Templates</h2>",
        _templates(store, health),
        "<h2>Most contested images</h2>",
        '<div class="gallery">',
        *_gallery(store, health, images),
        "</div>",
        "<h2>Copies and unreadable images</h2>",
        *_copies(store, health),
    ]
    return document("Annotation health", *parts)


def _classes(store: AnnotationStore, health: Health) -> str:
    head = ["class", "candidate of", "", "most named for"]
    head += ["zero-shot", "label among candidates"] if health.accuracy else []
    rows = []
    for index, name in enumerate(store.class_names):
        row = [text(name), percent(health.named[index]), bar(health.named[index]), str(health.most_named[index])]
        if health.accuracy:
            row += [percent(health.accuracy[key][index]) for key in ("classes", "partial")]
        rows.append(row)
    return table(head, rows)


def _pairs(store: AnnotationStore, health: Health) -> str:
    if not health.confused:
        return "<p>None.</p>"
    known = {None: "not known", True: "nearly alike", False: "apart: images look alike to the model"}
    rows = []
    for pair in health.confused[:SHOWN_PAIRS]:
        names = [text(store.class_names[c]) for c in pair.classes]
        rows.append([*names, str(pair.images), percent(pair.share), bar(pair.share), known[pair.alike]])
    head = ("class", "class", "images with both as candidates", "share of the rarer class", "", "how the model reads them")
    more = f"<p>And {len(health.confused) - SHOWN_PAIRS} more.</p>" if len(health.confused) > SHOWN_PAIRS else ""
    return table(head, rows) + more + "".join(f"<p>{text(line)}</p>" for line in more_words(store, health.confused))


def _templates(store: AnnotationStore, health: Health) -> str:
    head = ["template", "abstains"] + (["right votes"] if health.accuracy else [])
    rows = []
    for index, name in enumerate(store.templates):
        row = [f"{index}: {text(name)}", percent(health.abstained[index])]
        rows.append(row + ([percent(health.accuracy["templates"][index])] if health.accuracy else []))
    shown = health.agreement[:SHOWN_TEMPLATES, :SHOWN_TEMPLATES]
    cells = [
        [
            f'<td class="heat" style="--s:{np.nan_to_num(x):.2f}" title="{a} and {b}: {percent(x)}"></td>'
            for b, x in enumerate(line)
        ]
        for a, line in enumerate(shown)
    ]
    matrix = "".join(f"<tr>{''.join(line)}</tr>" for line in cells)
    off = shown[~np.eye(len(shown), dtype=bool)]
    scale = f"from {np.nanmin(off):.1%} (faint) to {np.nanmax(off):.1%} (full)" if np.isfinite(off).any() else "not known"
    matrix = f"<div class='scroll'><table class='small'>{matrix}</table></div>"
    return f"{table(head, rows)}<p>Share of images on which two templates agree, {scale}:</p>{matrix}"


def _gallery(store: AnnotationStore, health: Health, images: ImageList | None) -> list[str]:
    votes = store.votes()
    shown = []
    for row in map(int, health.contested):
        named, counts = np.unique(votes[row][votes[row] >= 0], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:3]
        named_most = ", ".join(f"{store.class_names[named[k]]} {counts[k]}" for k in order) or "no vote"
        caption = f"<figcaption>{text(store.paths[row])}<br>{text(named_most)}</figcaption>"
        shown.append(f"<figure>{picture_in(images, row)}{caption}</figure>")
    return shown or ["<p>None.</p>"]


def picture_in(images: ImageList | None, row: int) -> str:
    """A picture of an image, nothing where there are no images or it cannot be read."""
    if images is None:
        return ""
    try:
        return picture(images.load(row).convert("RGB"), "")
    except UnreadableImage:
        return ""


def _copies(store: AnnotationStore, health: Health) -> list[str]:
    bad = np.flatnonzero(store.unreadable)
    some = "".join(f"<li>{text(store.paths[row])}</li>" for row in bad[:50])
    lines = [f"<p>{len(bad)} images cannot be read (reasons in errors.csv).</p><ul>{some}</ul>"]
    if health.duplicates is None:
        return [*lines, "<p>Copies are not known: this annotator gives no features.</p>"]
    pairs = "".join(f"<li>{text(store.paths[a])} = {text(store.paths[b])}</li>" for a, b in health.duplicates[:50])
    return [*lines, f"<p>{len(health.duplicates)} images look to the model like copies of others.</p><ul>{pairs}</ul>"]
