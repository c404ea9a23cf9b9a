"""What a finished run leaves: purified labels, exported networks, the page, the report."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax

from coreg.data.images import TRAIN
from coreg.data.labels import NONE
from coreg.export.calibration import fit_to_agreement
from coreg.export.card import model_card
from coreg.export.ensemble import export, spread_rows
from coreg.files import write_atomically
from coreg.learn.division import smoothed
from coreg.learn.tables import OwnedRows, predicted
from coreg.nets.model import Model, on_the_hub, parse_backbone_args
from coreg.process import main_process_decides
from coreg.report.estimate import estimates
from coreg.report.metrics import accuracy, collapse_warnings, consensus, few_shot_warnings, mean_confidence
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
from coreg.run.board import show_features, show_numbers
from coreg.run.loop import Run
from coreg.run.pixels import photos
from coreg.run.task import Task, predict
from coreg.run.training import Training
from coreg.run.trust import trust
from coreg.views.resident import TrainingImages
from coreg.weak.labels import WeakLabels
from coreg.weak.rules import mean_candidates, partial_accuracy

if TYPE_CHECKING:
    from coreg.run.tags import TagTask

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
    scores = _without_labels(run, predicted)
    return build_report(
        store=run.annotated,
        seed=job.seed,
        candidates=predicted.candidates,
        samples=predicted.samples,
        predictions={
            split: {name: rows.argmax(axis=1) for name, rows in logits.items()} | {"ensemble": predicted.classes[split]}
            for split, logits in predicted.logits.items()
        },
        part=_part(run),
        refined=predicted.refined,
        weak_labels=predicted.weak and predicted.weak.source | {"hash": predicted.weak.hash},
        logits=_mean_logits(predicted),
        label_free=scores,
        estimate=_estimates(predicted, scores),
        labels_used=int((predicted.known >= 0).sum()),
        **({"none_of_these": none} if (none := int((run.known == NONE).sum())) else {}),
        warnings=[
            *few_shot_warnings(predicted.known, job.few_shot, names),
            *collapse_warnings(named[named >= 0], names),
        ],
        last_epoch=training.curves[-1],
        images_per_second=training.images_seen / training.seconds,
        training_seconds=training.seconds,
        making_batches=training.making_seconds / training.seconds,
        wall_seconds=time.perf_counter() - run.started,
        processes=run.accelerator.num_processes,
        command=run.command,
        **more,
    )


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


def _part(run: Run) -> dict[str, Any] | None:
    """What the report says of `--share`; None where all images are trained on."""
    asked = getattr(run.job, "share", 1)
    available = len(run.store.rows_of(TRAIN))
    return None if asked == 1 else {"asked": asked, "available": available}


def _mean_logits(predicted: Predictions) -> dict[str, np.ndarray]:
    """Of each split, (n, C): the mean over the networks, whose softmax is the probabilities of labels.csv."""
    number = max(len(predicted.logits["train"]) - 1, 1)
    return {split: rows["ensemble"] / (number * predicted.temperature) for split, rows in predicted.logits.items()}


def _without_labels(run: Run, predicted: Predictions) -> dict[str, Any] | None:
    """What the report says without labels."""
    nets = [rows for name, rows in predicted.logits["train"].items() if name != "ensemble"]
    return without_labels(
        run.annotated,
        run.job.candidates,
        predicted.samples,
        predicted.classes,
        _mean_logits(predicted),
        [log_softmax(rows.astype(np.float64), axis=1) for rows in nets],
    )


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


# ---- networks of our own ----------------------------------------------------------------------------------------------


def finish_networks(run: Run, task: Task, training: Training, nets: Sequence[Model], method: str, **more: Any) -> None:
    """`finish` for trained networks, which are exported, and those of the epoch chosen without labels beside them."""
    chosen, chosen_exports = _chosen_epoch(run, task, training)
    logits, settings = logits_of(task, nets), _export(task, nets, run.folder.export)
    predicted = predictions(run, task, logits, settings["temperature"])
    if training.divisions:
        predicted.losses = _fitted_losses(task, training.divisions.losses)
    classes = {"label": predicted.classes.get("train"), "annotator": task.zero_shot, "truth": task.weak.truth}
    if (task.weak.truth < 0).all():
        del classes["truth"]
    labels = {who: functools.partial(_called, task.store.class_names, column) for who, column in classes.items()}
    main_process_decides(
        run.accelerator, lambda: show_features(run.accelerator, task.data, nets[0], labels, training.epoch)
    )
    finish(
        run,
        training,
        method,
        predicted,
        [Export(run.folder.export, settings), *chosen_exports],
        parameters=sum(p.numel() for p in (*nets[0].backbone.parameters(), *nets[0].tuners.parameters())),
        **on_the_hub(run.image_options.backbone, run.image_options.pretrained),
        **_tuned(run, training),
        temperature=settings["temperature"],
        trust=trust(run, task, predicted.classes),
        chosen_epoch=chosen,
        **more,
    )


def _called(names: Sequence[str], classes: np.ndarray, row: int) -> str:
    return names[classes[row]] if classes[row] >= 0 else "?"


def _tuned(run: Run, training: Training) -> dict[str, Any]:
    """What the report says of tuners and of the head; nothing where a network is trained as it is."""
    options = run.image_options
    if not options.tuner and options.head == "linear":
        return {}
    where = "" if options.blocks == "all" else f" in blocks {options.blocks}"
    start = {"random": "", "text": ", from texts of the classes", "class_mean": ", from mean features of the classes"}
    head = f"{options.head} head{start[options.head_init]}"
    if not options.tuner:
        return {"tuning": head}
    net = training.nets[0]
    trained = [w for w in (*net.backbone.parameters(), *net.tuners.parameters()) if w.requires_grad]
    return {
        "tuning": f"{' and '.join(options.tuner)}{where}; {head}",
        "trainable_parameters": sum(weight.numel() for weight in trained),
    }


def predictions(run: Run, task: Task, logits: dict[str, dict[str, np.ndarray]], temperature: float = 1.0) -> Predictions:
    """What is predicted of the images of a task.

    Args:
        logits: of `train` and `test` as in `Predictions`.
    """
    test = np.zeros(0, dtype=np.int64) if task.test is None else task.test.samples.numpy()
    samples = {"train": task.data.samples.numpy(), "test": test}
    refined = _refined(run, task, samples)
    known = run.known if refined is None else None
    offered = WeakLabels.from_store(run.annotated, run.job.candidates, known, samples["train"])
    return Predictions(
        samples,
        logits,
        task.weak.known,
        offered.table,
        lambda rows: task.data.pixels(rows).cpu().numpy(),
        temperature=temperature,
        refined=refined,
        weak=task.weak,
    )


def logits_of(task: Task, nets: Sequence[Model]) -> dict[str, dict[str, np.ndarray]]:
    """Logits (n, C) of the networks' common prediction (`ensemble`, the sum over them) and of each of two, by split.

    Where tables are kept in parts, process 0 alone has them, and the others no split.
    """
    logits = {}
    for split, images in task.splits.items():
        each = [_logits(task, net, images, "plain", ()) for net in nets]
        if each[0] is None:
            continue
        named = {f"net{number}": rows for number, rows in enumerate(each, start=1)} if len(each) > 1 else {}
        logits[split] = {"ensemble": sum(each)} | named
    return logits


def _logits(task: Task, net: Model, images: TrainingImages, view: str, key: tuple[int | str, ...]) -> np.ndarray | None:
    """Logits (n, C) of all images; None on all processes but the first where tables are kept in parts."""
    logits, _ = predict(net, images, view, key, 4 * task.job.batch_size, task.sharded)
    whole = logits.gathered() if isinstance(logits, OwnedRows) else logits
    return None if whole is None else whole.cpu().numpy()


def _export(task: Task, nets: Sequence[Model], folder: Path) -> dict[str, Any]:
    """Calibrate the networks as they are and write them, on one process; gives their settings."""
    weak = [_logits(task, net, task.data, "weak", ("calibration", number)) for number, net in enumerate(nets)]
    return write_networks(task, nets, folder, **main_process_decides(task.accelerator, lambda: fit_to_agreement(weak)))


def write_networks(task: Task | TagTask, nets: Sequence[Model], folder: Path, **settings: Any) -> dict[str, Any]:
    """Export networks, by the main process; gives the settings of the export on every one.

    Args:
        settings: what `coreg.export.ensemble.export` is given beside what the task says.
    """
    image_options, views = task.image_options, task.data.augmentation
    return main_process_decides(
        task.accelerator,
        lambda: export(
            folder,
            [net.backbone for net in nets],
            image_options.backbone,
            parse_backbone_args(image_options.backbone_args),
            check=task.data.view("plain", spread_rows(len(task.data.samples)), ()),
            tuning=image_options.tuning(),
            tuners=[net.tuners for net in nets],
            class_names=task.store.class_names,
            image_size=image_options.image_size,
            channels=image_options.channels,
            mean=views.mean,
            std=views.std,
            **({} if image_options.resize == "squash" else {"resize": image_options.resize}),
            **settings,
        ),
    )


def _chosen_epoch(run: Run, task: Task, training: Training) -> tuple[dict[str, Any] | None, list[Export]]:
    """What the report says of the epoch chosen without labels, and the export of its networks, where it is an earlier one.

    The networks are left as they were.
    """
    divisions = training.divisions
    if divisions is None or divisions.chosen is None:
        return None, []
    networks = [
        predicted(predict(net, task.data, "weak", ("choice", number), 4 * task.job.batch_size, task.sharded)[0])
        for number, net in enumerate(divisions.nets)
    ]
    divisions.consider(training.epoch, consensus(networks))
    epoch = divisions.chosen["epoch"]
    record = {"epoch": epoch, "epochs": training.epoch, "score": divisions.chosen["score"]}
    if epoch == training.epoch:
        return record, []
    last = [copy.deepcopy(net.state_dict()) for net in divisions.nets]
    for net, weights in zip(divisions.nets, divisions.chosen["nets"]):
        net.load_state_dict(weights)
    classes = {split: rows["ensemble"].argmax(axis=1) for split, rows in logits_of(task, divisions.nets).items()}
    record["accuracy"] = {split: accuracy(rows, task.truth[split]) for split, rows in classes.items()}
    settings = _export(task, divisions.nets, run.folder.chosen_export)
    for net, weights in zip(divisions.nets, last):
        net.load_state_dict(weights)
    line = f"the networks of epoch {epoch} of {training.epoch}, which looked best without labels"
    return record, [Export(run.folder.chosen_export, settings, line, classes)]


def _fitted_losses(task: Task, losses: list[list[np.ndarray]]) -> list[np.ndarray]:
    """What each network's last division was fitted to, (N,), NaN for images left out."""
    fitted, smooth = task.weak.usable & ~task.weak.certain, []
    for history in losses:
        if len(history) and fitted.any():
            smooth.append(np.full(len(fitted), np.nan))
            smooth[-1][fitted] = smoothed([losses[fitted] for losses in history])
    return smooth


def _refined(run: Run, task: Task, samples: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """What the report says of the evidence that `--refine` made; None without."""
    if run.store is run.annotated:
        return None
    best = task.store.probs().argmax(axis=1)
    return {
        "features": task.store.manifest["refined"].get("view", "own"),
        "accuracy": {split: accuracy(best[rows], task.truth[split]) for split, rows in samples.items()},
        "partial_accuracy": partial_accuracy(task.weak.table, task.weak.truth),
        "mean_candidates": mean_candidates(task.weak.table),
    }
