"""Data sets that torchvision knows, as image lists."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset

from coreg.data.decode import UnreadableImage
from coreg.data.images import SPLITS, ImageList, Paths, translated
from coreg.data.keyed import keyed_generator
from coreg.data.tag_sets import coco_images, voc_images
from coreg.errors import UserError
from coreg.plaintext import did_you_mean, one_line

_SIGNS = (
    "Speed limit 20|Speed limit 30|Speed limit 50|Speed limit 60|Speed limit 70|Speed limit 80|"
    "Speed limit 80 cancelled|Speed limit 100|Speed limit 120|No passing|No truck overtaking|"
    "Only have priority at the next intersection|Priority road|Give way|Stop|All vehicles prohibited|"
    "Trucks prohibited|No entry|Caution!|Curve (to the left)|Curve (to the right)|Continuous curves|Rough road|"
    "Slippery road|The road narrows on the right|Construction site|Signal light|Pay attention to pedestrians|"
    "Pay attention to children|Watch out for bikes|Watch out for snow/ice on the road|Deer ahead|Unlimited speed|"
    "Turn right|Turn left|Go straight|Go straight and turn right|Go straight and turn left|Drive on the right|"
    "Drive on the left|Driving around the island|Lift ban on no passing|Lift ban on truck overtaking"
)
_FACES = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")

# Class names of the torchvision sets in label order; None: the set says them itself. EuroSAT has no official split.
TORCHVISION: dict[str, list[str] | None] = {
    "CIFAR10": None,
    "CIFAR100": None,
    "SVHN": [f"number {digit}" for digit in range(10)],
    "FashionMNIST": None,
    "EuroSAT": None,
    "FER2013": [f"{face} Facial Expression" for face in _FACES],
    "GTSRB": [f"German Traffic Sign: {sign}" for sign in _SIGNS.split("|")],
    "FGVCAircraft": None,
    "StanfordCars": None,
    "VOC2007": None,
    "VOC2012": None,
    "COCO": None,
}
# of several labels an image: torchvision downloads or unpacks them into these folders, which are read as folders are
TAGGED = {"VOC2007": "VOCdevkit/VOC2007", "VOC2012": "VOCdevkit/VOC2012", "COCO": "coco"}
BY_SPLIT = ("SVHN", "FER2013", "GTSRB", "FGVCAircraft", "StanfordCars")  # whose parts torchvision names by `split`


@dataclass
class _Parts:
    """Pixels of data sets that are put one after the other."""

    parts: ConcatDataset

    def __call__(self, row: int) -> Image.Image:
        try:
            image = self.parts[row][0]
            return image if image.mode in ("L", "RGB") else image.convert("RGB")
        except Exception as error:
            raise UnreadableImage(" ".join(f"{type(error).__name__}: {error}".split())) from None


def torchvision_set(name: str, class_names: Sequence[str] | None, data_root: str) -> ImageList:
    if name not in TORCHVISION:
        hint = did_you_mean(name, TORCHVISION, cutoff=0.4)
        raise UserError(f"no torchvision data set {name}{hint} (there are: {', '.join(TORCHVISION)})")
    if name in TAGGED:
        return _tagged_set(name, class_names, data_root)
    # "test" before "train", so that the made-up names are sorted bytewise like all others
    splits = ("all",) if name == "EuroSAT" else ("test", "train")
    parts = [_torchvision_part(name, split, data_root) for split in splits]
    own = TORCHVISION[name] or list(parts[0].classes)
    paths = [f"{split}/{row:06d}" for split, part in zip(splits, parts) for row in range(len(part))]
    split = np.concatenate([np.full(len(part), SPLITS.get(kind, 0), np.uint8) for kind, part in zip(splits, parts)])
    if name == "EuroSAT":  # 80/20 as in the papers, but the same for everyone; the store keeps it
        split[keyed_generator("EuroSAT", "split").permutation(len(split))[: len(split) // 5]] = SPLITS["test"]
    labels = translated(np.concatenate([_torchvision_labels(part) for part in parts]), own, class_names)
    pixels = _Parts(ConcatDataset(parts))
    return ImageList(f"torchvision:{name}", Paths([os.fsencode(path) for path in paths]), labels, split, own, pixels)


def _tagged_set(name: str, class_names: Sequence[str] | None, data_root: str) -> ImageList:
    """VOC as torchvision's VOCDetection has it, or COCO for its CocoDetection, which downloads nothing."""
    folder = Path(data_root) / TAGGED[name]
    if name == "COCO":
        if not folder.is_dir():
            raise UserError(
                f"data set COCO is not in {folder}, and torchvision cannot download it; put annotations/instances_NAME.json"
                f" and the folders of images, such as train2014, there, or give --data_root"
            )
        return dataclasses.replace(coco_images(str(folder), class_names), spec=f"torchvision:{name}")
    year = name.removeprefix("VOC")
    # of 2007 the test images, too, have annotations, in an archive of their own
    for part in ("trainval", "test") if year == "2007" else ("trainval",):
        _had(name, data_root, "VOCDetection", {"year": year, "image_set": part})
    return dataclasses.replace(voc_images(str(folder), class_names), spec=f"torchvision:{name}")


def _torchvision_part(name: str, split: str, data_root: str) -> Any:
    if name == "EuroSAT":
        choice: dict[str, Any] = {}
    else:
        choice = {"split": split} if name in BY_SPLIT else {"train": split == "train"}
        if name == "FGVCAircraft" and split == "train":  # as everyone reports it
            choice["split"] = "trainval"
    return _had(name, data_root, name, choice)


def _had(name: str, data_root: str, kind: str, choice: dict[str, Any]) -> Any:
    """A part of data set `name` as torchvision's class `kind` has it, downloaded where it is not there.

    Raises:
        UserError: it is not there and could not be downloaded.
    """
    from torchvision import datasets

    build = getattr(datasets, kind)
    try:
        return build(data_root, **choice)
    except (RuntimeError, OSError):
        pass  # not there yet
    is_new = not Path(data_root).exists()
    try:
        if name == "FER2013":  # needs a login: torchvision cannot fetch it
            raise OSError("torchvision cannot download it; put fer2013.csv from Kaggle into a folder fer2013 there")
        if name == "StanfordCars":
            raise OSError("it can no longer be downloaded; put a copy into a folder stanford_cars there")
        with _network_timeout(20):
            return build(data_root, download=True, **choice)
    except Exception as error:  # torchvision lets every kind of network, archive and checksum error through
        reason = one_line(error)
        if is_new:  # leave no folder with half a download
            shutil.rmtree(data_root, ignore_errors=True)
        raise UserError(
            f"data set {name} is not in {data_root} and could not be had: {reason} "
            f"(copy it there from a machine with network, or give --data_root)"
        ) from None


def _torchvision_labels(part: Any) -> np.ndarray:
    labels = getattr(part, "targets", getattr(part, "labels", getattr(part, "_labels", None)))
    if labels is None:
        labels = [-1 if label is None else label for _, label in part._samples]
    return np.asarray(labels, dtype=np.int64)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
