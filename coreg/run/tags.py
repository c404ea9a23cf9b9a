"""What a run trains on where images have several labels, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.numpy import save

from coreg.annotate.tag_evidence import label_evidence
from coreg.annotate.tag_health import suggested_labels
from coreg.annotate.textual import label_similarities
from coreg.data.images import HELD_OUT, TEST, TRAIN
from coreg.data.tags import BETWEEN, read_tags
from coreg.errors import UserError
from coreg.export.card import tag_card
from coreg.files import write_atomically
from coreg.label.page import write_label_page
from coreg.learn.multi.method import MultiMethod
from coreg.learn.multi_options import MultiOptions, SoftOptions, VLPLOptions
from coreg.nets.model import on_the_hub
from coreg.network_options import ImageConfig
from coreg.process import all_or_none, main_process_decides
from coreg.report.multi_metrics import average_precisions, threshold_of_count, thresholds, thresholds_of_truth
from coreg.report.record import SCHEMA, write_report
from coreg.report.report import hardware, peak_memory_mb, summary, versions
from coreg.report.tag_page import page
from coreg.report.tag_record import TagRecord
from coreg.report.tags import measured_splits, tag_page, write_tags, write_thresholds
from coreg.run.board import show_features, show_numbers
from coreg.run.networks import write_networks
from coreg.run.pixels import photos, training_images
from coreg.run.results import how_it_ran
from coreg.run.task import predict, training_rows
from coreg.run.training import Training
from coreg.settings import TagJob
from coreg.store.store import AnnotationStore
from coreg.views.resident import TrainingImages
from coreg.weak.multi import ObservedLabels, published_split, suggestions

if TYPE_CHECKING:
    from coreg.run.loop import Run

OBSERVED = "observed_labels.safetensors"


@dataclass
class TagTask:
    """What is trained on, and how: N training images of L labels."""

    accelerator: Accelerator
    job: TagJob
    image_options: ImageConfig
    method: MultiOptions
    store: AnnotationStore
    data: TrainingImages
    weak: ObservedLabels
    others: dict[str, TrainingImages]  # `validation` and `test` images, where there are some

    def truth(self, split: str) -> np.ndarray:
        """int8 (n, L), true labels of the images of `train`, `validation` or `test`; 0 where unknown."""
        rows = (self.data if split == "train" else self.others[split]).samples.numpy()
        return true_labels(self.store)[rows]


def true_labels(store: AnnotationStore) -> np.ndarray:
    """int8 (N, L), the store's own, 0 where it knows none."""
    return np.zeros((len(store), len(store.class_names)), np.int8) if store.tags is None else store.tags


def observed_labels(job: TagJob, method: MultiOptions, store: AnnotationStore) -> tuple[ObservedLabels, np.ndarray]:
    """What is observed of the images to train on, and the rows of those for validation.

    These are images that the store holds out, where their labels are known, or a part of the training images; labels are
    drawn before it is put aside, as published. Images whose true labels nobody knows are of no use there, and none is.

    Raises:
        UserError: there is nothing to learn from, or a person's list cannot be read or names test images.
    """
    rows, truth = training_rows(job, store), true_labels(store)
    train, validation = np.arange(len(rows)), store.rows_of(HELD_OUT)
    if not truth[validation].any():
        share = job.validation if truth[rows].any() else 0.0
        train, put_aside = published_split(len(rows), share)
        validation = rows[put_aside]
    if job.tags:
        table = read_tags(job.tags, store.paths, store.class_names)
        (held_out,) = np.nonzero(table.any(axis=1) & (store.split != TRAIN))
        if len(held_out):
            raise UserError(f"--tags {job.tags} labels test images, such as {store.paths[held_out[0]]}; remove those lines")
        weak = ObservedLabels(table[rows], rows, truth[rows], {"csv": job.tags})
    else:
        weak = ObservedLabels.from_truth(truth[rows], rows, job.observed, job.positives, job.negatives, job.seed)
    weak = weak.at(train)
    if isinstance(method, VLPLOptions | SoftOptions):
        weak = replace(weak, evidence=label_evidence(store, method.evidence, method.temperature)[weak.samples])
    if method.method in ("bce", "bce_ls"):
        weak = weak.revealed()
    if not weak.table.any() and weak.evidence is None:
        raise UserError(
            f"no label of any training image of {store.root} is observed, and {method.method} learns from nothing else; "
            f"annotate images whose labels are known, give yours with --tags FILE, or take --method soft or vlpl"
        )
    return weak, validation


