"""Answers that people gave in Label Studio, as its JSON export has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from coreg.errors import UserError
from coreg.records import Maybe, RecordError, check_record, parse_record

BETWEEN = ";"  # between the labels of one image, here and in lists of labels
TASK = {"data": dict, "annotations": [{"result": [dict], "was_cancelled": Maybe(bool)}]}


def _path_of(data: dict[str, Any]) -> str:
    """The image's path: as it was exported, or out of the address of a local file."""
    if isinstance(data.get("path"), str):
        return data["path"]
    address = data.get("image")
    if not isinstance(address, str):
        raise RecordError("data has neither path nor image")
    served = parse_qs(urlsplit(address).query).get("d")  # /data/local-files/?d=PATH
    return served[0] if served else unquote(urlsplit(address).path.lstrip("/"))


def _choices(annotation: dict[str, Any]) -> list[str]:
    chosen = []
    for result in annotation["result"]:
        if result.get("type") == "choices":
            check_record(result, {"value": {"choices": [str]}})
            chosen += result["value"]["choices"]
    return chosen


def answers(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The answers of a JSON export, one image after the other; skipped tasks and those without an answer are left out.

    Where several people answered, the last answer counts.

    Args:
        path: a JSON list of tasks with their annotations.

    Yields:
        Where the answer is, for errors; `path`, and `label` and `labels` alike, names with `;` between them.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        tasks = parse_record(Path(path).read_bytes(), [TASK])
        for number, task in enumerate(tasks, start=1):
            given = [one for one in task["annotations"] if not one.get("was_cancelled")]
            if given and (chosen := _choices(given[-1])):
                label = BETWEEN.join(chosen)
                yield f"{path} task {number}", {"path": _path_of(task["data"]), "label": label, "labels": label}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give Label Studio's JSON export") from None
    except RecordError as error:
        raise UserError(f"{path} is no JSON export of Label Studio ({error}); export the project as JSON") from None
