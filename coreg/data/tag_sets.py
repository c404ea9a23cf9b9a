"""Data sets whose images have several labels, as they are published: Pascal VOC, COCO, NUS-WIDE and CUB's attributes.

Each is a folder laid out as its authors' archives unpack. What their files name is read below that folder alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.parsers import expat

import numpy as np

from coreg.data.decode import Files
from coreg.data.folders import settled, split_of
from coreg.data.images import TEST, TRAIN, ImageList, Paths, absolute_path, path_within
from coreg.data.tags import ABSENT, PRESENT, translated_tags
from coreg.errors import UserError
from coreg.records import Number, RecordError, read_file, read_record

LARGEST_XML = 1 << 20
LARGEST_LIST = 1 << 30
INSTANCES = {
    "images": [{"id": Number(), "file_name": str}],
    "annotations": [{"image_id": Number(), "category_id": Number()}],
    "categories": [{"id": Number(), "name": str}],
}


def _text(path: Path, largest: int = LARGEST_LIST) -> bytes:
    """What a file of a data set holds.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        return read_file(path, largest)
    except RecordError as error:
        raise UserError(f"cannot read {path}: {error}; unpack the data set's own archives there") from None


def _words(path: Path, least: int) -> Iterator[list[str]]:
    """The words of each line that has any, `least` of them or more."""
    for number, line in enumerate(os.fsdecode(_text(path)).splitlines(), start=1):
        words = line.split()
        if words and len(words) < least:
            raise UserError(
                f"{path} line {number} has {len(words)} words, expected {least}: is it the data set's own file?"
            )
        if words:
            yield words


def _image_list(
    kind: str, root: Path, paths: list[str], tags: np.ndarray, split: np.ndarray, own: list[str],
    class_names: Sequence[str] | None, notes: Sequence[str] = (),
) -> ImageList:  # fmt: skip
    """The image list, in the order of the paths' bytes."""
    if not paths:
        raise UserError(f"no image in {kind}:{root}; unpack the data set's own archives there")
    order = sorted(range(len(paths)), key=lambda row: os.fsencode(paths[row]))
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{kind}:{root} lists {twice!r} twice; unpack the data set's own archives again")
    listed = Paths([os.fsencode(paths[row]) for row in order])
    tags = translated_tags(tags[order], own, class_names)
    pixels = Files(root, listed)
    return ImageList(f"{kind}:{root}", listed, None, settled(split[order]), own, pixels, list(notes), tags)


# ---- Pascal VOC -----------------------------------------------------------------------------------------------------


def objects_of(xml: bytes) -> list[tuple[str, bool]]:
    """Name of each object of a VOC annotation, and whether it is called difficult.

    Nothing is expanded or fetched: a document type, which could define entities, is refused.

    Raises:
        ValueError: it is no such XML.
    """
    parser, place, texts = expat.ParserCreate(), [], {}
    objects: list[tuple[str, bool]] = []

    def refuse(*_: object) -> None:
        raise ValueError("it has a document type, which annotations have not")

    def start(name: str, _: object) -> None:
        place.append(name)
        if place == ["annotation", "object"]:
            texts.clear()

    def text(piece: str) -> None:
        # the parts of an object have names of their own
        if len(place) == 3 and place[1] == "object":
            texts[place[2]] = texts.get(place[2], "") + piece

    def end(_: str) -> None:
        if place == ["annotation", "object"]:
            objects.append((texts.get("name", "").strip(), texts.get("difficult", "0").strip() == "1"))
        place.pop()

    parser.StartDoctypeDeclHandler, parser.EntityDeclHandler = refuse, refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    try:
        parser.Parse(xml, True)
    except expat.ExpatError as error:
        raise ValueError(str(error)) from None
    return objects


def voc_images(folder: str, class_names: Sequence[str] | None) -> ImageList:
    """Pascal VOC: a folder such as VOC2012 with Annotations, ImageSets/Main and JPEGImages.

    An image has the labels of which it shows an object that is not called difficult, and no other, as in the published
    single-positive tables. Test images are those of test.txt, or of val.txt where there is no other.

    Raises:
        UserError: files are missing or are not VOC's.
    """
    root = absolute_path(folder)
    lists = {name: root / "ImageSets" / "Main" / f"{name}.txt" for name in ("train", "val", "test")}
    has_test, names, split, shown = lists["test"].exists(), [], [], []
    for kind, place in lists.items():
        if kind == "test" and not has_test:
            continue
        for words in _words(place, 1):
            xml = path_within(f"Annotations/{words[0]}.xml", f"{place} names")
            try:
                shown.append({name for name, difficult in objects_of(_text(root / xml, LARGEST_XML)) if not difficult})
            except ValueError as error:
                raise UserError(f"{root / xml} is no annotation of VOC: {error}; unpack its archive again") from None
            names.append(f"JPEGImages/{words[0]}.jpg")
            split.append(TRAIN if kind == "train" or (kind == "val" and has_test) else TEST)
    own = sorted(set().union(*shown))
    tags = np.array([[PRESENT if name in some else ABSENT for name in own] for some in shown], dtype=np.int8)
    return _image_list("voc", root, names, tags, np.array(split, dtype=np.uint8), own, class_names)


# ---- COCO -----------------------------------------------------------------------------------------------------------


