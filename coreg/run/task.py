"""What a run trains on: candidate sets from the annotation store, its images, labels that a person gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from coreg.data.images import TEST, TRAIN
from coreg.data.labels import NONE, few_shot_draw, read_labels
from coreg.errors import UserError
from coreg.learn.collective import gather_rows, my_slice
from coreg.learn.division import Predicted
from coreg.learn.tables import PIECE, OwnedRows, Table, owned, predicted
from coreg.nets.model import Model
from coreg.network_options import ImageConfig
from coreg.process import all_or_none
from coreg.report.report import prefilter_line
from coreg.run.pixels import training_images
from coreg.settings import JobConfig
from coreg.store.store import AnnotationStore
from coreg.views.order import ShuffledRows, drawn_part
from coreg.views.resident import TrainingImages
from coreg.weak.labels import WeakLabels

if TYPE_CHECKING:
    from coreg.run.loop import Run

Options = TypeVar("Options")


@dataclass
class Task(Generic[Options]):
    """What is trained on, and how: everything that stays the same while training N images of C classes."""

    accelerator: Accelerator
    job: JobConfig  # options common to all scripts
    image_options: ImageConfig  # what the networks are and what they see
    method: Options  # the method's own options
    store: AnnotationStore
    data: TrainingImages  # the training images
    weak: WeakLabels  # their candidate sets
    table: Table  # bool (N, C), the candidate sets on the device
    prior: np.ndarray  # (C,), for distribution alignment
    annotator: np.ndarray  # int64 (N,), best class of the evidence that is trained on
    zero_shot: np.ndarray  # int64 (N,), the same before `--refine`, for reports
    repeated: np.ndarray  # int64, rows with a person's label that P gets on top
    extra: np.ndarray  # int64, such rows for an extra supervised term
    test: TrainingImages | None  # the test images
    test_labels: np.ndarray  # int64, their classes, -1 unknown

    @property
    def sharded(self) -> bool:
        """Whether each process holds the rows of tables that it owns, and no others."""
        return isinstance(self.table, OwnedRows)

    @property
    def splits(self) -> dict[str, TrainingImages]:
        """The images by split, `train` and, where there are some, `test`."""
        return {"train": self.data} | ({} if self.test is None else {"test": self.test})

    @property
    def truth(self) -> dict[str, np.ndarray]:
        """int64, true classes of the images of `train` and `test`, -1 unknown; for reports alone."""
        return {"train": self.weak.truth, "test": self.test_labels}

    def labelled(self, rows: np.ndarray, view: str, key: tuple[int | str, ...]) -> tuple[tuple[Tensor, Tensor] | None, int]:
        """This process's share of a step's labelled images and their classes, and how many there are in all.

        Args:
            rows: int64 (n,), of the global batch; none where there is no supervised term. view, key: see
                `TrainingImages.view`.
        """
        if not len(rows):
            return None, 0
        my_rows = rows[my_slice(len(rows))]
        return (self.data.view(view, my_rows, ("labelled", *key)), self.data.places(self.weak.known[my_rows])), len(rows)

    def read_ahead(self, start: int, *orders: ShuffledRows, partners: Callable[[int], np.ndarray] | None = None) -> None:
        """Announce the steps of a network's epoch from `start` on, as many as the first of `orders` has in a round.

        Args:
            orders: whose batches they take; each process takes its share of each.
            partners: step -> further rows int64 (n,) that this process needs.
        """

        def my_rows(step: int) -> np.ndarray:
            batches = [order.batch(step) for order in orders]
            parts = [rows[my_slice(len(rows))] for rows in batches]
            return np.concatenate(parts if partners is None else [*parts, partners(step)])

        self.data.read_ahead(my_rows, range(start, orders[0].per_round))


def training_rows(job: JobConfig, store: AnnotationStore) -> np.ndarray:
    """Rows of the images to train on, int64 (n,): the readable ones, or the part of them that `--share` asks for.

    Raises:
        UserError: more images are asked for than there are, or a part of fewer than 2.
    """
    rows = store.rows_of(TRAIN)
    asked = getattr(job, "share", 1.0)  # methods that tune the annotator on labelled images alone have no such option
    if asked == 1:
        return rows
    n = int(asked) if asked > 1 else round(asked * len(rows))
    if not 2 <= n <= len(rows):
        raise UserError(
            f"--share {asked:g} is {n} of the {len(rows)} readable training images of {store.root}; ask for at least 2 of "
            f"them, and for no more than there are"
        )
    return drawn_part(rows, n, job.seed)


def known_labels(job: JobConfig, store: AnnotationStore) -> np.ndarray:
    """Classes that a person gave, int64 over all rows of the store, `NONE` for none of them, -1 elsewhere.

    Raises:
        UserError: labels of test images, or no labels to draw from.
    """
    known, train = np.full(len(store.paths), -1), training_rows(job, store)
    if job.labels:
        rows, classes = read_labels(job.labels, store.paths, store.class_names)
        held_out = rows[store.split[rows] != TRAIN]
        if len(held_out):
            raise UserError(f"{job.labels} labels test images, such as {store.paths[held_out[0]]}")
        trained = np.isin(rows, train)
        known[rows[trained]] = classes[trained]
    elif job.few_shot:
        if store.labels is None:
            raise UserError("--few_shot draws from true labels, and the store has none; give your own with --labels FILE")
        rows = few_shot_draw(store.labels, train, job.few_shot, len(store.class_names), job.seed)
        known[rows] = store.labels[rows]
    return known


def prepare(run: Run, method: Options, alignment: str = "uniform") -> Task[Options]:
    """Candidate sets from the store and from labels that a person gave, and the images where `--pixels` keeps them.

    Args:
        alignment: `annotator` for a prior like the annotator's mean prediction, otherwise it is uniform.

    Raises:
        UserError: the images are not those that were annotated, some cannot be read any more, or too few could be read
            when they were annotated.
    """
    accelerator, job, image_options, store = run.accelerator, run.job, run.image_options, run.store
    labels = np.full(len(store.paths), -1) if store.labels is None else store.labels
    train = training_rows(job, store)
    train = train[run.known[train] != NONE]  # there is nothing to learn from an image of no class
    test = store.rows_of(TEST)
    weak = _weak_labels(run, train)
    train = weak.samples
    given, n_classes = np.flatnonzero(weak.certain), len(store.class_names)
    # so often that labelled images make up 5 % of an epoch's draws, once at least
    times = -(-len(train) // (20 * max(len(given), 1))) - 1
    train_images, test_images = training_images(run, train, test)
    table = torch.from_numpy(weak.table)
    evidence = _evidence(store.probs(), train)
    prior = evidence.mean if alignment == "annotator" else np.full(n_classes, 1 / n_classes)
    return Task(
        accelerator=accelerator,
        job=job,
        image_options=image_options,
        method=method,
        store=store,
        data=train_images,
        weak=weak,
        table=owned(table, accelerator.device) if run.sharded else table.to(accelerator.device),
        prior=prior / prior.sum(),
        annotator=evidence.classes,
        zero_shot=evidence.classes if run.annotated is store else run.annotated.probs()[train].argmax(axis=1),
        repeated=np.tile(given, max(times, 0) if job.label_mode == "replace+repeat" else 0),
        extra=given if job.label_mode == "extra_ce" else given[:0],
        test=test_images if len(test) else None,
        test_labels=labels[test],
    )


def _evidence(probs: np.ndarray, rows: np.ndarray) -> Predicted:
    """What the annotator predicts, from probabilities float16 of which these rows int64 (N,) are of training images."""
    classes, sums = np.zeros(len(rows), dtype=np.int64), np.zeros((0, probs.shape[1]))
    step = max(1, PIECE // probs.shape[1])
    for start in range(0, len(rows), step):
        some = probs[rows[start : start + step]].astype(np.float64)
        classes[start : start + step] = some.argmax(axis=1)
        sums = np.concatenate([sums, some]).sum(axis=0, keepdims=True)
    return Predicted(classes, sums[0] / len(rows))


def _weak_labels(run: Run, train: np.ndarray) -> WeakLabels:
    """What is known of the labels of the training images; a UserError where it is nothing."""
    store, others = run.store, not run.accelerator.is_main_process  # all find the same, and the main process says it
    if len(train) < 2:
        raise UserError(f"the store {store.root} has {len(train)} readable training images; give at least 2", silent=others)
    weak = WeakLabels.from_store(store, run.job.candidates, run.known, train)
    if not weak.usable.any():
        raise UserError(
            f"no template names a class of any training image in {store.root}; annotate with other class names or another "
            f"--vlm, or give labels with --labels FILE",
            silent=others,
        )
    if run.likely is None:
        return weak
    weak = all_or_none(run.accelerator, lambda: weak.keep_likely(run.likely.probs()[train], run.job.prefilter))
    run.accelerator.print(prefilter_line(weak.source["prefilter"]))
    return weak


@torch.no_grad()
def predict(
    net: Model, images: TrainingImages, view: str, key: tuple[int | str, ...], batch_size: int, sharded: bool = False
) -> tuple[Table, Table]:
    """Logits (n, C) and features (n, D) of every image in evaluation mode; each process does its share.

    Args:
        sharded: each process keeps the rows of its share, and no others are sent to it.
    """
    net.eval()
    n = len(images.samples)
    rows = np.arange(n)[my_slice(n)]
    # a process without rows passes an empty batch, so that all results have their shapes
    starts = range(0, max(len(rows), 1), batch_size)
    batches = (images.inputs(view, rows[start : start + batch_size], key) for start in starts)
    logits, features = zip(*(net.forward(batch) for batch in batches))
    my_logits, my_features = torch.cat(logits).to(images.dtype), torch.cat(features)
    if sharded:
        return OwnedRows(my_logits, n), OwnedRows(my_features, n)
    return gather_rows(my_logits, n), gather_rows(my_features, n)


def finite(task: Task, logits: Table, number: int, epoch: int) -> Predicted:
    """What the logits (N, C) of network `number` (0 or 1) before its epoch `epoch` predict.

    Raises:
        UserError: some are no numbers.
    """
    network = predicted(logits)
    if not network.finite:
        raise UserError(
            f"network {number + 1} predicts no numbers any more in epoch {epoch + 1}; start anew in another --output_dir "
            f"with a smaller --lr (now {task.job.lr}); the checkpoints before it are kept",
            silent=not task.accelerator.is_main_process,
        )
    return network


@torch.no_grad()
def pooled(net: Model, images: TrainingImages, rows: np.ndarray, batch_size: int, mirrored: bool = False) -> Tensor:
    """Pooled features (n, D) of some images, or of their mirror images; each process encodes its share."""
    net.eval()
    my_rows = rows[my_slice(len(rows))]
    batches = images.in_batches("plain", my_rows, batch_size, ()) if len(my_rows) else [images.view("plain", my_rows, ())]
    features = [net.pooled(x.flip(3) if mirrored else x) for x in batches]
    return gather_rows(torch.cat(features), len(rows))
