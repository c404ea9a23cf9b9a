"""What a run with several labels an image says in the end: its report, and a list of labels for each image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coreg.data.tags import ABSENT, BETWEEN, PRESENT
from coreg.files import writing_csv
from coreg.label.page import PAGE, LabelPage
from coreg.report.multi_metrics import average_precisions, measure_labels
from coreg.report.page_images import ASKED, asked, in_turn, script_of

SHOWN = 30  # labels in the summary
# where the thresholds of a run come from, in words
THRESHOLDS = {
    "validation labels": "those of the largest F1 on validation images",
    "labels_an_image": "one for all labels, by the number of labels an image that is expected, without labels",
    "annotator": "one for all labels, by the number of labels an image that the annotator suggests, without labels",
    "predictions": "those of the largest F1 that the predicted probabilities let expect, without labels",
}


def measured_splits(
    probabilities: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    similarity: dict[str, np.ndarray] | None,
    at: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """What the report says of each split of which true labels are known.

    Args:
        probabilities: float64 (n, L) by split. truth: int8 (n, L) likewise. similarity: the annotator's, (n, L), likewise.
        at: (L,), thresholds of the probabilities.
    """
    measured = {}
    for split, scores in probabilities.items():
        if not truth[split].any():
            continue
        measured[split] = measure_labels(scores, truth[split], at) | {"images": len(scores)}
        if similarity is not None:
            measured[split]["annotator"] = float(average_precisions(similarity[split], truth[split]).mean())
    return measured


def tag_summary(report: dict[str, Any], root: Path) -> str:
    """mAP of annotator and method, average precision of each label, and where everything lies."""
    lines = ["", f"{report['dataset']}: {report['annotator']['name']} annotated, {report['method']} trained", ""]
    wide = max(10, len(report["method"]) + 2)
    lines.append(f"{'mAP':<14}{'annotator':>10}{report['method']:>{wide}}")
    for split, row in report["tags"].items():
        before = f"{row['annotator']:.1%}" if "annotator" in row else ""
        lines.append(f"{split:<14}{before:>10}{row['mAP']:>{wide}.1%}   n = {row['images']}")
    judged = report["tags"].get("test", next(iter(report["tags"].values())))
    if judged["labels_without_images"]:
        lines.append(f"{judged['labels_without_images']} labels that no image has count 0 in the mean.")
    lines += ["", f"{'label':<28}{'average precision':>18}{'threshold':>11}"]
    rows = list(zip(report["class_names"], judged["average_precision"], report["thresholds"]))
    for name, value, threshold in rows[:SHOWN]:
        lines.append(f"{name[:27]:<28}{'' if value is None else f'{value:.1%}':>18}{threshold:>11.3f}")
    lines += [f"... {len(rows) - SHOWN} more in report.json"] if len(rows) > SHOWN else []
    lines += ["", f"{root / 'labels.csv'}: labels of {report['images']['train']} training images"]
    if (root / PAGE).is_file():
        lines.append(f"{root / PAGE}: the images to label next; coreg-label {root} asks for them")
    return "\n".join(lines)


def unsure_images(probabilities: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Images of which nobody said a label, those first that are likely to have most labels wrong, (n,).

    That is the sum of min(p, 1 - p) over labels. Images of each likeliest label take turns.

    Args:
        probabilities: float (N, L). observed: int8 (N, L), what a person said.
    """
    rows = np.flatnonzero(~observed.any(axis=1))
    wrong = np.minimum(probabilities, 1 - probabilities)[rows].sum(axis=1)
    return in_turn(probabilities.argmax(axis=1), rows[np.argsort(-wrong, kind="stable")])


def tag_page(
    report: dict[str, Any],
    folder: str,
    annotations: str,
    paths: Sequence[str],
    probabilities: np.ndarray,
    observed: np.ndarray,
    photos: Callable[[np.ndarray], list[Image.Image]],
) -> LabelPage:
    """What a person is asked after a run.

    Args:
        folder, annotations: run folder and store, as a person would type them. paths: of the N training images.
        probabilities: float (N, L). observed: int8 (N, L), what a person said before.
        photos: rows (n,) -> their images.
    """
    rows, names = unsure_images(probabilities, observed)[:ASKED], list(report["class_names"])

    def listed(row: int, state: int) -> str:
        return BETWEEN.join(names[k] for k in np.flatnonzero(observed[row] == state))

    others = [[paths[row], listed(row, PRESENT), listed(row, ABSENT)] for row in np.flatnonzero(observed.any(axis=1))]
    return LabelPage(
        run=folder,
        several=True,
        class_names=names,
        images=asked([paths[row] for row in rows], probabilities[rows], photos(rows)),
        others=others,
        script=script_of(report),
        annotations=annotations,
        few_shot=False,
    )


def write_thresholds(path: Path, class_names: Sequence[str], at: np.ndarray) -> None:
    """thresholds.csv: label,threshold, as `coreg-predict --threshold` reads it back; whoever wants others edits it.

    Raises:
        UserError: it cannot be written.
    """
    with writing_csv(path) as write:
        write(["label", "threshold"])
        for name, threshold in zip(class_names, at):
            write([name, repr(float(threshold))])


def write_tags(
    path: Path, paths: Iterable[str], class_names: Sequence[str], probabilities: np.ndarray, at: np.ndarray, safe: bool
) -> None:
    """labels.csv: path, names of the labels whose probability is at least `at`, and all probabilities, (N, L).

    It can be read back as `--tags`, or as `--images` beside the images.

    Raises:
        UserError: it cannot be written.
    """
    with writing_csv(path, safe) as write:
        write(["path", "labels", *(f"p({name})" for name in class_names)])
        for image, row in zip(paths, probabilities):
            named = BETWEEN.join(name for name, p, least in zip(class_names, row, at) if p >= least)
            write([image, named, *(f"{p:.4f}" for p in row)])
