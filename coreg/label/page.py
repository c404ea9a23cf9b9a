"""The page to label on: one HTML file that stands alone, for a person who opens it and for `coreg-label`, which serves it.

What the page shows is one JSON record in it. `coreg-label` reads that back and makes the page anew, so that nothing of a
run folder is served as it is. The only thing that runs is page.js, which the page's own policy names by its hash.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from coreg.data.labels import NONE_OF_THESE
from coreg.data.tags import ABSENT_LIST, BETWEEN, LIST
from coreg.errors import UserError
from coreg.files import write_atomically, writing_csv
from coreg.records import Number, RecordError, check_record, checksum_of, parse_record, read_file
from coreg.scripts import launched
from coreg.webpage import data_of, document, text

PAGE, LABEL_NEXT = "label.html", "label_next.csv"
SIDE = 360  # of a picture, in pixels, at most
LARGEST = 1 << 28  # bytes of a page that is read back
_HERE = Path(__file__).parent
_OPENING, _CLOSING = '<script type="application/json" id="record">', "</script>"
_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")
_KIND = {
    "run": str,
    "several": bool,
    "class_names": [str],
    "images": [{"path": str, "likely": [[Number(0, 1e9, whole=False)]], "picture": str}],
    "others": [[str]],
    "script": str,
    "annotations": str,
    "few_shot": bool,
}


@dataclass(frozen=True)
class Asked:
    """An image that a person is asked about."""

    path: str  # as the image list writes it
    likely: list[tuple[int, float]]  # the likeliest classes and their probabilities, the likeliest first
    picture: str  # `data:` address of a PNG or JPEG


@dataclass(frozen=True)
class LabelPage:
    """What the page shows, and what label_next.csv begins with."""

    run: str  # the run folder, as a person would type it
    several: bool  # whether an image may have several labels
    class_names: list[str]
    images: list[Asked]  # in the order in which they are asked about
    others: list[list[str]]  # rows of label_next.csv of images whose labels are known already
    script: str  # that trained: train_coreg.py, baselines/pll.py, …
    annotations: str  # the store, as a person would type it
    few_shot: bool  # whether the run drew labels of its own, which stand among `others`

    @property
    def columns(self) -> list[str]:
        """Of label_next.csv."""
        return ["path", LIST, ABSENT_LIST] if self.several else ["path", "label"]

    def cells(self, answer: Sequence[int] | None) -> list[str]:
        """What label_next.csv has after the path for a list of classes, empty for none of them, or for no answer."""
        names = self.class_names
        if answer is None:
            return [""] * (len(self.columns) - 1)
        if not self.several:
            return [names[answer[0]] if answer else NONE_OF_THESE]
        absent = [name for index, name in enumerate(names) if index not in answer]
        return [BETWEEN.join(names[index] for index in answer), BETWEEN.join(absent)]

    def next_command(self, folder: Path) -> str:
        """What to type to train again with label_next.csv.

        Args:
            folder: of the run.
        """
        folder = folder if folder.name not in ("", "..") else folder.resolve()
        chosen = {
            "recipe": folder / "config.yaml",
            "annotations": self.annotations,
            "tags" if self.several else "labels": folder / LABEL_NEXT,
            "output_dir": folder.with_name(f"{folder.name}-labelled"),
        }
        # labels that were drawn stand in the file, too
        chosen |= {"few_shot": 0} if self.few_shot else {}
        words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
        return f"{launched(self.script)} {shlex.join(words)}"


def photo(image: Image.Image) -> str:
    """A picture that is large enough to be judged, as a `data:` address."""
    return data_of(image, SIDE)[0]


def write_label_page(folder: Path, shown: LabelPage) -> None:
    """Write label_next.csv with empty rows, and label.html where there is an image to ask about.

    Raises:
        UserError: they cannot be written.
    """
    write_label_next(folder / LABEL_NEXT, shown)
    if shown.images:
        write_atomically(folder / PAGE, page(shown, folder))


def write_label_next(path: Path, shown: LabelPage) -> None:
    """A CSV file for a person to fill in and hand back with `--labels` or `--tags`; rows that stay empty do not count.

    Labels that the run was given already stand below the empty rows, so that the file is all the next run needs.
    """
    with writing_csv(path) as write:
        write(shown.columns)
        for asked in shown.images:
            write([asked.path, *shown.cells(None)])
        for row in shown.others:
            write(row)


def page(shown: LabelPage, folder: Path, answers: Sequence[Sequence[int] | None] | None = None) -> str:
    """The whole page.

    Args:
        folder: of the run, as it is typed now.
        answers: what is known of each image (see `LabelPage.cells`), for a page that is served and hands answers back;
            None for one that stands alone.
    """
    record: dict[str, Any] = dataclasses.asdict(shown)
    more = {
        "columns": shown.columns,
        "none": NONE_OF_THESE,
        "file": str(folder / LABEL_NEXT),
        # answers in a browser belong to these images and classes
        "key": checksum_of({"paths": [asked.path for asked in shown.images], "names": shown.class_names})[:32],
        "served": answers is not None,
        "answers": answers,
    }
    # a browser looks for the end of a script before it reads it
    data = json.dumps(record | more).replace("<", "\\u003c")
    script, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    body = [
        *_above(shown),
        _work(shown),
        _end(shown, folder, answers is not None),
        "<details id='overview'><summary>All images and their answers</summary><div id='all'></div></details>",
        "<details id='as-text'><summary>label_next.csv as text</summary>"
        "<textarea id='text' readonly aria-label='label_next.csv'></textarea></details>",
        f"{_OPENING}{data}{_CLOSING}",
    ]
    return document(f"Label images: {shown.run}", *body, style=style, script=script, connects=answers is not None)


def _above(shown: LabelPage) -> list[str]:
    by_hand = f"This page needs scripts. Without, fill in the column <code>{shown.columns[1]}</code> of label_next.csv."
    return [
        f"<header><h1>Label images of {text(shown.run)}</h1>",
        "<p id='where'></p><p id='count' role='status'></p>",
        "<progress id='progress' aria-label='answered'></progress></header>",
        f"<noscript><p class='bad'>{by_hand}</p></noscript>",
        "<p id='trouble' class='bad' role='alert'></p>",
    ]


def _work(shown: LabelPage) -> str:
    ask = "All labels that the image has, then Enter." if shown.several else "Which class is it?"
    none = "Has none of them" if shown.several else "None of these"
    return f"""<main id='work' hidden>
