"""Prompt templates and class names: what the text side of an annotator is made of."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path

from coreg.data.class_names import refuse_markup, same_name
from coreg.errors import UserError

# The papers' 27 templates, a selection of CLIP's 80 for ImageNet. The order matters: index 0 is the single template.
TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
MAX_CLASSES = 32_767  # votes are int16


def prompts(templates: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """All T*C texts, template by template: text t*C + c says class c in the words of template t."""
    return [template.replace("{}", name) for template in templates for name in class_names]


def read_templates(path: str) -> list[str]:
    """Read prompt templates, one a line, each with exactly one `{}` where the class name goes. Blank lines do not count.

    Raises:
        UserError: the file cannot be read, is empty, holds a template twice, or a line without exactly one `{}`.
    """
    templates = _lines(path, "templates", "one template a line, such as: a photo of a {}")
    for number, template in templates:
        if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
            raise UserError(
                f"{path} line {number} is {template!r}; a template needs exactly one {{}} where the class name goes, "
                f"such as: a photo of a {{}}"
            )
    return _distinct(path, templates, "template")


def read_class_names(path: str) -> list[str]:
    """Read class names, one a line; their order gives the class indices. Blank lines do not count.

    Raises:
        UserError: the file cannot be read, holds fewer than two names, one name twice (also in other case or Unicode form,
            or with invisible characters), or more than names: numbers, quotes, columns, remarks.
    """
    names = _lines(path, "class names", "one class name a line")
    refuse_markup(path, names)
    if len(names) < 2:
        raise UserError(f"{path} holds one class name, {names[0][1]!r}; write at least two, one a line")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{path} holds {len(names)} class names; at most {MAX_CLASSES} can be told apart")
    return _distinct(path, names, "class name", same_name)


def _lines(path: str, what: str, wanted: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, stripped, with their numbers; never empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # an editor's byte order mark is no part of the first name
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8 with {wanted}") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} in {path}: {error.strerror}; write a text file with {wanted}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no {what}; write {wanted}")
    for number, line in lines:
        if set(line) & (set(map(chr, range(32))) - set(string.whitespace)):
            raise UserError(f"{path} line {number} holds control characters; write {wanted}")
    return lines


def _distinct(path: str, lines: list[tuple[int, str]], what: str, key: Callable[[str], str] = str.casefold) -> list[str]:
    first: dict[str, tuple[int, str]] = {}
    for number, line in lines:
        before, same = first.setdefault(key(line), (number, line))
        if before != number:
            form = ", but for Unicode form or invisible characters" if line.casefold() != same.casefold() else ""
            raise UserError(
                f"{path} line {number} repeats the {what} {line!r} of line {before}{form}; write every one once"
            )
    return [line for _, line in lines]
