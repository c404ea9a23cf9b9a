"""The data sets of `benchmarks.evidence`: how many images, which annotator, which pixels, and lists of their images."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from coreg.errors import UserError
from coreg.files import write_atomically


@dataclass(frozen=True)
class ImageSet:
    """A data set, its annotator, and how its students train.

    Attributes:
        annotator: `builtin`, `clip` (a tiny CLIP trained on the images that nobody else sees) or `conse`.
        per_class: training images a class, the first by name. tested: test images a class.
        scene: leading characters of file names that frames of one film share, 0 without films. Every third film trains,
            so that none is seen by both the students and the tiny CLIP.
        size: pixels of the students' images. flip: whether a mirror image shows the same class.
        epochs, warmup: of all methods, and those before the first division.
        clip: options of the tiny CLIP. seen: which of a class's images, by name, these make it train on.
        many: training images a class of the longer of two other lists, which `seen` is left out of; 0: there are none.
    """

    title: str
    annotator: str
    per_class: int = 0
    tested: int = 0
    scene: int = 0
    size: int = 0
    flip: bool = True
    epochs: int = 8
    warmup: int = 3
    clip: tuple[str, ...] = ()
    seen: tuple[int, int] = (0, 0)
    many: int = 0

    @property
    def own_features(self) -> bool:
        """Whether labels are refined by the annotator's own features and not by a view."""
        return self.annotator == "builtin"


SETS = {
    "digits": ImageSet("digits", "builtin", epochs=30, warmup=6),
    "cifar10": ImageSet("CIFAR-10", "conse", 80, 100, size=40, many=500),
    "eurosat": ImageSet(
        "EuroSAT", "clip", 80, 100, size=40, clip=("--skip", "20", "--per_class", "100"), seen=(100, 200), many=400
    ),
    "gtsrb": ImageSet("GTSRB", "clip", 24, 24, 5, 40, flip=False, clip=("--steps", "1500", "--no_flip")),
}
FEW = 50  # training images a class of the shorter of the other two lists
GLOSSES = Path(__file__).parent / "glosses"


# ---- lists of images --------------------------------------------------------------------------------------------------


def spoken(folder: str) -> str:
    """The class name of a folder: without a number before it, spaces for underscores."""
    number, _, rest = folder.partition("_")
    return (rest if number.isdigit() and rest else folder).replace("_", " ")


def divided(files: Sequence[str], count: int, scene: int) -> tuple[list[str], list[str]]:
    """`count` of a class's files, as few as possible of each scene, and the files of the scenes that stay away; sorted."""
    if not scene:
        return list(files[:count]), list(files[count:])
    ours = sorted({file[:scene] for file in files})[::3]
    taken = [[file for file in files if file[:scene] == name] for name in ours]
    in_turn = [file for pictures in zip_longest(*taken) for file in pictures if file]
    return sorted(in_turn[:count]), [file for file in files if file[:scene] not in ours]


def write_lists(data: Path, place: Path, chosen: ImageSet) -> None:
    """Write images.csv, others.csv (training images that only the tiny CLIP sees) and classes.txt into `place`.

    Where a set has them, few.csv and many.csv as well: fewer and more training images, as far as there are so many. All
    paths lead through a link to `data`: nothing is copied and nothing is written there.

    Raises:
        UserError: a class has too few images.
    """
    place.mkdir(parents=True, exist_ok=True)
    link = place / "data"
    if not link.is_symlink():
        link.symlink_to(data.resolve(), target_is_directory=True)
    names = sorted(folder.name for folder in (data / "train").iterdir() if folder.is_dir())
    lists = {"images.csv": [], "others.csv": []} | ({"few.csv": [], "many.csv": []} if chosen.many else {})
    for split, count in (("train", chosen.per_class), ("test", chosen.tested)):
        for name in names:
            files = sorted(file.name for file in (data / split / name).iterdir() if file.is_file())
            ours, rest = divided(files, count, chosen.scene) if split == "train" else (files[:count], [])
            if len(ours) < count:
                raise UserError(
                    f"{data / split / name} holds {len(files)} images, {len(ours)} of them usable; {count} are wanted"
                )
            of_list = {"images.csv": ours, "others.csv": rest}
            if chosen.many:
                unseen = files[: chosen.seen[0]] + files[chosen.seen[1] :]
                few, many = (unseen[:FEW], unseen[: chosen.many]) if split == "train" else (ours, ours)
                of_list |= {"few.csv": few, "many.csv": many}
            for listed, of in of_list.items():
                lists[listed] += [[f"data/{split}/{name}/{file}", spoken(name), split] for file in of]
    write_atomically(place / "classes.txt", "".join(f"{spoken(name)}\n" for name in names))
    for name, rows in lists.items():
        with (place / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["path", "label", "split"], *rows])
