"""Splits, labels and remarks that come from the folders of a path, against what a person would say of each layout."""

import numpy as np
import pytest

from coreg.data.folders import counts_line, folder_labels, labelled_counts, unmatched_folders
from coreg.data.images import Paths

LETTERS = {0: "train", 1: "test", 2: "held out"}


def listed(files, class_names=("cat", "dog"), skip=0):
    """path -> (label's name or None, split's name), and the notes."""
    files = sorted(files)
    labels, split, notes = folder_labels(Paths([file.encode() for file in files]), class_names, skip)
    assert split.dtype == np.uint8
    names = [None] * len(files) if labels is None else [class_names[i] if i >= 0 else None for i in labels]
    return dict(zip(files, zip(names, (LETTERS[number] for number in split.tolist())))), notes


def splits(files, **more):
    return {file: split for file, (_, split) in listed(files, **more)[0].items()}


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Train", "TEST"), ("training", "Testing")])
def test_usual_spellings_of_train_and_test(train, test):
    entries, notes = listed([f"{train}/cat/1.png", f"{test}/dog/2.png", "3.png"])
    assert entries == {
        f"{train}/cat/1.png": ("cat", "train"),
        f"{test}/dog/2.png": ("dog", "test"),
        "3.png": (None, "train"),
    }
    assert notes == ([] if train == "train" else [f"splits: {min(train, test)!r} is test, {max(train, test)!r} is train"])


@pytest.mark.parametrize("val", ["val", "Valid", "validation"])
def test_validation_images_are_never_trained_on(val):
    """They are the test images where there are no others, and nothing at all where there are."""
    entries, notes = listed(["train/1.png", f"{val}/2.png"])
    assert entries == {"train/1.png": (None, "train"), f"{val}/2.png": (None, "test")}
    assert len(notes) == 1 and "'train' is train" in notes[0] and f"{val!r} is test (there is no other)" in notes[0]
    entries, notes = listed(["train/1.png", f"{val}/2.png", "test/3.png"])
    assert [entries[f][1] for f in ("train/1.png", f"{val}/2.png", "test/3.png")] == ["train", "held out", "test"]
    assert f"{val!r} is held out (neither trained on nor counted as test)" in notes[0]


def test_split_folders_below_one_that_holds_everything_or_in_every_folder():
    assert splits(["x/y/train/cat/1.png", "x/y/test/cat/2.png", "x/y/3.png"]) == {
        "x/y/train/cat/1.png": "train", "x/y/test/cat/2.png": "test", "x/y/3.png": "train",
    }  # fmt: skip
    entries, notes = listed(["cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"])
    assert entries == {
        "cat/train/1.png": ("cat", "train"), "cat/test/2.png": ("cat", "test"),
        "dog/train/3.png": ("dog", "train"), "dog/test/4.png": ("dog", "test"),
    }  # fmt: skip
    assert notes == ["splits: '*/test' is test, '*/train' is train"]


def test_a_folder_of_test_images_that_does_not_count_is_named():
    entries, notes = listed(["cat/1.png", "dog/test/2.png", "dog/test/3.png"])
    assert {split for _, split in entries.values()} == {"train"}
    (note,) = notes
    assert note.startswith("2 images in folders such as 'dog/test' are trained on")


def test_a_split_folder_is_no_class():
    """CIFAR-100 has a class `train`."""
    names = ("apple", "train")
    entries, _ = listed(["train/1.png", "test/2.png"], names)
    assert {label for label, _ in entries.values()} == {None}
    entries, _ = listed(["train/1.png"], names)
    assert entries["train/1.png"] == (None, "train")
    entries, _ = listed(["train/train/1.png", "train/apple/2.png", "test/train/3.png", "train/4.png"], names)
    assert entries == {
        "train/train/1.png": ("train", "train"), "train/apple/2.png": ("apple", "train"),
        "test/train/3.png": ("train", "test"), "train/4.png": (None, "train"),
    }  # fmt: skip
    entries, _ = listed(["test/1.png", "test/test/2.png", "other/3.png"], ("test", "cat"))
    assert entries == {"test/1.png": (None, "test"), "test/test/2.png": ("test", "test"), "other/3.png": (None, "train")}


