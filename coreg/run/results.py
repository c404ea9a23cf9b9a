"""What a finished run leaves: purified labels, exported networks, the report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from coreg.data.images import TRAIN
from coreg.export.calibration import fit_to_agreement
from coreg.export.card import model_card
from coreg.export.ensemble import export, spread_rows
from coreg.files import write_atomically
from coreg.learn.division import smoothed
from coreg.nets.model import parse_backbone_args
from coreg.process import main_process_decides
from coreg.report.metrics import accuracy, collapse_warnings, consensus, few_shot_warnings
from coreg.report.page import write_page
from coreg.report.page_record import RunRecord, Split
from coreg.report.record import write_report
from coreg.report.report import accuracies, build_report, per_class, without_labels, without_missing, write_labels
from coreg.run.batches import TrainingImages
from coreg.run.board import show_end
from coreg.run.job import Run
from coreg.run.task import Task, predict
from coreg.run.training import Training
from coreg.weak.rules import candidate_sets, mean_candidates, partial_accuracy


def logits_of(task: Task, training: Training, images: TrainingImages | None) -> dict[str, np.ndarray]:
    """Logits (n, C) of the method's own prediction (`ensemble`, the sum over its networks) and of each of two networks."""
    if images is None:
        return {}
    each = [predict(net, images, "plain", (), 4 * task.job.batch_size)[0].cpu().numpy() for net in training.nets]
    named = {f"net{number}": rows for number, rows in enumerate(each, start=1)} if len(each) > 1 else {}
    return {"ensemble": sum(each)} | named


def _export(task: Task, training: Training, folder: Path) -> Callable[[], dict[str, Any]]:
    """Calibrate the networks as they are, on every process; what it gives writes them, on one, and gives their settings."""
    job, look, views = task.job, task.look, task.data.augmentation
    weak = [
        predict(net, task.data, "weak", ("calibration", number), 4 * job.batch_size)[0].cpu().numpy()
        for number, net in enumerate(training.nets)
    ]
    calibration = fit_to_agreement(weak)

    def write() -> dict[str, Any]:
        return export(
            folder,
            [net.backbone for net in training.nets],
            look.backbone,
            parse_backbone_args(look.backbone_args),
            check=task.data.view("plain", spread_rows(len(task.data.samples)), ()),
            class_names=task.store.class_names,
            image_size=look.image_size,
            channels=look.channels,
            mean=views.mean,
            std=views.std,
            **calibration,
        )

    return write


@dataclass
class _Chosen:
    """The epoch chosen without labels.

    said: what the report says about it: epoch, score, accuracies. predictions: for `train` and `test` int64 (n,) of its
    networks, and settings: of their export, where it is not the last epoch.
    """

    said: dict[str, Any]
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    settings: dict[str, Any] | None = None


def _chosen_epoch(run: Run, task: Task, training: Training) -> _Chosen | None:
    """Export the networks of the epoch chosen without labels beside the last ones, where it is an earlier epoch.

    The networks are left as they were.
    """
    if training.chosen is None:
        return None
    log_ps = [
        predict(net, task.data, "weak", ("choice", number), 4 * task.job.batch_size)[0]
        for number, net in enumerate(training.nets)
    ]
    training.consider(consensus([rows.double().log_softmax(1).cpu().numpy() for rows in log_ps]))
    epoch = training.chosen["epoch"]
    said = {"epoch": epoch, "epochs": training.epoch, "score": training.chosen["score"]}
    if epoch == training.epoch:
        return _Chosen(said)
    last = [copy.deepcopy(net.state_dict()) for net in training.nets]
    for net, weights in zip(training.nets, training.chosen["nets"]):
        net.load_state_dict(weights)
    found = {"train": logits_of(task, training, task.data), "test": logits_of(task, training, task.test)}
    predictions = {split: logits["ensemble"].argmax(axis=1) for split, logits in found.items() if logits}
    truth = {"train": task.labels, "test": task.test_labels}
    said["accuracy"] = {split: accuracy(predicted, truth[split]) for split, predicted in predictions.items()}
    settings = main_process_decides(task.accelerator, _export(task, training, run.folder.chosen_export))
    for net, weights in zip(training.nets, last):
        net.load_state_dict(weights)
    return _Chosen(said, predictions, settings)


def _chosen_card(task: Task, chosen: _Chosen, report: dict[str, Any]) -> str:
    """The README of `export_chosen`: the run's, with the accuracies of the networks that lie there."""
    truth = {"train": task.labels, "test": task.test_labels}
    judged = report["per_class_split"]
    names = task.store.class_names
    own = {
        "accuracy": {split: accuracies({"ensemble": found}, truth[split]) for split, found in chosen.predictions.items()},
        "per_class_accuracy": per_class(names, truth[judged], None, chosen.predictions[judged]),
    }
    for name, row in own["per_class_accuracy"].items():
        row["annotator"] = report["per_class_accuracy"][name].get("annotator")
    epoch = f"the networks of epoch {chosen.said['epoch']} of {chosen.said['epochs']}, which looked best without labels"
    return model_card(report | without_missing(own), chosen.settings, f"These are {epoch}.")


