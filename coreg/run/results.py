"""What a finished run leaves: purified labels, exported networks, the page, the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from coreg.data.images import TRAIN
from coreg.data.labels import NONE
from coreg.export.card import model_card
from coreg.files import write_atomically
from coreg.process import main_process_decides
from coreg.report.estimate import estimates
from coreg.report.metrics import collapse_warnings, few_shot_warnings, mean_confidence
from coreg.report.page import write_page
from coreg.report.page_record import RunRecord, Split
from coreg.report.record import write_report
from coreg.report.report import (
    accuracies,
    build_report,
    per_class,
    summary,
    without_labels,
    without_missing,
    write_labels,
)
from coreg.run.board import show_numbers
from coreg.run.loop import Run
from coreg.run.pixels import photos
from coreg.run.training import Training
from coreg.weak.labels import WeakLabels

WEAK_LABELS = "weak_labels.safetensors"


@dataclass
class Predictions:
    """What a method predicts in the end. Row i of everything about a split is the same image."""

    samples: dict[str, np.ndarray]  # of `train` and `test`: int64 (n,), rows of the store
    # of each split, (n, C) by name: `ensemble` (the method's own, the sum over its networks), and each of several
    logits: dict[str, dict[str, np.ndarray]]
    known: np.ndarray  # int64 (N,), classes of training images that a person gave, -1 elsewhere
    candidates: np.ndarray  # bool (N, C), the sets that the annotator is judged by
    # rows (n,) of the training images -> their pictures for the page, uint8 (n, c, H, W)
    pixels: Callable[[np.ndarray], np.ndarray]
    # int64 (n,) of each split, -1 for none, where the prediction is not the largest logit
    classes: dict[str, np.ndarray] = field(default_factory=dict)
    temperature: float = 1.0  # what the networks' mean logits are divided by for probabilities
    # (N,) what each network's last division was fitted to, NaN for images left out
    losses: list[np.ndarray] = field(default_factory=list)
    refined: dict[str, Any] | None = None  # what the report says of the evidence that `--refine` made
    weak: WeakLabels | None = None  # what was trained on, where it was not labels alone; saved in the run folder

    def __post_init__(self) -> None:
        own = {split: rows["ensemble"].argmax(axis=1) for split, rows in self.logits.items()}
        self.classes = own | self.classes


@dataclass
class Export:
    """Networks that were exported."""

    folder: Path
    settings: dict[str, Any]  # of their export
    epoch: str = ""  # which epoch they are of, in words
    # int64 (n,) of each split, what they predict, where it is not the last epoch
    classes: dict[str, np.ndarray] = field(default_factory=dict)


def finish(
    run: Run, training: Training, method: str, predicted: Predictions, exports: Sequence[Export] = (), **more: Any
) -> None:
    """Purified labels, the page and the report, written by the main process; then the summary is printed.

    Args:
        method: its name in the report. exports: what was exported; each gets its card. more: further fields of the report.
    """
    job, store, root = run.job, run.store, run.folder.root
    weights = training.divisions.weights if training.divisions else []

    def write() -> None:
        if predicted.weak is not None:
            predicted.weak.save(root / WEAK_LABELS)
        splits = {split: _split(run, predicted, split) for split in predicted.logits}
        paths = [store.paths[row] for row in predicted.samples["train"].tolist()]
        own, annotator, names = predicted.logits["train"], splits["train"].annotator, store.class_names
        review = write_labels(
            root / "labels.csv", names, paths, own, weights, annotator, predicted.temperature, job.safe_csv
        )
        report = _report(run, training, predicted, method=method, needs_review=review, **more)
        record = RunRecord(
            report=report,
            settings=run.settings,
            curves=training.curves,
            folder=str(root),
            annotations=str(store.root),
            class_names=names,
            paths=paths,
            pixels=predicted.pixels,
            train=splits["train"],
            test=splits.get("test"),
            known=predicted.known,
            photos=lambda rows: photos(run, predicted.samples["train"][rows], predicted.pixels(rows)),
            none=[store.paths[row] for row in np.flatnonzero(run.known == NONE)],
            weights=weights,
            losses=predicted.losses,
        )
        write_page(root, record)
        show_numbers(run.accelerator, report, run.identity, training.epoch)
        for one in exports:
            write_atomically(one.folder / "README.md", _card(report, one, splits))
        write_report(run.folder.report, report)
        print(summary(report, root))

    main_process_decides(run.accelerator, write)


def _report(run: Run, training: Training, predicted: Predictions, **more: Any) -> dict[str, Any]:
    job, names, named = run.job, run.store.class_names, predicted.classes["train"]
    nets = [rows for name, rows in predicted.logits["train"].items() if name != "ensemble"]
    log_p = [log_softmax(rows.astype(np.float64), axis=1) for rows in nets]
    mean, share = _mean_logits(predicted), getattr(job, "share", 1)
    scores = without_labels(run.annotated, job.candidates, predicted.samples, predicted.classes, mean, log_p)
    return build_report(
        store=run.annotated,
        seed=job.seed,
        candidates=predicted.candidates,
        samples=predicted.samples,
        predictions={
            split: {name: rows.argmax(axis=1) for name, rows in logits.items()} | {"ensemble": predicted.classes[split]}
            for split, logits in predicted.logits.items()
        },
        part=None if share == 1 else {"asked": share, "available": len(run.store.rows_of(TRAIN))},
        refined=predicted.refined,
        weak_labels=predicted.weak and predicted.weak.source | {"hash": predicted.weak.hash},
        logits=mean,
        label_free=scores,
        # a network that began as the annotator shares its mistakes, of which no score knows
        estimate=None if run.folder.tower.is_dir() else _estimates(predicted, scores),
        labels_used=int((predicted.known >= 0).sum()),
        **({"none_of_these": none} if (none := int((run.known == NONE).sum())) else {}),
        warnings=[
            *few_shot_warnings(predicted.known, job.few_shot, names),
            *collapse_warnings(named[named >= 0], names),
        ],
        making_batches=training.making_seconds / training.seconds,
        **how_it_ran(run, training),
        **more,
    )


def how_it_ran(run: Run, training: Training) -> dict[str, Any]:
    """What every report says of a training beside what came of it."""
    return {
        "last_epoch": training.curves[-1],
        "images_per_second": training.images_seen / training.seconds,
        "training_seconds": training.seconds,
        "wall_seconds": time.perf_counter() - run.started,
        "processes": run.accelerator.num_processes,
        "command": run.command,
    }


def _card(report: dict[str, Any], export: Export, splits: dict[str, Split]) -> str:
    """The README of an export: the report's, with the accuracies of the networks that lie there."""
    if not export.classes:
        return model_card(report, export.settings)
    judged, names = report["per_class_split"], export.settings["class_names"]
    own = {
        "accuracy": {split: accuracies({"ensemble": rows}, splits[split].labels) for split, rows in export.classes.items()},
        "per_class_accuracy": per_class(names, splits[judged].labels, None, export.classes[judged]),
    }
    for name, row in own["per_class_accuracy"].items():
        row["annotator"] = report["per_class_accuracy"][name].get("annotator")
    # the estimate is of the last epoch's networks
    return model_card(report | {"estimate": None} | without_missing(own), export.settings, f"These are {export.epoch}.")


