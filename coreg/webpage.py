"""One HTML file that stands alone: every text is escaped, pictures are inside, nothing is loaded.

Nothing runs in it but a script of this package, where a page has one. Shared by the annotation health report, the report
of a run and the page to label on, so that all have one style, in light and in dark.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

SIDE = 144  # of a picture in a gallery, in pixels: 2 for each that it is shown in
SMALL = 64  # pictures up to this side are kept pixel by pixel
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--panel:#f4f6f9;--ink:#1b222c;--muted:#566172;--rule:#dbe0e7;--track:#e3e8ef;
--a:#1f5fbf;--b:#b8500f;--c:#0d7a5f;--d:#8a3fa0;--e:#8d6a00;--f:#b02a63;
--heat:31 95 191;--moved:184 80 15;--bad:#b3261e;--good:#0d7a5f}
@media (prefers-color-scheme:dark){:root{--paper:#12161c;--panel:#1b212a;--ink:#e7ebf0;--muted:#a3aebd;--rule:#2f3844;
--track:#2a323d;--a:#7cb0ff;--b:#ffa25e;--c:#4fcfa6;--d:#d49be6;--e:#e0c060;--f:#ff93b8;
--heat:124 176 255;--moved:255 162 94;--bad:#ff8a80;--good:#4fcfa6}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:66rem;margin:0 auto;
padding:1.5rem 1rem 4rem;color:var(--ink);background:var(--paper);overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .6rem;text-wrap:balance}
h2{font-size:1.2rem;line-height:1.3;margin:2.8rem 0 .4rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p{margin:.4rem 0;max-width:46rem}
.note,small,figcaption{color:var(--muted);font-size:.875rem}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--rule);overflow-wrap:break-word}
th{color:var(--muted);font-weight:600;vertical-align:bottom}
td:first-child,th:first-child{text-align:left;padding-left:0}
td:first-child{max-width:16rem}
td:has(.bar){text-align:left}
.bar{display:inline-block;height:.7rem;background:var(--a);border-radius:2px;vertical-align:middle}
.bad,.good{border-left:4px solid var(--bad);background:var(--panel);padding:.5rem .8rem;margin:.6rem 0;max-width:46rem}
.good{border-color:var(--good)}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--panel);border-radius:3px}
code{padding:.1em .3em}pre{padding:.7rem .9rem;overflow-x:auto;white-space:pre-wrap;margin:.5rem 0}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--a)}
.heat{background:rgb(var(--heat)/var(--s))}
.small td{padding:0;width:1.1rem;height:1.1rem;min-width:.4rem;border:0}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.6rem,1fr));gap:1.1rem .8rem;margin:.8rem 0;padding:0}
figure{margin:0;min-width:0}
.gallery img{display:block;width:72px;height:72px;object-fit:contain;object-position:left;border-radius:4px}
.gallery img.pixels{image-rendering:pixelated}
.gallery figcaption{margin-top:.3rem;line-height:1.35;font-size:.8125rem}
.gallery b{color:var(--ink);font-weight:600}
"""


def text(value: object) -> str:
    """Any value as text that is safe between tags and inside quoted attributes."""
    # surrogates stand for bytes of file names that are no text
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def document(title: str, *parts: str, style: str = "", script: str = "", connects: bool = False) -> str:
    """A whole page.

    Args:
        title: plain text. parts: HTML of the body. style: rules after the common ones.
        script: what runs in it after all parts, and nothing else does. connects: whether it may ask the server it is from.
    """
    # a browser refuses whatever is not inside, should an escape ever be forgotten
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        script = f"\n{script}"
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        parts = (*parts, f"<script>{script}</script>")
    if connects:
        policy += "; connect-src 'self'"
    return "\n".join(
        [
            "<!doctype html>",
            "<html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{text(title)}</title><style>{STYLE}{style}</style></head><body>",
            *parts,
            "</body></html>\n",
        ]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself where it is too wide. head, rows: HTML of the cells. kind: a class of the style."""
    named = f' class="{kind}"' if kind else ""
    lines = [f'<div class="scroll"><table{named}><tr>' + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join(lines) + "</table></div>"


def bar(share: float) -> str:
    """A share in [0, 1] as a bar."""
    return f'<span class="bar" style="width:{9 * min(1.0, max(0.0, share)):.2f}rem"></span>'


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent, a dash where it is not known."""
    return f"{share:.{digits}%}" if share is not None and math.isfinite(share) else "–"


def picture_of(pixels: np.ndarray) -> Image.Image:
    """An image from uint8 (c, H, W), grey or RGB."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def picture(image: Image.Image, alt: str) -> str:
    """An <img> with the picture inside: small ones pixel by pixel, others as a JPEG of at most `SIDE` pixels."""
    address, small = data_of(image, SIDE)
    pixels = ' class="pixels"' if small else ""
    return f'<img{pixels} alt="{text(alt)}" src="{address}">'


def data_of(image: Image.Image, side: int) -> tuple[str, bool]:
    """The `data:` address of a picture, and whether it is a small one, which is kept pixel by pixel as a PNG.

    Args:
        side: of other pictures, in pixels, at most.
    """
    file, small = io.BytesIO(), max(image.size) <= SMALL
    if not small:
        image = image.convert("RGB")
        image.thumbnail((side, side))
    image.save(file, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 85}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}", small