<div id='shown'><img id='picture' alt=''><p id='guess' class='note'></p><p id='path'></p></div>
<div><p><b>{ask}</b> <span id='more' class='note'></span></p>
<label id='search-line' hidden><input id='search' type='text' autocomplete='off' spellcheck='false'
placeholder='Search for a class ( / )' aria-label='Search for a class'></label>
<div id='classes' class='buttons'></div>
<div class='acts'><button type='button' id='confirm' class='main'><kbd>Enter</kbd>Confirm</button>
<button type='button' id='none'><kbd>0</kbd>{none}</button><button type='button' id='skip'><kbd>Space</kbd>Skip</button>
<button type='button' id='undo'><kbd>⌫</kbd>Undo</button></div>
<div class='acts'><button type='button' id='save-now' class='main'>Finish</button>
<button type='button' id='download'>Save label_next.csv</button><button type='button' id='copy'>Copy as text</button>
<span id='copied' class='note' role='status'></span></div></div>
</main>"""


def _end(shown: LabelPage, folder: Path, served: bool) -> str:
    command = f"<pre>{text(shown.next_command(folder))}</pre>"
    place = text(folder / LABEL_NEXT)
    if served:
        how = f"<p>Answers are written into <code>{place}</code>. Train again with them:</p>{command}"
        save = "<button type='button' id='finish' class='main'>Done: close coreg-label</button>"
    else:
        how = (
            f"<p>Save the file, put it in the place of <code>{place}</code>, and train again with it "
            f"(<code>coreg-label</code> spares the moving):</p>{command}"
        )
        save = "<button type='button' id='finish' hidden></button>"
    kind = "" if served else "main"
    return f"""<section id='end' hidden><h2 id='outcome'></h2>
<div class='acts'>{save}<button type='button' id='download-end' class='{kind}'>Save label_next.csv</button>
<button type='button' id='copy-end'>Copy as text</button><button type='button' id='again'></button>
<button type='button' id='undo-end'>Undo</button></div>{how}</section>"""


def read_page(folder: Path) -> LabelPage:
    """What the label.html of a run shows, checked because it may come from anywhere.

    Raises:
        UserError: there is none, or it is not what was written.
    """
    path = folder / PAGE
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name a finished run, such as runs/a")
    if not path.exists():
        raise UserError(
            f"{folder} has no {PAGE}: it is no finished run, has no image left to label, or is of an older version; name "
            f"another, or fill in {LABEL_NEXT} by hand"
        )
    try:
        content = read_file(path, LARGEST).decode("utf-8", "replace")
        _, opening, rest = content.partition(_OPENING)
        if not opening:
            raise RecordError("it holds no record")
        return _checked(parse_record(rest.partition(_CLOSING)[0], _KIND))
    except RecordError as error:
        raise UserError(f"{path} is damaged ({error}); fill in {folder / LABEL_NEXT} by hand, or train again") from None


def _checked(record: dict[str, Any]) -> LabelPage:
    images, names = record["images"], record["class_names"]
    for number, image in enumerate(images):
        if not _PICTURE.fullmatch(image["picture"]):
            raise RecordError(f"images[{number}].picture is no picture")
        for pair in image["likely"]:
            check_record(dict(enumerate(pair)), {0: Number(0, len(names) - 1), 1: Number(0, 1, whole=False)}, "likely")
        image["likely"] = [(index, share) for index, share, *_ in image["likely"]]
    if not images or not names or len(set(names)) < len(names) or len({image["path"] for image in images}) < len(images):
        raise RecordError("names or images are missing, or there twice")
    asked = [Asked(**{field.name: image[field.name] for field in dataclasses.fields(Asked)}) for image in images]
    return LabelPage(**({name: record[name] for name in _KIND} | {"images": asked}))
