"""A person's list of several labels an image."""

import numpy as np
import pytest

from coreg.data.tags import read_tags
from coreg.errors import UserError

PATHS = ["a.jpg", "b/1.jpg", "c.jpg"]
NAMES = ["cat", "traffic light", "dog"]


def read(tmp_path, text, **kwargs):
    (tmp_path / "tags.csv").write_text(text, encoding="utf-8")
    return read_tags(str(tmp_path / "tags.csv"), PATHS, NAMES, **kwargs)


def test_names_between_semicolons(tmp_path):
    text = "note,path,labels\nx,a.jpg,cat; dog\ny,b/1.jpg,Traffic_Light\nz,c.jpg,\n"
    table = read(tmp_path, text)
    assert table.dtype == np.int8
    assert table.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    # the list is complete: an empty one says that there is nothing
    assert read(tmp_path, text, all_listed=True).tolist() == [[1, -1, 1], [-1, 1, -1], [-1, -1, -1]]


def test_absent_labels_and_lines_that_add_up(tmp_path):
    text = "path,labels,absent\na.jpg,cat,dog;traffic light\nb/1.jpg,cat,\nb/1.jpg,cat;dog,\n"
    assert read(tmp_path, text).tolist() == [[1, -1, -1], [1, 0, 1], [0, 0, 0]]


def test_one_column_a_label(tmp_path):
    text = "path,dog,remark,traffic-light\nc.jpg,1,2,0\na.jpg,,7,1\n"
    assert read(tmp_path, text).tolist() == [[0, 1, 0], [0, 0, 0], [0, -1, 1]]
    # what is not written stays unknown
    assert read(tmp_path, text, all_listed=True).tolist() == [[0, 1, 0], [0, 0, 0], [0, -1, 1]]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("path,labels\na.jpg,cat;cow\n", "line 2 has the label 'cow', which is none of the class names"),
        ("path,labels\nd.jpg,cat\n", "line 2 names 'd.jpg', which is none of the 3 images, did you mean"),
        ("path,labels,absent\na.jpg,cat,cat\n", "line 2 contradicts what is written of 'a.jpg' and the label 'cat'"),
        ("path,cat\na.jpg,1\na.jpg,0\n", "line 3 contradicts what is written of 'a.jpg' and the label 'cat'"),
        ("path,cat\na.jpg,yes\n", "line 2 has 'yes' in the column 'cat'; write 1, 0 or nothing"),
        ("path,cat,trafic_light\na.jpg,1,1\n", "has the column 'trafic_light', which is no label, did you mean 'traffic l"),
        ("path,cat,Cat\na.jpg,1,1\n", "has two columns for one label: cat, Cat; keep one of them"),
        ("path,remark\na.jpg,1\n", "has neither a column 'labels' nor one named after a label"),
        ("path,labels\na.jpg,\n", "says nothing of any label"),
        ("path,labels\n", "says nothing of any label"),
        ("file,labels\na.jpg,cat\n", "has no column 'path'"),
    ],
)
def test_faults_are_named_in_one_line(tmp_path, text, error):
    with pytest.raises(UserError, match=r"tags\.csv") as raised:
        read(tmp_path, text)
    assert error in str(raised.value) and "\n" not in str(raised.value)