def prepare_tags(run: Run, method: MultiOptions) -> TagTask:
    """Observed labels and pixels.

    Raises:
        UserError: as `observed_labels`, or images cannot be read any more.
    """
    store, accelerator = run.store, run.accelerator
    weak, validation = all_or_none(accelerator, lambda: observed_labels(run.job, method, store))
    test = store.rows_of(TEST)
    rows = {"train": weak.samples, "validation": validation, "test": test}
    images = dict(zip(rows, training_images(run, *rows.values())))
    others = {name: images[name] for name in ("validation", "test") if len(rows[name])}
    return TagTask(accelerator, run.job, run.image_options, method, store, images["train"], weak, others)


def predicted(task: TagTask, method: MultiMethod, images: TrainingImages) -> torch.Tensor:
    """Logits (n, L) of every image, the same on all processes."""
    return predict(method.net, images, "plain", (), 4 * task.job.batch_size)[0]


def judge_tags(task: TagTask, method: MultiMethod) -> dict[str, float]:
    """mAP on validation and test images, where true labels are known, for the curves."""
    curves = {}
    for split, images in task.others.items():
        truth = task.truth(split)
        if truth.any():
            scores = predicted(task, method, images).double().cpu().numpy()
            curves[f"mAP/{split}"] = float(average_precisions(scores, truth).mean())
    return curves


def choose_thresholds(
    scores: dict[str, np.ndarray], truth: dict[str, np.ndarray], labels_an_image: float | None, by: str
) -> tuple[np.ndarray, str]:
    """Thresholds of the probabilities, float64 (L,), and where they come from.

    They are those of the largest F1 on validation images whose true labels are known. Labels that none of these has or all
    have, or all labels without any such image, get one threshold from which on training images have as many labels as
    expected; where nothing is expected, those of the largest F1 that the probabilities themselves let expect.

    Args:
        scores: probabilities float64 (n, L) by split. truth: int8 (n, L) likewise, 0 unknown.
        labels_an_image: how many labels an image is expected to have, by whatever `by` says; None where nobody knows.
    """
    train = scores["train"]
    if labels_an_image is None:
        without, by = thresholds(train, train), "predictions"
    else:
        without = np.full(train.shape[1], threshold_of_count(train, labels_an_image))
    if "validation" not in scores or not truth["validation"].any():
        return without, by
    return thresholds_of_truth(scores["validation"], truth["validation"], without), "validation labels"


def suggested(task: TagTask) -> np.ndarray:
    """Labels of the training images that the annotator suggests, bool (N, L); by VLPL's own numbers where it is trained."""
    if isinstance(task.method, VLPLOptions):
        return suggestions(task.weak.evidence, task.method.suggestion_threshold) > 0
    return suggested_labels(task.store)[task.weak.samples]