def _record(
    run: Run,
    task: Task,
    training: Training,
    report: dict[str, Any],
    on_train: dict[str, np.ndarray],
    on_test: dict[str, np.ndarray],
) -> RunRecord:
    """What the page and TensorBoard show of the run."""
    store, temperature = task.store, report["temperature"]
    fitted = task.usable & (task.known < 0)
    losses = []
    for history in training.losses:
        if len(history) and fitted.any():
            losses.append(np.full(len(fitted), np.nan))
            losses[-1][fitted] = smoothed(np.stack(history)[:, fitted])
    test = None
    if task.test is not None:
        zero_shot = task.annotated.probs()[task.test.samples.numpy()].argmax(axis=1)
        test = Split(on_test, zero_shot, task.test_labels, temperature)
    return RunRecord(
        report=report,
        settings=run.settings,
        curves=training.curves,
        folder=str(run.folder.root),
        annotations=str(store.root),
        class_names=store.class_names,
        paths=[store.paths[row] for row in task.data.samples.tolist()],
        pixels=lambda rows: task.data.pixels(rows).cpu().numpy(),
        train=Split(on_train, task.zero_shot, task.labels, temperature),
        test=test,
        known=task.known,
        weights=training.weights,
        losses=losses,
    )


def _samples(task: Task) -> dict[str, np.ndarray]:
    """Rows of the store by split."""
    test = np.zeros(0, dtype=np.int64) if task.test is None else task.test.samples.numpy()
    return {"train": task.data.samples.numpy(), "test": test}


def _without_labels(task: Task, logits: dict[str, dict[str, np.ndarray]], temperature: float) -> dict[str, Any] | None:
    """What the report says without labels.

    Args:
        logits: as of `logits_of`, by split. temperature: of the networks' mean logits, as in labels.csv.
    """
    own = {split: found["ensemble"] for split, found in logits.items() if found}
    nets = [rows for name, rows in logits["train"].items() if name != "ensemble"]
    return without_labels(
        task.annotated,
        task.job.candidates,
        _samples(task),
        {split: rows.argmax(axis=1) for split, rows in own.items()},
        {split: rows / (max(len(nets), 1) * temperature) for split, rows in own.items()},
        [log_softmax(rows.astype(np.float64), axis=1) for rows in nets],
    )


def _refined(task: Task) -> dict[str, Any] | None:
    """What the report says of the evidence that `--refine` made; None without."""
    if task.store is task.annotated:
        return None
    best = task.store.probs().argmax(axis=1)
    truth = {"train": task.labels, "test": task.test_labels}
    return {
        "features": task.store.manifest["refined"].get("view", "own"),
        "accuracy": {split: accuracy(best[rows], truth[split]) for split, rows in _samples(task).items()},
        "partial_accuracy": partial_accuracy(task.candidates, task.labels),
        "mean_candidates": mean_candidates(task.candidates),
    }


def finish(
    run: Run,
    task: Task,
    training: Training,
    method: str,
    judged: dict[str, dict[str, np.ndarray]] | None = None,
    parameters: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Purified labels, exported networks and the report, written by the main process; gives the report.

    Args:
        method: its name in the report. more: further fields of the report.
        judged: for `train` and `test` what `logits_of` gives, where no network of ours predicts; nothing is exported then,
            and `parameters` is how many the method has.
    """
    job, store, folder = task.job, task.store, run.folder
    chosen = _chosen_epoch(run, task, training)
    if judged is None:
        on_train, on_test = logits_of(task, training, task.data), logits_of(task, training, task.test)
        write_export = _export(task, training, folder.export)
        parameters = sum(p.numel() for p in training.nets[0].backbone.parameters())
    else:
        on_train, on_test, write_export = judged["train"], judged["test"], lambda: {"temperature": 1.0}

    def write() -> dict[str, Any]:
        exported = write_export()
        paths = [store.paths[row] for row in task.data.samples.tolist()]
        needs_review = write_labels(
            folder.root / "labels.csv",
            store.class_names,
            paths,
            on_train,
            training.weights,
            task.zero_shot,
            exported["temperature"],
            run.job.safe_csv,
        )
        available = int(((store.split == TRAIN) & ~store.unreadable).sum())
        refined, samples = _refined(task), _samples(task)
        report = build_report(
            method=method,
            store=task.annotated,
            seed=job.seed,
            candidates=task.candidates
            if refined is None
            else candidate_sets(task.annotated, job.candidates)[samples["train"]],
            samples=samples,
            predictions={
                split: {name: rows.argmax(axis=1) for name, rows in found.items()}
                for split, found in (("train", on_train), ("test", on_test))
            },
            part={"asked": job.share, "available": available} if job.share != 1 else None,
            refined=refined,
            label_free=_without_labels(task, {"train": on_train, "test": on_test}, exported["temperature"]),
            labels_used=int((task.known >= 0).sum()),
            needs_review=needs_review,
            warnings=[
                *few_shot_warnings(task.known, job.few_shot, store.class_names),
                *collapse_warnings(on_train["ensemble"].argmax(axis=1), store.class_names),
            ],
            last_epoch=training.curves[-1],
            chosen_epoch=chosen.said if chosen else None,
            parameters=parameters,
            images_per_second=training.images_seen / training.seconds,
            training_seconds=training.seconds,
            making_batches=training.making_seconds / training.seconds,
            wall_seconds=time.perf_counter() - run.started,
            processes=task.accelerator.num_processes,
            command=run.command,
            temperature=exported["temperature"],
            **more,
        )
        record = _record(run, task, training, report, on_train, on_test)
        write_page(folder.root, record)
        if judged is None:
            show_end(task.accelerator, task.data, training, record, run.identity)
            write_atomically(folder.export / "README.md", model_card(report, exported))
        if chosen and chosen.settings:
            write_atomically(folder.chosen_export / "README.md", _chosen_card(task, chosen, report))
        write_report(folder.report, report)
        return report

    return main_process_decides(task.accelerator, write)
