"""Data sets whose images have several labels, in the layouts of their authors."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import annotate_vlm
from coreg.data.sources import open_images
from coreg.data.tag_sets import objects_of
from coreg.errors import UserError
from coreg.store.merge import merge
from coreg.store.store import AnnotationStore


def put(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        Image.new("RGB", (6, 4), (10, 200, 30)).save(path)
    else:
        path.write_text(text, encoding="utf-8")


def states(images):
    """Path -> one sign a label."""
    return {path: "".join("-0+"[state + 1] for state in row) for path, row in zip(images.paths, images.tags)}


def refused(spec, class_names=None):
    with pytest.raises(UserError) as raised:
        open_images(spec, class_names)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- CSV ------------------------------------------------------------------------------------------------------------


def test_a_list_of_labels(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "list.csv", "path,labels,split\nb.png,dog;cat,test\na.png,,train\nsub/c.png,dog,\n")
    images = open_images(str(tmp_path / "list.csv"))
    assert images.class_names == ["cat", "dog"] and images.labels is None
    # the list is complete: an image without labels has none
    assert states(images) == {"a.png": "--", "b.png": "++", "sub/c.png": "-+"}
    assert images.split.tolist() == [0, 1, 0] and images.load(0).size == (6, 4)
    asked = open_images(str(tmp_path / "list.csv"), ["Dog", "cow", "cat"])
    assert states(asked)["sub/c.png"] == "+--"
    assert "'dog', which is none of the class names" in refused(str(tmp_path / "list.csv"), ["cat", "cow"])


def test_a_column_a_label(tmp_path):
    put(tmp_path / "list.csv", "path,sky,road,split\nb.png,1,,test\na.png,0,1,train\n")
    images = open_images(str(tmp_path / "list.csv"))
    assert images.class_names == ["sky", "road"] and states(images) == {"a.png": "-+", "b.png": "+0"}
    assert states(open_images(str(tmp_path / "list.csv"), ["road", "car"])) == {"a.png": "+0", "b.png": "00"}


def test_lists_with_one_label_an_image_are_as_they_were(tmp_path):
    put(tmp_path / "list.csv", "path,label\nb.png,cat\na.png,dog\n")
    images = open_images(str(tmp_path / "list.csv"), ["cat", "dog"])
    assert images.tags is None and images.labels.tolist() == [1, 0]


# ---- Pascal VOC -----------------------------------------------------------------------------------------------------


def annotation(*objects):
    """Objects as (name, difficult); a person's hand is a part with a name of its own."""
    part = "<part><name>hand</name><bndbox/></part>"
    written = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{int(difficult)}</difficult>{part}</object>"
        for name, difficult in objects
    )
    return f"<annotation><folder>VOC2012</folder><size><width>5</width></size>{written}</annotation>"


VOC = {
    "2007_1": [("dog", False), ("dog", True), ("person", False)],
    "2007_2": [("person", True)],
    "2007_3": [("cat", True), ("cat", False)],
    "2007_4": [("aeroplane", False)],
}


@pytest.fixture
def voc(tmp_path):
    for name, objects in VOC.items():
        put(tmp_path / "Annotations" / f"{name}.xml", annotation(*objects))
        put(tmp_path / "JPEGImages" / f"{name}.jpg")
    put(tmp_path / "ImageSets" / "Main" / "train.txt", "2007_3\n2007_1\n")
    put(tmp_path / "ImageSets" / "Main" / "val.txt", "2007_2\n2007_4 \n")
    return tmp_path


def test_voc_has_the_labels_of_objects_that_are_not_difficult(voc):
    images = open_images(f"voc:{voc}")
    assert images.class_names == ["aeroplane", "cat", "dog", "person"]
    expected = {"2007_1": "--++", "2007_2": "----", "2007_3": "-+--", "2007_4": "+---"}
    assert states(images) == {f"JPEGImages/{name}.jpg": row for name, row in expected.items()}
    assert images.split.tolist() == [0, 1, 0, 1] and images.load(2).size == (6, 4)
    assert open_images(images.spec).paths == images.paths
    assert states(open_images(f"voc:{voc}", ["dog", "sofa"]))["JPEGImages/2007_1.jpg"] == "+0"


