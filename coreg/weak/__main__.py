"""Candidate sets of the literature, most of them drawn from true labels, as a store that training scripts read.

    python -m coreg.weak --images torchvision:CIFAR10 --rule flip --q 0.1 --eta 0.2 --output_dir ann
        candidate sets as in the experiments of ALIM, IRNet and Co-Reg; train on them with train_coreg.py --annotations ann
    python -m coreg.weak --images torchvision:CIFAR100 --rule fps --q 0.05 --imbalance 100 --output_dir ann
        CIFAR-100-LT as in PartialCLIP: a hundred times as many images of the first class as of the last

Rules: `flip` (q: chance of every wrong class; eta: share of images whose truth is exchanged for a wrong class), `pico`
(the variant of PiCO+), `fps` (the truth is always in; also called `uniform`), `uss` (every set that holds the truth is
equally likely), `hierarchical` (as flip, within super-classes), `instance` (wrong classes by the probabilities that a
classifier gives them), and the sets that people gave to the images of CIFAR-10, `aggregate` (every class that somebody
named) and `vaguest` (the largest set). Every draw is a hash of (seed, rule's step, image), so an image's candidates depend
neither on the other images nor on the machine. No image is decoded but for a network that `--probabilities` names.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

import coreg
from coreg.config import SEEDS, option, parse
from coreg.data.class_names import read_class_names
from coreg.data.images import HELD_OUT, TRAIN, ImageList, absolute_path, list_hash
from coreg.data.labels import csv_lines
from coreg.data.sources import open_images
from coreg.errors import UserError, exits_with_one_line
from coreg.plaintext import did_you_mean, one_line
from coreg.store.manifest import DRAWN, PEOPLE
from coreg.store.store import AnnotationStore, StoreWriter, make_manifest
from coreg.weak.labels import WeakLabels, drawn_summary
from coreg.weak.long_tail import long_tail
from coreg.weak.people import aggregate, read_people, vaguest, validation_rows

BLOCK_SIZE = 16_384  # rows a block of the store
# rule -> the options that it takes, with their defaults
TAKES: dict[str, dict[str, float | None]] = {
    "flip": {"q": 0.1, "eta": 0.0},
    "pico": {"q": 0.1, "eta": 0.0},
    "fps": {"q": 0.1},
    "uniform": {"q": 0.1},
    "uss": {},
    "hierarchical": {"q": 0.1, "eta": 0.0, "superclasses": None},
    "instance": {"rho": 0.4, "eta": 0.0, "probabilities": None},
    "aggregate": {"people": None},
    "vaguest": {"people": None},
}
FROM_PEOPLE = {"aggregate": aggregate, "vaguest": vaguest}


@dataclass
class WeakConfig:
    """Which images get which candidate sets, and where they go."""

    images: str = option("builtin:digits", "labelled images: folder, list, torchvision data set or builtin:digits")
    rule: Literal["flip", "pico", "fps", "uniform", "uss", "hierarchical", "instance", "aggregate", "vaguest"] = option(
        "flip", "how candidates are drawn"
    )
    q: float | None = option(None, "chance of every wrong class to be a candidate (default: 0.1)", (0, 1))
    eta: float | None = option(None, "share of the images whose truth is no candidate (default: 0)", (0, 1))
    rho: float | None = option(
        None, "rule instance: wrong candidates an image / C (default: 0.4; 0.04 for 100 classes)", (0, 1)
    )
    probabilities: str | None = option(
        None,
        "rule instance: .safetensors file with the tensor probs, float (N, C); an annotation store of the same images; or "
        "a network that was trained on these classes: a timm model or local-dir:FOLDER",
    )
    superclasses: str | None = option(None, "rule hierarchical: CSV file with the columns class,superclass")
    people: str | None = option(
        None, "rules aggregate and vaguest: PLCIFAR10's plcifar10.pkl, its folder, or the same as .json"
    )
    imbalance: float = option(
        1.0,
        "long tail: images of the first class for one of the last, shrinking exponentially; the other training images are "
        "held out",
        (1, 1e9),
    )
    validation: float = option(
        0.0, "share of the training images that is held out, those of PLENCH's validation split of this seed", (0, 0.9)
    )
    seed: int = option(0, "seed of all draws", SEEDS)
    classes: str | None = option(None, "text file with one class name a line; default: the names that the images carry")
    output_dir: str = option("runs/synthetic/annotations", "folder of the store")
    data_root: str = option("data", "where torchvision data sets lie or are downloaded to")


def draw(config: WeakConfig) -> AnnotationStore:
    """Draw the candidate sets and write them as a store without templates; test images get theirs like the others.

    Returns:
        The verified store.

    Raises:
        UserError: something in the job is wrong; nothing has been written then.
    """
    taken = _taken(config)
    names = read_class_names(config.classes) if config.classes else None
    images = open_images(config.images, names, config.data_root)
    names = names or images.class_names
    if names is None:
        raise UserError(f"{config.images} says no class names: write them one a line and add --classes classes.txt")
    table, origin = _sets(config, taken, images, names)
    if config.imbalance > 1:
        train, split = np.flatnonzero(images.split == TRAIN), images.split.copy()
        split[train] = HELD_OUT  # but for a long tail of them
        split[train[long_tail(_known_labels(images)[train], len(names), config.imbalance, config.seed)]] = TRAIN
        images.split = split
        origin += f", long_tail(imbalance={config.imbalance:g},seed={config.seed})"
    if config.validation:
        train = np.flatnonzero(images.split == TRAIN)
        images.split = images.split.copy()
        images.split[train[validation_rows(len(train), config.validation, config.seed)]] = HELD_OUT
        origin += f", validation(share={config.validation:g},seed={config.seed})"
    # there are no weights; the sets themselves stand for labels, probabilities and super-classes they were made of
    content = hashlib.sha256(np.packbits(table, axis=1).tobytes()).hexdigest()
    job = make_manifest(
        images,
        names,
        (),
        {"spec": origin, "weights": content},
        BLOCK_SIZE,
        features=None,
        data_root=str(absolute_path(config.data_root)),
        notes=images.notes,
        preprocessing=None,
        versions={"coreg": coreg.__version__, "numpy": np.__version__, "torch": torch.__version__},
    )
    StoreWriter(Path(config.output_dir), job).write_all(images, lambda rows: {"candidates": table[rows]})
    return AnnotationStore.open(config.output_dir)


def _sets(config: WeakConfig, taken: dict[str, float], images: ImageList, names: Sequence[str]) -> tuple[np.ndarray, str]:
    """The sets of all images, bool (N, C), and in words where they come from."""
    if config.rule in FROM_PEOPLE:
        # nobody gave sets to test images: everything is possible, which says nothing
        table, train = np.ones((len(images), len(names)), dtype=bool), np.flatnonzero(images.split == TRAIN)
        table[train] = FROM_PEOPLE[config.rule](read_people(config.people, len(train), len(names)), len(names))
        return table, f"{PEOPLE}{config.rule})"
    labels = _known_labels(images)
    classes: int | np.ndarray = len(names)
    if config.rule == "hierarchical":
        classes = read_superclasses(config.superclasses, names)
    elif config.rule == "instance":
        classes = _probabilities(config.probabilities, images, names)
    weak = WeakLabels.from_truth(labels, classes, config.rule, config.seed, **taken)
    return weak.table, DRAWN + weak.source["generator"]


def _known_labels(images: ImageList) -> np.ndarray:
    """int64 (N,); a UserError where some are unknown."""
    labels = np.full(len(images), -1) if images.labels is None else images.labels
    unknown = np.flatnonzero(labels < 0)
    if len(unknown):
        raise UserError(
            f"{len(unknown)} of {len(images)} images have no known label (the first, {images.paths[unknown[0]]!r}); "
            f"synthetic candidates need them all: name the folders like the classes, or list path,label in a CSV file"
        )
    return labels


def _probabilities(source: str, images: ImageList, names: Sequence[str]) -> np.ndarray:
    """Probabilities float64 (N, C) from a file, an annotation store or a network.

    Raises:
        UserError: they cannot be had, or are of other images or classes.
    """
    if source.endswith(".safetensors"):
        return read_probabilities(source, len(images), len(names))
    if not Path(source).is_dir():
        from coreg.weak.classifier import classifier_probabilities  # timm takes seconds to import

        return classifier_probabilities(source, images, len(names))
    store = AnnotationStore.open(source)
    store.need_annotator()
    store.need_same(list_hash(images.paths), names, "--probabilities")
    probs = store.probs().astype(np.float64)
    return probs / probs.sum(axis=1, keepdims=True)


def _taken(config: WeakConfig) -> dict[str, float]:
    """The numbers that the rule takes, with their values, after its files are known to be given."""
    takes = TAKES[config.rule]
    for name in ("q", "eta", "rho", "superclasses", "probabilities", "people"):
        given = getattr(config, name)
        if given is not None and name not in takes:
            fits = " or ".join(f"--rule {rule}" for rule, options in TAKES.items() if name in options)
            raise UserError(f"--rule {config.rule} takes no --{name}; leave it out, or write {fits}")
        if given is None and name in takes and takes[name] is None:
            raise UserError(f"--rule {config.rule} needs --{name} FILE (--help says what is in it)")
    numbers = {name: default for name, default in takes.items() if default is not None}
    return {name: default if getattr(config, name) is None else getattr(config, name) for name, default in numbers.items()}


def read_probabilities(path: str, n_images: int, n_classes: int) -> np.ndarray:
    """The tensor `probs` of a safetensors file, as float64 (n_images, n_classes); row i belongs to image i of the list.

    Raises:
        UserError: no such file or tensor, another shape, or numbers that are no probabilities.
    """
    try:
        with safe_open(path, framework="pt") as file:
            probs = file.get_tensor("probs").double().numpy()
    except (SafetensorError, OSError) as error:
        reason = one_line(error)
        raise UserError(f"cannot read the tensor probs in {path}: {reason}; write it with safetensors.save_file") from None
    if probs.shape != (n_images, n_classes):
        raise UserError(f"{path} holds probs of shape {probs.shape}; wanted ({n_images}, {n_classes}): images, classes")
    if not (np.isfinite(probs).all() and (probs >= 0).all() and np.allclose(probs.sum(axis=1), 1, atol=0.02)):
        raise UserError(f"{path} holds probs whose rows are not probabilities that sum to 1; apply softmax to logits")
    return probs


def read_superclasses(path: str, names: Sequence[str]) -> np.ndarray:
    """int64 (C,): the number of each class's super-class, read from a CSV file with the columns class,superclass.

    Raises:
        UserError: no such file or columns, or a class that is unknown, missing or there twice.
    """
    superclasses: dict[str, str] = {}
    for place, line in csv_lines(path, ("class", "superclass")):
        name = line["class"]
        if name not in names or name in superclasses or not line["superclass"]:
            hint = "" if name in names else did_you_mean(name, names, form=repr)
            raise UserError(f"{place} names the class {name!r}{hint}; write every class name once, with its super-class")
        superclasses[name] = line["superclass"]
    if missing := [name for name in names if name not in superclasses]:
        raise UserError(f"{path} gives {missing[0]!r} no super-class ({len(missing)} classes miss theirs); add a line each")
    return np.unique([superclasses[name] for name in names], return_inverse=True)[1].astype(np.int64)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write the store, and say how noisy the candidates really are."""
    (config,) = parse(WeakConfig, argv=argv, prog="python -m coreg.weak", description=__doc__)
    print(drawn_summary(draw(config)))


if __name__ == "__main__":
    sys.exit(main())