def finish_tags(run: Run, task: TagTask, training: Training, method: MultiMethod, name: str, **more: Any) -> None:
    """The export, labels, thresholds, the page and the report, written by the main process; then the summary is printed."""
    splits = {"train": task.data, **task.others}
    scores = {k: torch.sigmoid(predicted(task, method, v).double()).cpu().numpy() for k, v in splits.items()}
    truth = {split: task.truth(split) for split in splits}
    store, root = task.store, run.folder.root
    similarity = offered = None
    if not store.drawn and store.manifest["features"] is not None and "refined" not in store.manifest:
        table = label_similarities(store)
        similarity = {split: table[images.samples.numpy()] for split, images in splits.items()}
        offered = suggested(task)
    expected, by = task.job.labels_an_image, "labels_an_image"
    if expected is None and offered is not None:
        expected, by = float(offered.sum(axis=1).mean()), "annotator"
    at, chosen_on = choose_thresholds(scores, truth, expected, by)
    settings = write_networks(task, [method.net], run.folder.export, thresholds=at.tolist(), thresholds_from=chosen_on)
    measured = measured_splits(scores, truth, similarity, at)
    report = _report(run, task, training, measured) | {
        "method": name,
        "thresholds": at.tolist(),
        "thresholds_from": chosen_on,
        "parameters": sum(p.numel() for p in method.net.backbone.parameters()),
        **more,
    }
    record = TagRecord(
        report=report,
        settings=run.settings,
        curves=training.curves,
        folder=str(root),
        annotations=str(store.root),
        class_names=store.class_names,
        paths=[store.paths[row] for row in task.weak.samples.tolist()],
        pixels=lambda rows: task.data.pixels(rows).cpu().numpy(),
        probabilities=scores,
        truth=truth,
        similarity=similarity,
        suggested=offered,
        observed=task.weak.table,
        thresholds=at,
    )

    def photos_of(places: np.ndarray) -> list[Image.Image]:
        return photos(run, task.weak.samples[places], record.pixels(places))

    def write() -> None:
        show_features(run.accelerator, task.data, method.net, _labels(record), training.epoch)
        tables = {"observed": task.weak.table, "samples": task.weak.samples}
        write_atomically(root / OBSERVED, save(tables, metadata={"coreg": json.dumps(task.weak.source)}))
        write_tags(root / "labels.csv", record.paths, store.class_names, scores["train"], at, task.job.safe_csv)
        write_thresholds(root / "thresholds.csv", store.class_names, at)
        known = record.observed if task.job.tags else np.zeros_like(record.observed)
        asked = tag_page(report, record.folder, record.annotations, record.paths, scores["train"], known, photos_of)
        write_label_page(root, asked)
        write_atomically(root / "report.html", page(record, asked))
        write_atomically(run.folder.export / "README.md", tag_card(report, settings))
        show_numbers(run.accelerator, report, run.identity, training.epoch)
        write_report(run.folder.report, report)
        print(summary(report, root))

    main_process_decides(run.accelerator, write)


def _report(run: Run, task: TagTask, training: Training, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the report says of the job, and what was measured of each split of which true labels are known."""
    store, splits = task.store, {"train": task.data, **task.others}
    return {
        "schema": SCHEMA,
        "dataset": store.images_spec,
        "seed": task.job.seed,
        "labels_used": int(np.count_nonzero(task.weak.table)),
        "observed": task.weak.source,
        "images": {split: len(images.samples) for split, images in splits.items()},
        "classes": len(store.class_names),
        "class_names": store.class_names,
        "annotator": {"name": store.manifest["model"]["spec"]},
        "tags": measured,
        "per_class_split": next((split for split in ("test", "validation") if split in measured), "train"),
        "needs_review": 0,
        **on_the_hub(run.image_options.backbone, run.image_options.pretrained),
        **how_it_ran(run, training),
        "peak_memory_mb": peak_memory_mb(),
        "hardware": hardware(),
        "versions": versions(),
    }


def _labels(record: TagRecord) -> dict[str, Callable[[int], str]]:
    """Row of a training image -> its labels in words, by who gives them."""
    tables = {"labels": record.predicted, "annotator": record.suggested, "truth": record.truth["train"] > 0}
    there = {who: table for who, table in tables.items() if table is not None and (who != "truth" or table.any())}

    def named(table: np.ndarray) -> Callable[[int], str]:
        return lambda row: BETWEEN.join(record.class_names[c] for c in np.flatnonzero(table[row])) or "none"

    return {who: named(table) for who, table in there.items()}
