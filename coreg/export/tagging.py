"""What is predicted where images have several labels: those whose probability is at least their threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from coreg.data.images import lookup
from coreg.data.labels import csv_lines
from coreg.data.tags import BETWEEN
from coreg.errors import UserError
from coreg.plaintext import did_you_mean
from coreg.records import Each, Number, RecordError, read_record

WANTED = "give a number from 0 to 1, a CSV file with label,threshold, or a JSON object of them"


def chosen(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The labels of one image, int64 (k,), the most probable first.

    Args:
        probabilities, thresholds: float (L,).
    """
    order = np.argsort(-probabilities, kind="stable")
    return order[probabilities[order] >= thresholds[order]]


def columns(class_names: Sequence[str]) -> list[str]:
    """Heads of the columns that `cells` fills."""
    return ["labels", "probabilities", *(f"p({name})" for name in class_names)]


def cells(class_names: Sequence[str], probabilities: np.ndarray, thresholds: np.ndarray) -> list[str]:
    """Names of the labels of one image and their probabilities, `;` between them, and the probabilities of all."""
    named = chosen(probabilities, thresholds)
    texts = [f"{p:.4f}" for p in probabilities]
    return [BETWEEN.join(class_names[c] for c in named), BETWEEN.join(texts[c] for c in named), *texts]


def lines(class_names: Sequence[str], probabilities: np.ndarray, thresholds: np.ndarray, k: int) -> list[str]:
    """The labels of one image for a person, and the next best ones with their thresholds, until there are `k` in all."""
    named, order = chosen(probabilities, thresholds), np.argsort(-probabilities, kind="stable")
    others = [c for c in order if c not in set(named.tolist())][: max(k - len(named), 0)]
    shown = [f"{probabilities[c]:.4f}  {class_names[c]}" for c in named] or ["no label reaches its threshold"]
    return shown + [f"{probabilities[c]:.4f}  ({class_names[c]}: below {thresholds[c]:.4f})" for c in others]


def read_thresholds(given: str, class_names: Sequence[str], own: np.ndarray) -> np.ndarray:
    """Thresholds float64 (L,) as a person writes them.

    Args:
        given: a number for all labels, a `.json` file with an object of numbers by label, or another file, CSV, with the
            columns `label,threshold`. own: (L,), those of labels that the file leaves out.

    Raises:
        UserError: it is none of these, or names an unknown label.
    """
    try:
        number = float(given)
    except ValueError:
        return _from_file(given, class_names, own)
    if not 0 <= number <= 1:
        raise UserError(f"--threshold is {given}; {WANTED}")
    return np.full(len(class_names), number)


def _from_file(path: str, class_names: Sequence[str], own: np.ndarray) -> np.ndarray:
    find, result = lookup(class_names), own.astype(np.float64)
    for name, value in _pairs_of_json(path) if path.lower().endswith(".json") else _pairs_of_csv(path):
        if (index := find(name)) < 0:
            hint = did_you_mean(name, class_names, form=repr)
            raise UserError(f"{path} has the label {name!r}, which is none of the model's{hint}")
        result[index] = value
    return result


def _pairs_of_json(path: str) -> Iterable[tuple[str, float]]:
    try:
        return read_record(Path(path), Each(Number(0, 2, whole=False))).items()
    except RecordError as error:
        raise UserError(f"cannot read the thresholds in {path} ({error}); {WANTED}") from None


def _pairs_of_csv(path: str) -> Iterable[tuple[str, float]]:
    for place, line in csv_lines(path, ("label", "threshold"), WANTED):
        try:
            value = float(line["threshold"])
        except ValueError:
            value = float("nan")
        if not 0 <= value <= 2:
            raise UserError(f"{place} has the threshold {line['threshold']!r}; write a number from 0 to 1")
        yield line["label"], value
