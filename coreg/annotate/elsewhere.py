"""Labels with probabilities, of a store or of a finished run, as other programs for labels read them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from coreg.data.labels import csv_lines
from coreg.data.tags import BETWEEN
from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.store.store import AnnotationStore

LABELS = "labels.csv"  # of a run folder
LOCAL_FILES = "/data/local-files/?d="  # where Label Studio serves files of its own machine


@dataclass
class Proposals:
    """What is thought of some images.

    Attributes:
        paths: n image paths as the image list writes them. labels: of each, names of classes; none where nothing was
            thought. probabilities: of each label.
        several: whether images have several labels.
        table: float32 (n, C) probabilities of all classes; None where only those of `labels` are known.
        given: int64 (n,), the class that most templates voted for, of ties the more probable one; with `table` alone.
    """

    source: str
    class_names: list[str]
    paths: list[str]
    labels: list[list[str]] = field(default_factory=list)
    probabilities: list[list[float]] = field(default_factory=list)
    several: bool = False
    table: np.ndarray | None = None
    given: np.ndarray | None = None


def of_store(store: AnnotationStore) -> Proposals:
    """The most probable class of every readable image."""
    (rows,) = np.nonzero(~store.unreadable)
    probs, names = store.probs()[rows].astype(np.float32), list(store.class_names)
    votes = np.stack([(store.votes()[rows] == index).sum(axis=1) for index in range(len(names))], axis=1)
    best = probs.argmax(axis=1)
    return Proposals(
        str(store.manifest["model"]["spec"]),
        names,
        [store.paths[row] for row in rows],
        [[names[index]] for index in best],
        [[float(row[index])] for row, index in zip(probs, best)],
        table=probs,
        given=(votes + 0.5 * probs).argmax(axis=1),  # a probability never outweighs a vote
    )


def of_run(folder: Path, class_names: list[str]) -> Proposals:
    """The labels that a finished run gave its training images, one or several each.

    Raises:
        UserError: its labels.csv cannot be read or names other classes.
    """
    file = folder / LABELS
    lines = [line for _, line in csv_lines(str(file), (), "give the folder of a finished run, or an annotation store")]
    several = bool(lines) and "labels" in lines[0]
    proposals = Proposals(str(folder), class_names, [line["path"] for line in lines], several=several)
    try:
        for line in lines:
            named = [name for name in line["labels"].split(BETWEEN) if name] if several else [line["label"]]
            proposals.labels.append(named)
            shares = [float(line[f"p({name})"]) for name in named] if several else [float(line["probability"])]
            proposals.probabilities.append(shares)
        unknown = {name for named in proposals.labels for name in named} - set(class_names)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is no labels.csv as a training writes it ({error!r}); train anew") from None
    if unknown:
        raise UserError(f"{file} names {sorted(unknown)[0]!r}, which is none of the {len(class_names)} classes of that run")
    return proposals


# ---- forms ----------------------------------------------------------------------------------------------------------


def cleanlab(proposals: Proposals, target: Path, prefix: str) -> str:
    """A .npz file without objects: pred_probs float32 (n, C), labels int64 (n,), class_names and paths.

    Raises:
        UserError: not all probabilities are known.
    """
    if proposals.table is None:
        raise UserError(f"{proposals.source} has not the probabilities of all classes; export the annotation store instead")
    content = io.BytesIO()
    arrays = {"pred_probs": proposals.table, "labels": proposals.given}
    text = {"class_names": np.array(proposals.class_names), "paths": np.array(proposals.paths)}
    np.savez_compressed(content, **arrays, **text)
    write_atomically(target, content.getvalue())
    return "numpy.load; cleanlab.filter.find_label_issues(labels, pred_probs)"


def label_studio(proposals: Proposals, target: Path, prefix: str) -> str:
    """Tasks with predictions, the least certain first, and beside them the labelling interface that they belong to."""
    kind, tasks = ("multiple" if proposals.several else "single"), []
    certainty = [min(shares, default=0.0) for shares in proposals.probabilities]
    for row in np.argsort(certainty, kind="stable"):
        path = proposals.paths[row]
        result = {"from_name": "choice", "to_name": "image", "type": "choices"}
        result["value"] = {"choices": proposals.labels[row]}
        prediction = {"model_version": proposals.source, "score": round(certainty[row], 4), "result": [result]}
        # the path comes back with the answers, whatever becomes of the address
        tasks.append({"data": {"image": prefix + quote(path), "path": path}, "predictions": [prediction]})
    choices = "".join(f"\n    <Choice value={quoteattr(name)}/>" for name in proposals.class_names)
    interface = target.with_suffix(".xml")
    write_atomically(
        interface,
        f'<View>\n  <Image name="image" value="$image"/>\n  <Choices name="choice" toName="image" choice="{kind}">'
        f"{choices}\n  </Choices>\n</View>\n",
    )
    write_atomically(target, json.dumps(tasks, ensure_ascii=True, indent=1) + "\n")
    return f"import it into a project whose labelling interface is {interface}; its JSON export is read by --labels"


def fiftyone(proposals: Proposals, target: Path, prefix: str) -> str:
    """FiftyOne's labels.json of image classification: path without its suffix -> label and confidence, or a list of them.

    Raises:
        UserError: two images have the same path but for the suffix.
    """
    entries: dict[str, Any] = {}
    for path, named, shares in zip(proposals.paths, proposals.labels, proposals.probabilities):
        each = [{"label": name, "confidence": round(share, 4)} for name, share in zip(named, shares)]
        name = str(PurePosixPath(path).with_suffix(""))
        if name in entries:
            raise UserError(f"FiftyOne leaves out suffixes, and {path!r} is not the only image {name}; rename one")
        entries[name] = each if proposals.several else each[0]
    write_atomically(target, json.dumps({"labels": entries}, ensure_ascii=True, indent=1) + "\n")
    kind = "fiftyone.types.FiftyOneImageClassificationDataset"
    return f"fiftyone.Dataset.from_dir(dataset_type={kind}, data_path=FOLDER_OF_IMAGES, labels_path={str(target)!r})"


# name -> how it is written, the suffix of its file
FORMS: dict[str, tuple[Callable[[Proposals, Path, str], str], str]] = {
    "cleanlab": (cleanlab, ".npz"),
    "label_studio": (label_studio, ".json"),
    "fiftyone": (fiftyone, ".json"),
}