def test_a_class_called_train_beside_other_classes_is_one():
    entries, notes = listed(["apple/1.png", "train/2.png"], ("apple", "train"))
    assert entries == {"apple/1.png": ("apple", "train"), "train/2.png": ("train", "train")} and notes == []
    entries, _ = listed(["apple/1.png", "test/2.png"], ("apple", "test"))
    assert entries["test/2.png"] == ("test", "train")
    # with classes in it, it is a split
    entries, _ = listed(["apple/1.png", "test/apple/2.png", "test/3.png"], ("apple", "test"))
    assert entries["test/apple/2.png"] == ("apple", "test") and entries["test/3.png"] == (None, "test")


def test_the_innermost_class_counts_in_whatever_form_it_is_written():
    entries, _ = listed(["test/CAT/deep/er/1.png", "cat/dog/2.png", "cafe\u0301/3.png"], ("cat", "dog", "caf\u00e9"))
    assert [label for label, _ in entries.values()] == ["caf\u00e9", "dog", "cat"]


def test_lists_without_images_or_folders():
    assert listed([])[0] == {} and splits(["1.png"]) == {"1.png": "train"}
    assert splits(["a.tar/test/1.png", "b.tar/2.png"], skip=1) == {"a.tar/test/1.png": "test", "b.tar/2.png": "train"}


# ---- notes ---------------------------------------------------------------------------------------------------------


def unmatched(files, class_names, spec="/photos"):
    paths = Paths([file.encode() for file in sorted(files)])
    labels, split, _ = folder_labels(paths, class_names)
    return unmatched_folders(spec, paths, split, labels, class_names)


def test_folders_that_match_no_class_are_named_with_a_hint():
    files = [f"{folder}/{i}.png" for folder, n in (("Forest", 3), ("river", 2), ("misc", 1)) for i in range(n)]
    assert unmatched(files, ("forrest", "river")) == ["'Forest' (3 images, did you mean 'forrest'?)", "'misc' (1 images)"]
    deep = ["train/Forests/2021/a.png", "test/forest/b.png", "train/river/c.png"]
    assert unmatched(deep, ("forest", "river")) == ["'Forests' (1 images, did you mean 'forest'?)"]
    assert unmatched([f"x{i:02d}y/1.png" for i in range(20)] + ["cat/1.png"], ("cat", "dog"))[-1] == "12 more"


def test_folders_that_nobody_meant_for_classes_are_not_named():
    assert unmatched(["2021/1.png", "2022/2.png"], ("cat", "dog")) == []  # no label anywhere
    assert unmatched(["holiday/1.png", "test/cat/2.png"], ("cat", "dog")) == []  # none in training
    assert unmatched(["cats/1.png", "2022/2.png"], ("cat", "dog")) == ["'cats' (1 images, did you mean 'cat'?)"]
    assert unmatched(["cats/1.png", "dog/2.png"], ("cat", "dog"), spec="/photos/list.csv") == []
    assert unmatched(["0/cats/1.png", "1/dog/2.png", "1/3.png"], ("cat", "dog"), spec='joined:["a", "b"]') == [
        "'cats' (1 images, did you mean 'cat'?)"
    ]


def test_counts_by_hand():
    split = np.array([0, 0, 0, 1, 2], dtype=np.uint8)
    counts = labelled_counts(split, np.array([0, -1, 1, -1, 0]))
    assert counts == {"train": (3, 2), "test": (1, 0), "held out": (1, 1)}
    assert counts_line(counts) == "train 3 (2 labelled), test 1 (0 labelled), held out 1 (1 labelled)"
    assert labelled_counts(split[:3], None) == {"train": (3, 0)}
