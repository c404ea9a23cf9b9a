"""What TensorBoard shows of a run beside its curves: views, divisions, a map of features, settings with what they led to.

Everything here does something on the main process, and only where TensorBoard is the tracker; other trackers get the
curves. It is called rarely and draws nothing at random, so that a run is the same with and without it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from coreg.errors import UserError
from coreg.files import reason_of
from coreg.nets.model import Model
from coreg.run.training import Training
from coreg.views.resident import TrainingImages

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EXAMPLES = 8  # images of a grid, one a row
VIEWS = ("plain", "weak", "weak", "strong", "strong")  # its columns
SIDES = (48, 112)  # smaller pictures are enlarged, larger ones reduced
MOST_DIVISIONS = 50  # epochs of a run with histograms
# curves that belong into one chart (tab "custom scalars"): title -> regular expressions of tags
TOGETHER = {
    "accuracy on the test images": [r"accuracy/test/.*"],
    "loss": [r"loss/net\d/total"],
    "trusted images": ["division/trusted", r"truth/accuracy_in_.*"],
    "agreement": [r"division/agreement_.*"],
    "pseudo-labels of each class": [r"pseudo_labels/.*"],
}
POINTS, SPRITE = 400, 32  # images on the map of features, and the side of their pictures


def writer_of(accelerator: Accelerator) -> SummaryWriter | None:
    """TensorBoard's writer on the main process where it is a tracker; None elsewhere."""
    trackers = accelerator.trackers if accelerator.is_main_process else []
    return next((tracker.writer for tracker in trackers if tracker.name == "tensorboard"), None)


@contextlib.contextmanager
def writing_curves() -> Iterator[None]:
    """What TensorBoard cannot write is one line for the person. Its thread may say so at any later call.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the curves for TensorBoard ({reason_of(error)}); the checkpoints are intact: free some space "
            "and give the same command again"
        ) from None


@contextlib.contextmanager
def silent_thread() -> Iterator[None]:
    """Within, TensorBoard's thread does not print the error that its writer raises in the main thread as well."""
    before = threading.excepthook

    def unless_raised_again(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            before(args)

    threading.excepthook = unless_raised_again
    try:
        yield
    finally:
        threading.excepthook = before


@writing_curves()
def show_epoch(accelerator: Accelerator, data: TrainingImages, training: Training, epochs: int) -> None:
    """After an epoch's steps: what views look like (in epochs 1, 2, 4, 8, …), and how losses and weights w are spread.

    Args:
        epochs: of the whole run; at most 50 of them get histograms.

    Raises:
        UserError: it cannot be written.
    """
    writer = writer_of(accelerator)
    if writer is None:
        return
    epoch = training.epoch + 1
    if epoch == 1:
        writer.add_custom_scalars({"all": {title: ["Multiline", tags] for title, tags in TOGETHER.items()}})
    if epoch & (epoch - 1) == 0:
        writer.add_image(f"views/{', '.join(VIEWS)}", example_grid(data, epoch), epoch)
    divisions = training.divisions
    if divisions and (epoch == epochs or epoch % max(1, epochs // MOST_DIVISIONS) == 0):
        for number, (history, weight) in enumerate(zip(divisions.losses, divisions.weights), start=1):
            writer.add_histogram(f"division/loss_net{number}", history[-1], epoch)
            writer.add_histogram(f"division/weight_net{number}", weight, epoch)


def example_grid(data: TrainingImages, epoch: int) -> Tensor:
    """A few images spread over the training set, below each other, with views of each in a row; float (c, H, W) in 0..1."""
    rows = np.unique(np.linspace(0, len(data.samples) - 1, EXAMPLES).astype(np.int64))
    columns = [data.view(kind, rows, ("board", epoch, number)) for number, kind in enumerate(VIEWS)]
    pictures = _pictures(torch.stack(columns, dim=1).flatten(0, 1), data)
    side = pictures.shape[-1]
    grid = F.pad(pictures, (1, 1, 1, 1), value=1.0).unflatten(0, (len(rows), len(VIEWS)))
    return grid.permute(2, 0, 3, 1, 4).reshape(grid.shape[2], len(rows) * (side + 2), len(VIEWS) * (side + 2))


def _pictures(views: Tensor, data: TrainingImages) -> Tensor:
    """Normalised views (n, c, H, W) as pictures in 0..1 of a size to look at, float32 on the CPU."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.augmentation.mean, data.augmentation.std))
    pictures = (views.float().cpu() * std + mean).clamp(0, 1)
    side = pictures.shape[-1]
    if side > SIDES[1]:
        return F.interpolate(pictures, size=SIDES[1], mode="area")
    factor = -(-SIDES[0] // side)
    return pictures.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


@writing_curves()
@torch.no_grad()
def show_features(
    accelerator: Accelerator,
    data: TrainingImages,
    net: Model,
    labels: dict[str, Callable[[int], str]],
    epoch: int,
) -> None:
    """At the end: features of a few hundred training images as a map with pictures.

    Args:
        labels: row of a training image -> what it is called, by who calls it so.

    Raises:
        UserError: it cannot be written.
    """
    writer = writer_of(accelerator)
    if writer is None:
        return
    rows = np.unique(np.linspace(0, len(data.samples) - 1, POINTS).astype(np.int64))
    net.eval()
    features, pictures = [], []
    for views in data.in_batches("plain", rows, 64, ()):
        features.append(net.forward(views)[1].float().cpu())
        pictures.append(F.interpolate(_pictures(views, data), size=SPRITE, mode="area"))
    writer.add_embedding(
        torch.cat(features),
        metadata=[
            [" ".join(called(row).encode("utf-8", "replace").decode().split()) for called in labels.values()]
            for row in rows.tolist()
        ],
        metadata_header=list(labels),
        label_img=torch.cat(pictures),
        global_step=epoch,
        tag="features",
    )


@writing_curves()
def show_numbers(accelerator: Accelerator, report: dict[str, Any], identity: dict[str, Any], epoch: int) -> None:
    """At the end: settings beside the final numbers.

    Args:
        identity: the settings that make the run what it is, by name.

    Raises:
        UserError: it cannot be written.
    """
    writer = writer_of(accelerator)
    if writer is None:
        return
    # TensorBoard takes a moment to import
    from torch.utils.tensorboard.summary import hparams

    measured = final_numbers(report)
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in identity.items() if v is not None}
    for summary in hparams(plain, measured):
        writer.file_writer.add_summary(summary)
    for name, value in measured.items():
        writer.add_scalar(name, value, epoch)
    writer.flush()


def final_numbers(report: dict[str, Any]) -> dict[str, float]:
    """What runs are compared by, from a report: accuracies or mAP where truth is known, review and time always."""
    accuracies = {
        f"final/accuracy_{split}": accuracy["ensemble"]
        for split, accuracy in report.get("accuracy", {}).items()
        if accuracy
    }
    for split, row in report.get("tags", {}).items():
        accuracies |= {f"final/{name}_{split}": row[name] for name in ("mAP", "CF1", "OF1")}
        accuracies |= {f"final/annotator_mAP_{split}": row["annotator"]} if "annotator" in row else {}
    zero_shot = report["annotator"].get("zero_shot_accuracy", {})
    accuracies |= {f"final/annotator_{split}": share for split, share in zero_shot.items()}
    others = {"training_seconds": "final/training_seconds"}
    # nobody counts these where images have several labels
    others |= {} if "tags" in report else {"needs_review": "final/labels_worth_a_look"}
    return accuracies | {name: float(report[key]) for key, name in others.items() if key in report}
