"""What a finished run of networks of our own leaves beside its page and report: exports, and those of a chosen epoch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coreg.export.calibration import fit_to_agreement
from coreg.export.ensemble import export, spread_rows
from coreg.learn.division import smoothed
from coreg.learn.tables import OwnedRows, predicted
from coreg.nets.model import Model, on_the_hub, parse_backbone_args
from coreg.process import main_process_decides
from coreg.report.metrics import accuracy, consensus
from coreg.run.board import show_features
from coreg.run.loop import Run
from coreg.run.results import Export, Predictions, finish
from coreg.run.task import Task, predict
from coreg.run.training import Training
from coreg.run.trust import trust
from coreg.views.resident import TrainingImages
from coreg.weak.labels import WeakLabels
from coreg.weak.rules import mean_candidates, partial_accuracy

if TYPE_CHECKING:
    from coreg.run.tags import TagTask


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
    names = np.array([*task.store.class_names, "?"], dtype=object)  # -1, for what is not known, is the last one
    labels = {who: names[column].__getitem__ for who, column in classes.items()}
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