def test_voc_and_coco_are_torchvisions_names_too(voc, tmp_path_factory):
    """In the folders that torchvision fills; what is not there and cannot be had is said in one line."""
    root = tmp_path_factory.mktemp("root")
    (root / "VOCdevkit").mkdir(parents=True)
    shutil.copytree(voc, root / "VOCdevkit" / "VOC2012")
    lists = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    put(lists / "trainval.txt", (lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    images, folder = open_images("VOC2012", None, str(root)), open_images(f"voc:{voc}")
    assert images.spec == "torchvision:VOC2012" and list(images.paths) == list(folder.paths)
    np.testing.assert_array_equal(images.tags, folder.tags)
    again = open_images(images.spec, images.class_names, str(root))
    np.testing.assert_array_equal(again.tags, images.tags)
    with pytest.raises(UserError, match="torchvision cannot download it; put annotations"):
        open_images("torchvision:COCO", None, str(root))


def test_vocs_validation_images_are_trained_on_where_there_is_a_test_list(voc):
    put(voc / "ImageSets" / "Main" / "val.txt", "2007_2\n")
    put(voc / "ImageSets" / "Main" / "test.txt", "2007_4\n")
    assert open_images(f"voc:{voc}").split.tolist() == [0, 0, 0, 1]


BOMB = '<!DOCTYPE a [<!ENTITY b "boom"><!ENTITY c "&b;&b;">]><annotation><object><name>&c;</name></object></annotation>'
FILE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation><object><name>&b;</name></object></annotation>'


@pytest.mark.parametrize("xml", [BOMB, FILE, '<!DOCTYPE a SYSTEM "http://127.0.0.1/a.dtd"><annotation/>'])
def test_xml_with_a_document_type_is_refused(voc, xml):
    with pytest.raises(ValueError, match="document type"):
        objects_of(xml.encode())
    put(voc / "Annotations" / "2007_1.xml", xml)
    assert "2007_1.xml is no annotation of VOC: it has a document type" in refused(f"voc:{voc}")


@pytest.mark.parametrize("xml", ["", "<annotation>", "<a></b>", "no xml", "<annotation>&b;</annotation>"])
def test_damaged_xml_is_refused(voc, xml):
    put(voc / "Annotations" / "2007_1.xml", xml)
    assert "2007_1.xml is no annotation of VOC" in refused(f"voc:{voc}")


def test_names_in_vocs_lists_do_not_lead_out_of_its_folder(voc):
    put(voc / "ImageSets" / "Main" / "train.txt", "../../../etc/passwd\n")
    assert "paths must lie in the folder" in refused(f"voc:{voc}")
    put(voc / "ImageSets" / "Main" / "train.txt", "2007_1\n2007_1\n")
    assert "lists 'JPEGImages/2007_1.jpg' twice" in refused(f"voc:{voc}")
    (voc / "ImageSets" / "Main" / "val.txt").unlink()
    assert "val.txt" in refused(f"voc:{voc}")


# ---- COCO -----------------------------------------------------------------------------------------------------------


def instances(images, annotations):
    return {
        "info": {},
        "images": [{"id": number, "file_name": f"{number:03d}.jpg", "width": 6} for number in images],
        "annotations": [{"image_id": a, "category_id": b, "iscrowd": 0, "bbox": [0, 0, 1, 1]} for a, b in annotations],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    }


@pytest.fixture
def coco(tmp_path):
    train = instances([20, 9, 7], [(20, 18), (20, 3), (9, 3), (9, 3)])
    put(tmp_path / "annotations" / "instances_train2014.json", json.dumps(train))
    put(tmp_path / "annotations" / "instances_val2014.json", json.dumps(instances([5], [(5, 18)])))
    put(tmp_path / "train2014" / "009.jpg")
    return tmp_path


def test_coco_has_the_labels_of_instances(coco):
    images = open_images(f"coco:{coco}")
    # in the order of the categories' numbers
    assert images.class_names == ["car", "dog"]
    assert states(images) == {"train2014/009.jpg": "+-", "train2014/020.jpg": "++", "val2014/005.jpg": "-+"}
    assert images.split.tolist() == [0, 0, 1] and images.notes == ["left out: 1 images without any instance"]
    assert images.load(0).size == (6, 4)


def test_faults_in_cocos_files_are_named(coco):
    file = coco / "annotations" / "instances_val2014.json"
    for record, words in (
        (instances([5], [(6, 18)]), "it has no image or category 6"),
        (instances([5], [(5, 1)]), "it has no image or category 1"),
        ({"images": []}, "there is no 'annotations'"),
        (instances([5], [(5, "dog")]), "expected a whole number"),
    ):
        file.write_text(json.dumps(record))
        assert words in refused(f"coco:{coco}")
    record = instances([5], [(5, 18)])
    record["images"][0]["file_name"] = "../../../etc/passwd"
    file.write_text(json.dumps(record))
    assert "paths must lie in the folder" in refused(f"coco:{coco}")
    assert "there is no annotations/instances_*.json" in refused(f"coco:{coco / 'train2014'}")


# ---- NUS-WIDE and CUB -----------------------------------------------------------------------------------------------


def test_nuswide(tmp_path):
    labels = tmp_path / "Groundtruth" / "TrainTestLabels"
    put(tmp_path / "ImageList" / "TrainImagelist.txt", "sky\\2.jpg\nbear\\1.jpg\n")
    put(tmp_path / "ImageList" / "TestImagelist.txt", "sky\\3.jpg\n")
    for name, train, test in (("sky", "1 \n0 \n", "1 \n"), ("bear", "0\n1\n", "0\n")):
        put(labels / f"Labels_{name}_Train.txt", train)
        put(labels / f"Labels_{name}_Test.txt", test)
    images = open_images(f"nuswide:{tmp_path}")
    assert images.class_names == ["bear", "sky"] and images.split.tolist() == [0, 0, 1]
    assert states(images) == {"Flickr/bear/1.jpg": "+-", "Flickr/sky/2.jpg": "-+", "Flickr/sky/3.jpg": "-+"}
    put(labels / "Labels_sky_Test.txt", "1\n0\n")
    assert "has 2 lines, and" in refused(f"nuswide:{tmp_path}")
    assert "give NUS-WIDE's folder" in refused(f"nuswide:{labels}")


@pytest.mark.parametrize("place", ["attributes", "."])
def test_cub(tmp_path, place):
    put(tmp_path / place / "attributes.txt", "1 has_bill::curved (up or down)\n2 has_wing::blue\n")
    put(tmp_path / "images.txt", "1 001.A/x.jpg\n2 002.B/y.jpg\n")
    put(tmp_path / "train_test_split.txt", "1 0\n2 1\n")
    # image, attribute, present, certainty, seconds; some lines have more
    table = "1 1 1 3 27.7\n1 2 0 1 3.1\n2 1 0 4 0 2.5\n2 2 1 1 0\n"
    put(tmp_path / "attributes" / "image_attribute_labels.txt", table)
    images = open_images(f"cub:{tmp_path}")
    assert images.class_names == ["has_bill::curved (up or down)", "has_wing::blue"]
    assert states(images) == {"images/001.A/x.jpg": "+-", "images/002.B/y.jpg": "-+"}
    assert images.split.tolist() == [1, 0]
    put(tmp_path / "attributes" / "image_attribute_labels.txt", "3 1 1 3 27.7\n")
    assert "do not go together: 3" in refused(f"cub:{tmp_path}")
    put(tmp_path / "images.txt", "one 001.A/x.jpg\n")
    assert "do not go together" in refused(f"cub:{tmp_path}")
    put(tmp_path / "images.txt", "1\n")
    assert "line 1 has 1 words, expected 2" in refused(f"cub:{tmp_path}")


def test_names_that_do_not_correspond(tmp_path):
    """As with single labels: other words in the same order are taken for the same, and strangers for nothing."""
    put(tmp_path / "annotations" / "instances_train.json", json.dumps(instances([9], [(9, 3)])))
    assert states(open_images(f"coco:{tmp_path}", ["a vehicle", "an animal"])) == {"train/009.jpg": "+-"}
    assert open_images(f"coco:{tmp_path}", ["a vehicle"]).tags is None
    tags = open_images(f"coco:{tmp_path}", ["dog", "a vehicle", "car"]).tags
    np.testing.assert_array_equal(tags, [[-1, 0, 1]])


# ---- in a store -----------------------------------------------------------------------------------------------------


FILES = {"images": "list.csv", "classes": "classes.txt", "output_dir": "ann"}


@pytest.fixture
def tagged(tmp_path):
    """A list of four images, and a store of it by the built-in CLIP under two labels."""
    for number in range(4):
        put(tmp_path / f"{number}.png")
    put(tmp_path / "list.csv", "path,labels,split\n0.png,one;two,\n1.png,,\n2.png,two,test\n3.png,one,test\n")
    put(tmp_path / "classes.txt", "one\ntwo\n")
    place = [f"--{name}={tmp_path / file}" for name, file in FILES.items()]
    annotate_vlm.main([*place, "--workers", "0", "--block_size", "3"])
    return tmp_path


def test_a_store_keeps_several_labels_an_image(tagged, capsys):
    store = AnnotationStore.open(tagged / "ann")
    expected = np.array([[1, 1], [-1, -1], [-1, 1], [1, -1]], dtype=np.int8)
    np.testing.assert_array_equal(store.tags, expected)
    assert store.tags.dtype == np.int8 and store.labels is None
    np.testing.assert_array_equal(store.images().tags, expected)
    # judged again under other labels, what corresponds stays
    put(tagged / "other.txt", "two\nthree\none\n")
    annotate_vlm.main(
        ["--rescore", str(tagged / "ann"), "--classes", str(tagged / "other.txt"), "--output_dir", str(tagged / "ann2")]
    )
    again = AnnotationStore.open(tagged / "ann2").tags
    np.testing.assert_array_equal(again, np.stack([expected[:, 1], np.zeros(4), expected[:, 0]], axis=1))
    # parts side by side keep them
    merge([str(tagged / "ann"), str(tagged / "ann")], str(tagged / "both"))
    np.testing.assert_array_equal(AnnotationStore.open(tagged / "both").tags, expected)


def test_damaged_labels_of_a_store_are_refused(tagged):
    file = tagged / "ann" / "samples.safetensors"
    tables = load_file(file)
    for tags in (np.full((4, 2), 2, np.int8), np.zeros((4, 3), np.int8), np.zeros((4, 2), np.int32)):
        save_file(tables | {"tags": tags}, file)
        with pytest.raises(UserError, match=r"is damaged: samples\.safetensors (holds|does not hold)"):
            AnnotationStore.open(tagged / "ann")


def test_sources_with_several_labels_are_joined(tmp_path):
    put(tmp_path / "a.csv", "path,labels\n0.png,cat\n")
    put(tmp_path / "b.csv", "path,dog\n1.png,1\n")
    put(tmp_path / "photos" / "2.png")
    spec = "joined:" + json.dumps([str(tmp_path / name) for name in ("a.csv", "b.csv", "photos")])
    assert open_images(spec, ["cat", "dog"]).tags.tolist() == [[1, -1], [0, 1], [0, 0]]
    put(tmp_path / "b.csv", "path,dog,cow\n1.png,1,1\n")
    assert "give --classes" in refused(spec)
