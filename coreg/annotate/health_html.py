"""The health report as one HTML file: every text is escaped, pictures are inside, nothing is loaded and nothing runs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from coreg.data.decode import UnreadableImage

if TYPE_CHECKING:
    from coreg.annotate.health import Health
    from coreg.annotate.store import AnnotationStore
    from coreg.data.images import ImageList

SIDE = 112  # of a picture in the gallery, in pixels
SHOWN_TEMPLATES = 40  # a larger agreement matrix is no longer read by anybody
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:68em;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}
table{border-collapse:collapse}td,th{padding:.15em .6em;text-align:right;border-bottom:1px solid #e4e4e4}
td:first-child,th:first-child{text-align:left}
td:has(.bar){text-align:left}
.bar{display:inline-block;height:.8em;background:#4a7ab5}
.bad{border-left:4px solid #c0392b;padding-left:.7em;margin:.4em 0}.good{border-left:4px solid #27804b;padding-left:.7em}
code{background:#f3f3f3;padding:.1em .3em}.small td{padding:0;width:1.1em;height:1.1em;border:0}
figure{display:inline-block;width:9.5em;vertical-align:top;margin:.4em;font-size:.8em;overflow-wrap:anywhere}
"""


def page(store: AnnotationStore, health: Health, images: ImageList | None, command: str) -> str:
    """The whole report.

    Args:
        store: the annotation store.
        health: what `examine` found.
        images: where pictures come from; None for a report without them.
        command: what to type next.
    """
    told = store.manifest
    verdicts = "".join(f'<p class="bad">{_text(line)}</p>' for line in health.verdicts)
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Annotation health</title>",
        f"<style>{STYLE}</style><h1>Annotation health: {_text(store.root)}</h1>",
        f"<p>{len(store)} images, {len(store.class_names)} classes, {len(store.templates)} templates, "
        f"by {_text(told['model'].get('spec', ''))}</p>",
        verdicts or '<p class="good">Nothing looks wrong.</p>',
        f"<p>Next: <code>{_text(command)}</code></p>",
        "<h2>How many candidates an image has</h2>",
        _sizes(health),
        "<h2>Classes</h2>",
        _classes(store, health),
        "<h2>Templates</h2>",
        _templates(store, health),
        "<h2>Most contested images</h2>",
        *_gallery(store, health, images),
        "<h2>Copies and unreadable images</h2>",
        *_copies(store, health),
    ]
    return "\n".join(parts) + "\n</html>\n"


def _text(value: object) -> str:
    # surrogates stand for bytes of file names that are no text
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join(lines) + "</table>"


def _bar(share: float) -> str:
    return f'<span class="bar" style="width:{12 * min(1.0, max(0.0, share)):.2f}em"></span>'


def _percent(share: float) -> str:
    return f"{share:.1%}" if np.isfinite(share) else "–"


def _sizes(health: Health) -> str:
    total = max(1, int(health.sizes.sum()))
    rows = [(str(k), str(n), _bar(n / total)) for k, n in enumerate(health.sizes) if n]
    return _table(("candidates", "images", ""), rows)


def _classes(store: AnnotationStore, health: Health) -> str:
    head = ["class", "candidate of", "", "most named for"]
    head += ["zero-shot", "label among candidates"] if health.accuracy else []
    rows = []
    for index, name in enumerate(store.class_names):
        row = [_text(name), _percent(health.named[index]), _bar(health.named[index]), str(health.most_named[index])]
        if health.accuracy:
            row += [_percent(health.accuracy[key][index]) for key in ("classes", "partial")]
        rows.append(row)
    return _table(head, rows)


def _templates(store: AnnotationStore, health: Health) -> str:
    head = ["template", "abstains"] + (["right votes"] if health.accuracy else [])
    rows = []
    for index, name in enumerate(store.templates):
        row = [f"{index}: {_text(name)}", _percent(health.abstained[index])]
        rows.append(row + ([_percent(health.accuracy["templates"][index])] if health.accuracy else []))
    shown = health.agreement[:SHOWN_TEMPLATES, :SHOWN_TEMPLATES]
    cells = [
        [f'<td title="{a} and {b}: {_percent(x)}" style="background:{_shade(x)}"></td>' for b, x in enumerate(line)]
        for a, line in enumerate(shown)
    ]
    matrix = "".join(f"<tr>{''.join(line)}</tr>" for line in cells)
    off = shown[~np.eye(len(shown), dtype=bool)]
    said = f"from {np.nanmin(off):.1%} (light) to {np.nanmax(off):.1%} (dark)" if np.isfinite(off).any() else "not known"
    matrix = f"<p>Share of images on which two templates agree, {said}:</p><table class='small'>{matrix}</table>"
    return _table(head, rows) + matrix


def _shade(share: float) -> str:
    if not np.isfinite(share):
        return "#fff"
    light = round(240 - 170 * share)
    return f"rgb({light},{light + 8},{min(255, light + 40)})"


def _gallery(store: AnnotationStore, health: Health, images: ImageList | None) -> list[str]:
    votes = store.votes()
    shown = []
    for row in map(int, health.contested):
        named, counts = np.unique(votes[row][votes[row] >= 0], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:3]
        said = ", ".join(f"{store.class_names[named[k]]} {counts[k]}" for k in order) or "no vote"
        picture = _picture(images, row)
        shown.append(f"<figure>{picture}<figcaption>{_text(store.paths[row])}<br>{_text(said)}</figcaption></figure>")
    return shown or ["<p>None.</p>"]


def _picture(images: ImageList | None, row: int) -> str:
    if images is None:
        return ""
    try:
        image = images.load(row).convert("RGB")
    except UnreadableImage:
        return ""
    if max(image.size) < SIDE:  # small images are enlarged as they are, so that their pixels can be seen
        factor = SIDE // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), 0)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _copies(store: AnnotationStore, health: Health) -> list[str]:
    bad = np.flatnonzero(store.unreadable)
    some = "".join(f"<li>{_text(store.paths[row])}</li>" for row in bad[:50])
    lines = [f"<p>{len(bad)} images cannot be read (reasons in errors.csv).</p><ul>{some}</ul>"]
    if health.duplicates is None:
        return [*lines, "<p>Copies are not known: this annotator gives no features.</p>"]
    pairs = "".join(f"<li>{_text(store.paths[a])} = {_text(store.paths[b])}</li>" for a, b in health.duplicates[:50])
    return [*lines, f"<p>{len(health.duplicates)} images look to the model like copies of others.</p><ul>{pairs}</ul>"]
