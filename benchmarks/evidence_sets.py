"""The data sets of `benchmarks.evidence`: how many images, which annotator, which pixels, and lists of their images."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from coreg.errors import UserError
from coreg.files import write_atomically


@dataclass(frozen=True)
class ImageSet:
    """A data set, its annotator, and how its students train.

    Attributes:
        annotator: `builtin`, `clip` (a tiny CLIP trained on the images that nobody else sees) or `conse`.
        per_class: training images a class, the first by name. tested: test images a class.
        size: pixels of the students' images. flip: whether a mirror image shows the same class.
        epochs, warmup: of all methods, and those before the first division.
        mixup: what the recipe does not do: the other value of --mixup_alpha, tried in a stage.
        clip: options of the tiny CLIP.
    """

    title: str
    annotator: str
    per_class: int = 0
    tested: int = 0
    size: int = 0
    flip: bool = True
    epochs: int = 8
    warmup: int = 3
    mixup: float = 4
    clip: tuple[str, ...] = ()

    @property
    def own_features(self) -> bool:
        """Whether labels are refined by the annotator's own features and not by a view."""
        return self.annotator == "builtin"


SETS = {
    "digits": ImageSet("digits", "builtin", epochs=30, warmup=6, mixup=0),
    "cifar10": ImageSet("CIFAR-10", "conse", 80, 100, 40),
    "eurosat": ImageSet("EuroSAT", "clip", 80, 100, 40, clip=("--skip", "20", "--per_class", "100")),
    "gtsrb": ImageSet("GTSRB", "clip", 24, 24, 40, flip=False, clip=("--per_class", "76", "--steps", "1500", "--no_flip")),
}
GLOSSES = Path(__file__).parent / "glosses"


# ---- lists of images --------------------------------------------------------------------------------------------------


def spoken(folder: str) -> str:
    """The class name of a folder: without a number before it, spaces for underscores."""
    number, _, rest = folder.partition("_")
    return (rest if number.isdigit() and rest else folder).replace("_", " ")


def write_lists(data: Path, place: Path, chosen: ImageSet) -> None:
    """Write images.csv, others.csv (training images that only the tiny CLIP sees) and classes.txt into `place`.

    Their paths lead through a link to `data`: nothing is copied and nothing is written there.

    Raises:
        UserError: a class has too few images.
    """
    place.mkdir(parents=True, exist_ok=True)
    link = place / "data"
    if not link.is_symlink():
        link.symlink_to(data.resolve(), target_is_directory=True)
    names = sorted(folder.name for folder in (data / "train").iterdir() if folder.is_dir())
    lists = {"images.csv": [], "others.csv": []}
    for split, count in (("train", chosen.per_class), ("test", chosen.tested)):
        for name in names:
            files = sorted(file.name for file in (data / split / name).iterdir() if file.is_file())
            if len(files) < count:
                raise UserError(f"{data / split / name} holds {len(files)} images; {count} are wanted")
            rows = [[f"data/{split}/{name}/{file}", spoken(name), split] for file in files]
            lists["images.csv"] += rows[:count]
            lists["others.csv"] += rows[count:] if split == "train" else []
    write_atomically(place / "classes.txt", "".join(f"{spoken(name)}\n" for name in names))
    for name, rows in lists.items():
        with (place / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["path", "label", "split"], *rows])
