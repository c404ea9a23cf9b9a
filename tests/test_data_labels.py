"""Few true labels: the draw, and the reading of a person's own list."""

import numpy as np
import pytest

from coreg.data.labels import few_shot_draw, read_labels
from coreg.errors import UserError

PATHS = ["a/0.png", "a/1.png", "b/0,1.png", "b/grün.png", "odd\udcff.png", "old\\name.png", "z.png"]
NAMES = ["red thing", "green_thing", "Blue"]


# ---- the draw -------------------------------------------------------------------------------------------------------


def test_every_class_gives_equally_many_of_its_training_images():
    generator = np.random.default_rng(0)
    labels = generator.integers(-1, 5, 400)
    train = generator.permutation(400)[:300]
    rows = few_shot_draw(labels, train, 7, 5, seed=3)
    assert rows.dtype == np.int64 and (np.diff(rows) > 0).all() and set(rows) <= set(train.tolist())
    assert np.bincount(labels[rows], minlength=5).tolist() == [7] * 5


def test_a_small_class_gives_all_it_has_and_an_absent_one_nothing():
    labels = np.array([0, 0, 0, 1, 3, -1])
    assert few_shot_draw(labels, np.arange(6), 2, 4, seed=0)[-2:].tolist() == [3, 4]
    assert len(few_shot_draw(labels, np.arange(6), 2, 4, seed=0)) == 4
    assert few_shot_draw(labels, np.arange(6), 100, 4, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert few_shot_draw(labels, np.arange(0), 2, 4, seed=0).tolist() == []
    assert few_shot_draw(labels, np.arange(6), 0, 4, seed=0).tolist() == []


def test_the_draw_depends_on_seed_and_class_alone():
    labels = np.arange(200) % 4
    rows = np.arange(200)
    drawn = few_shot_draw(labels, rows, 5, 4, seed=1)
    assert (few_shot_draw(labels, rows[::-1], 5, 4, seed=1) == drawn).all()
    assert (few_shot_draw(labels, rows, 5, 4, seed=2) != drawn).any()
    # classes 0 and 1 draw the same when the images of 2 and 3 change places, or are gone
    changed = np.where(labels == 2, 3, np.where(labels == 3, -1, labels))
    first = drawn[labels[drawn] < 2]
    again = few_shot_draw(changed, rows, 5, 4, seed=1)
    assert (again[changed[again] < 2] == first).all()
    assert set(drawn) < set(few_shot_draw(labels, rows, 8, 4, seed=1))
    # and not the same places in every class
    assert len({tuple(drawn[labels[drawn] == index] // 4) for index in range(4)}) == 4


def test_every_image_is_drawn_equally_often():
    labels = np.zeros(10, dtype=np.int64)
    counts = np.bincount(np.concatenate([few_shot_draw(labels, np.arange(10), 3, 1, s) for s in range(600)]), minlength=10)
    # variance of a hypergeometric count: 600 * 0.3 * 0.7; five standard deviations
    assert (abs(counts - 180) < 5 * (600 * 0.21) ** 0.5).all()


# ---- the list -------------------------------------------------------------------------------------------------------


def written(tmp_path, text, encoding="utf-8"):
    file = tmp_path / "labels.csv"
    file.write_bytes(text.encode(encoding, "surrogateescape"))
    return str(file)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_list_as_people_and_spreadsheets_write_it(tmp_path, encoding, newline):
    lines = [
        "path,label,remark",
        'b/grün.png,Green Thing,"sure, now"',
        '"b/0,1.png",blue',
        "./a/1.png, red-thing ,",
        "a/0.png,,not decided",
        "a/1.png,red thing",
        "odd\udcff.png,Blue",
        "old\\name.png,Blue",
    ]
    rows, classes = read_labels(written(tmp_path, newline.join(lines), encoding), PATHS, NAMES)
    assert rows.dtype == classes.dtype == np.int64
    assert rows.tolist() == [1, 2, 3, 4, 5] and classes.tolist() == [0, 2, 1, 2, 2]


def test_columns_may_come_in_any_order(tmp_path):
    rows, classes = read_labels(
        written(tmp_path, "needs_review,label,path\n1,Blue,z.png\n0,red thing,a/0.png\n"), PATHS, NAMES
    )
    assert rows.tolist() == [0, 6] and classes.tolist() == [0, 2]


def test_a_name_that_two_classes_share_but_for_case_needs_its_exact_spelling(tmp_path):
    rows, classes = read_labels(written(tmp_path, "path,label\nz.png,A b\n"), PATHS, ["a b", "A b"])
    assert (rows.tolist(), classes.tolist()) == ([6], [1])
    with pytest.raises(UserError, match="'A B', which is none of the class names"):
        read_labels(written(tmp_path, "path,label\nz.png,A B\n"), PATHS, ["a b", "A b"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'path'"),
        ("path;label\nz.png;Blue\n", "no column 'path': its first line is 'path;label'"),
        ("path,class\nz.png,Blue\n", "no column 'label'"),
        ("path,label\n", "labels no image"),
        ("path,label\nz.png,\n", "labels no image"),
        ("path,label\nz.png\n", "labels no image"),
        ("path,label\na/2.png,Blue\n", "line 2 names 'a/2.png', which is none of the 7 images, did you mean 'a/"),
        ("path,label\n/home/me/b/grün.png,Blue\n", "did you mean 'b/grün.png'?"),
        ("path,label\nb\\grün.png,Blue\n", "did you mean 'b/grün.png'?"),
        ("path,label\nqqqqqqqqqq,Blue\n", "which is none of the 7 images"),
        ("path,label\na/0.png,Blue\nz.png,gren thing\n", "line 3 has the label 'gren thing', which is none of the class"),
        ("path,label\nz.png,green thin\n", "did you mean 'green_thing'?"),
        (
            "path,label\nz.png,Blue\n./z.png,red thing\n",
            "line 3 labels './z.png' as 'red thing', but a line before says 'Blue'",
        ),
        ("path,label\nb/0,1.png,Blue\n", "more fields than the header; put quotes"),
        ('path,label\nz.png,"Bl\x00ue\n', ""),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as raised:
        read_labels(written(tmp_path, text), PATHS, NAMES)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_labels(str(tmp_path / "no.csv"), PATHS, NAMES)
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_labels(str(tmp_path), PATHS, NAMES)