def _split(run: Run, predicted: Predictions, split: str) -> Split:
    """Predictions beside the annotator's, before `--refine`, and the truth."""
    rows, truth = predicted.samples[split], run.store.labels
    annotator = run.annotated.probs()[rows].argmax(axis=1)
    labels = np.full(len(rows), -1) if truth is None else truth[rows]
    return Split(predicted.logits[split], annotator, labels, predicted.temperature)


def _mean_logits(predicted: Predictions) -> dict[str, np.ndarray]:
    """Of each split, (n, C): the mean over the networks, whose softmax is the probabilities of labels.csv."""
    number = max(len(predicted.logits["train"]) - 1, 1)
    return {split: rows["ensemble"] / (number * predicted.temperature) for split, rows in predicted.logits.items()}


def _estimates(predicted: Predictions, scores: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the report estimates of accuracies: of networks that learned from an annotator, not of the annotator tuned.

    Candidate sets that were drawn from the truth, and labels of all images, leave nothing to estimate.
    """
    weak = predicted.weak
    if weak is None or scores is None or "annotator" not in weak.source or weak.certain.all():
        return None
    logits = {split: rows for split, rows in _mean_logits(predicted).items() if len(rows)}
    confidence = {split: mean_confidence(rows, predicted.classes[split]) for split, rows in logits.items()}
    return estimates(confidence, scores, {split: len(rows) for split, rows in logits.items()})