def coco_images(folder: str, class_names: Sequence[str] | None) -> ImageList:
    """COCO: a folder with annotations/instances_NAME.json, and beside it a folder NAME of images, such as train2014.

    An image has the labels of which it has an instance, crowds too; images without any are left out, as in the published
    tables. Validation images are the test images where there are no others.

    Raises:
        UserError: files are missing or are not COCO's.
    """
    root = absolute_path(folder)
    files = sorted((root / "annotations").glob("instances_*.json"))
    if not files:
        raise UserError(f"there is no annotations/instances_*.json below {root}; give the folder that COCO's archives fill")
    paths, labels, splits, own, empty = [], [], [], [], 0
    for file in files:
        try:
            record = read_record(file, INSTANCES, LARGEST_LIST)
            names = {category["id"]: category["name"] for category in record["categories"]}
            own += [name for _, name in sorted(names.items()) if name not in own]
            shown: dict[int, set[str]] = {image["id"]: set() for image in record["images"]}
            for instance in record["annotations"]:
                shown[instance["image_id"]].add(names[instance["category_id"]])
        except (RecordError, KeyError) as error:
            reason = error if isinstance(error, RecordError) else f"it has no image or category {error}"
            raise UserError(f"{file} holds no instances of COCO: {reason}; unpack its archive again") from None
        part = file.stem.removeprefix("instances_")
        kind = split_of(re.split(r"\d", part)[0])
        for image in record["images"]:
            empty += not shown[image["id"]]
            if shown[image["id"]]:
                paths.append(path_within(f"{part}/{image['file_name']}", f"{file} names"))
                labels.append(shown[image["id"]])
                splits.append(TRAIN if kind is None else kind)
    tags = np.array([[PRESENT if name in some else ABSENT for name in own] for some in labels], dtype=np.int8)
    notes = [f"left out: {empty} images without any instance"] if empty else []
    return _image_list("coco", root, paths, tags, np.array(splits, dtype=np.uint8), own, class_names, notes)


# ---- NUS-WIDE -------------------------------------------------------------------------------------------------------


def nuswide_images(folder: str, class_names: Sequence[str] | None) -> ImageList:
    """NUS-WIDE: a folder with ImageList, Groundtruth/TrainTestLabels and, of the images, Flickr.

    Raises:
        UserError: files are missing or are not NUS-WIDE's.
    """
    root = absolute_path(folder)
    places = sorted((root / "Groundtruth" / "TrainTestLabels").glob("Labels_*_Train.txt"))
    own = [place.name.removeprefix("Labels_").removesuffix("_Train.txt") for place in places]
    if not own:
        raise UserError(f"there is no Groundtruth/TrainTestLabels/Labels_*_Train.txt below {root}; give NUS-WIDE's folder")
    paths, tables, splits = [], [], []
    for part, kind in (("Train", TRAIN), ("Test", TEST)):
        place = root / "ImageList" / f"{part}Imagelist.txt"
        names = [words[0].replace("\\", "/") for words in _words(place, 1)]
        paths += [path_within(f"Flickr/{name}", f"{place} names") for name in names]
        columns = []
        for name in own:
            file = root / "Groundtruth" / "TrainTestLabels" / f"Labels_{name}_{part}.txt"
            columns.append([words[0] == "1" for words in _words(file, 1)])
            if len(columns[-1]) != len(names):
                raise UserError(f"{file} has {len(columns[-1])} lines, and {place} {len(names)}; unpack both again")
        tables.append(np.array(columns, dtype=bool).T.reshape(-1, len(own)))
        splits += [kind] * len(names)
    tags = np.where(np.concatenate(tables), PRESENT, ABSENT).astype(np.int8)
    return _image_list("nuswide", root, paths, tags, np.array(splits, dtype=np.uint8), own, class_names)


# ---- CUB ------------------------------------------------------------------------------------------------------------


def cub_images(folder: str, class_names: Sequence[str] | None) -> ImageList:
    """CUB-200-2011 with its 312 attributes: the folder CUB_200_2011; attributes.txt lies in it, beside it or in attributes.

    How certain people were of an attribute does not count, as in the published tables.

    Raises:
        UserError: files are missing or are not CUB's.
    """
    root = absolute_path(folder)
    place = next(
        (one for one in (root / "attributes", root, root.parent) if (one / "attributes.txt").exists()), root / "attributes"
    )
    file = root / "attributes" / "image_attribute_labels.txt"
    try:
        numbered = {int(words[0]): " ".join(words[1:]) for words in _words(place / "attributes.txt", 2)}
        images = {int(words[0]): words[1] for words in _words(root / "images.txt", 2)}
        trained = {int(words[0]): words[1] == "1" for words in _words(root / "train_test_split.txt", 2)}
        own = [numbered[number] for number in sorted(numbered)]
        column, row = ({number: index for index, number in enumerate(some)} for some in (sorted(numbered), images))
        tags = np.zeros((len(images), len(own)), dtype=np.int8)
        for words in _words(file, 3):
            tags[row[int(words[0])], column[int(words[1])]] = PRESENT if words[2] == "1" else ABSENT
        split = [TRAIN if trained[number] else TEST for number in images]
    except (KeyError, ValueError) as error:
        raise UserError(f"the files in {root} do not go together: {error}; unpack the archive of CUB again") from None
    paths = [path_within(f"images/{name}", f"{root / 'images.txt'} names") for name in images.values()]
    return _image_list("cub", root, paths, tags, np.array(split, dtype=np.uint8), own, class_names)


TAG_SETS: dict[str, Callable[[str, Sequence[str] | None], ImageList]] = {
    "voc": voc_images,
    "coco": coco_images,
    "nuswide": nuswide_images,
    "cub": cub_images,
}
