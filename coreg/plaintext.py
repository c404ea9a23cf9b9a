"""Names and paths come from anywhere: what a terminal or a spreadsheet would act on is made harmless."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, TextIO

# control characters, line separators, changes of the writing direction, and bytes of file names that are no text
_ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_URL = re.compile(r"\b([a-zA-Z][a-zA-Z0-9+.-]*://)(?:[^/\s'\"]*@)?([^\s?'\"]*)(\?[^\s'\")\]]*)?")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: object, lines: bool = False) -> str:
    r"""A text for the terminal, with what is no letter to see written as Python would: \x1b, \n, \u202e.

    Args:
        lines: it has several lines, whose ends stay.
    """
    return _ACTIVE.sub(lambda m: m[0] if lines and m[0] == "\n" else ascii(m[0])[1:-1], str(text))


def without_credentials(text: str) -> str:
    """A text whose URLs have lost the user's name and password, and what comes after `?`, where signed URLs hold a key."""
    return _URL.sub(r"\1\2", text)


def one_line(error: object) -> str:
    """The text of an error without line breaks, at most 300 characters of it; its kind where it has no text."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: object) -> str:
    """Of the text of an error that has several lines, the first, at most 200 characters; its kind where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6, form: Callable[[str], str] = str) -> str:
    """A hint for the end of a message, the known word that is spelled most alike; empty where none is near.

    Args:
        cutoff: how alike, as difflib measures it. form: how a word is written.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean {form(near[0])}?" if near else ""


def csv_rows(file: TextIO, safe: bool = False) -> Callable[[Iterable[Any]], Any]:
    """A function that writes a row of cells to a CSV file.

    Args:
        safe: texts that a spreadsheet would take for a formula get an apostrophe in front, which it takes for a text.
    """
    writer = csv.writer(file)
    if not safe:
        return writer.writerow
    return lambda row: writer.writerow(
        [f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in row]
    )
