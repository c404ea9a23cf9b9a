"""Labels as other programs read them, and answers that come back."""

import csv
import hashlib
import json
import xml.etree.ElementTree as Xml

import numpy as np
import pytest
import yaml
from PIL import Image
from runs import error_of, refused, write_store

from coreg.annotate.tools import main
from coreg.data.labels import read_labels
from coreg.data.sources import open_images
from coreg.data.tags import read_tags
from coreg.store.store import AnnotationStore

NAMES = ["cat", 'd<o"g', "ca/rs"]
PROBS = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.25, 0.5], [1, 0, 0]], dtype=np.float16)
VOTES = np.array([[0, 0, 1], [2, 1, 0], [2, 2, 2], [-1, -1, -1]], dtype=np.int16)  # of three templates


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four images of which the last cannot be read."""
    root = tmp_path_factory.mktemp("store")
    for number in range(4):
        Image.new("RGB", (3, 3)).save(root / f"a {number}%.png")
    images = open_images(str(root), NAMES)
    tensors = {"votes": VOTES, "probs": PROBS}
    return write_store(root / "ann", images, NAMES, ["a {}", "the {}", "{}"], tensors, errors={3: "broken"}, spec="ViT")


def test_cleanlab_gets_probabilities_and_the_class_with_most_votes(store, tmp_path, capsys):
    main(["export", str(store.root), "--format", "cleanlab", "--output", str(tmp_path / "out.npz")])
    written = np.load(tmp_path / "out.npz")  # objects, which could run code, are refused by default
    assert np.array_equal(written["pred_probs"], PROBS[:3].astype(np.float32))
    # two votes for the first; one for each of three, and the second is the most probable; three for the third
    assert written["labels"].tolist() == [0, 1, 2]
    assert written["class_names"].tolist() == NAMES
    assert written["paths"].tolist() == [f"a {number}%.png" for number in range(3)]


def test_label_studio_gets_tasks_and_an_interface_and_its_answers_come_back(store, tmp_path, capsys):
    main(["export", str(store.root), "--format", "label_studio", "--output", str(tmp_path / "tasks.json")])
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [task["data"]["path"] for task in tasks] == ["a 0%.png", "a 2%.png", "a 1%.png"]  # 0.5, 0.5 and 0.75
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=a%200%25.png"
    assert tasks[2]["predictions"][0]["score"] == 0.75
    assert tasks[2]["predictions"][0]["result"][0]["value"] == {"choices": ['d<o"g']}
    choices = Xml.parse(tmp_path / "tasks.xml").find("Choices")
    assert [choice.get("value") for choice in choices] == NAMES and choices.get("choice") == "single"

    def answered(*choices, cancelled=False):
        result = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": list(choices)}}
        return {"was_cancelled": cancelled, "result": [result] if choices else []}

    tasks[0]["annotations"] = [answered("cat"), answered("ca/rs"), answered("cat", cancelled=True)]  # the last that counts
    tasks[1]["annotations"] = []  # nobody saw it
    tasks[2]["annotations"] = [answered('d<o"g')]
    del tasks[2]["data"]["path"]  # imported by somebody else: by its address
    (tmp_path / "answers.json").write_text(json.dumps(tasks))
    rows, classes = read_labels(str(tmp_path / "answers.json"), store.paths, NAMES)
    assert rows.tolist() == [0, 1] and classes.tolist() == [2, 1]

    tasks[1]["annotations"] = [answered("cat", "ca/rs")]
    (tmp_path / "answers.json").write_text(json.dumps(tasks))
    tags = read_tags(str(tmp_path / "answers.json"), store.paths, NAMES)
    assert tags.tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_label_studios_csv_export_is_read(store, tmp_path):
    (tmp_path / "answers.csv").write_text("annotator,choice,id,image,path\n1,cat,7,x,a 1%.png\n1,ca/rs,8,y,a 0%.png\n")
    rows, classes = read_labels(str(tmp_path / "answers.csv"), store.paths, NAMES)
    assert rows.tolist() == [0, 1] and classes.tolist() == [2, 0]


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '[{"data": {}}]', '[{"data": {}, "annotations": [{"result": [{"type": "choices"}]}]}]', "[" * 9999],
)
def test_other_json_is_refused_with_one_line(content, store, tmp_path):
    (tmp_path / "answers.json").write_text(content)
    line = error_of(read_labels, str(tmp_path / "answers.json"), store.paths, NAMES)
    assert "is no JSON export of Label Studio" in line


def test_fiftyone_gets_labels_by_path(store, tmp_path, capsys):
    main(["export", str(store.root), "--format", "fiftyone", "--output", str(tmp_path / "labels.json")])
    labels = json.loads((tmp_path / "labels.json").read_text())["labels"]
    assert labels["a 1%"] == {"label": 'd<o"g', "confidence": 0.75} and len(labels) == 3
    assert "FiftyOneImageClassificationDataset" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path):
    def made(head, *lines):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "job.json").write_text("{}")
        (tmp_path / "run" / "report.json").write_text(json.dumps({"schema": 1, "class_names": NAMES}))
        with (tmp_path / "run" / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *lines])
        return str(tmp_path / "run")

    return made


def test_a_run_gives_the_labels_of_its_table(run, tmp_path, capsys):
    folder = run(
        ["path", "label", "probability", "needs_review"], ["x.png", "cat", "0.9", "0"], ["y.png", "ca/rs", "0.4", "1"]
    )
    main(["export", folder, "--format", "label_studio", "--output", str(tmp_path / "tasks.json")])
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [(task["data"]["path"], task["predictions"][0]["score"]) for task in tasks] == [("y.png", 0.4), ("x.png", 0.9)]
    assert "has not the probabilities of all classes" in refused(
        capsys, main, "export", folder, "--format", "cleanlab", "--output", str(tmp_path / "a.npz")
    )


def test_a_run_with_several_labels_an_image(run, tmp_path, capsys):
    folder = run(["path", "labels", *(f"p({name})" for name in NAMES)], ["x.png", "cat;ca/rs", "0.9", "0.1", "0.6"],
                 ["y.png", "", "0.2", "0.1", "0.1"])  # fmt: skip
    main(["export", folder, "--format", "fiftyone", "--output", str(tmp_path / "labels.json")])
    assert json.loads((tmp_path / "labels.json").read_text())["labels"] == {
        "x": [{"label": "cat", "confidence": 0.9}, {"label": "ca/rs", "confidence": 0.6}], "y": [],
    }  # fmt: skip
    main(["export", folder, "--format", "label_studio", "--output", str(tmp_path / "tasks.json")])
    assert Xml.parse(tmp_path / "tasks.xml").find("Choices").get("choice") == "multiple"


def test_a_form_with_another_suffix_and_a_name_twice(store, run, tmp_path, capsys):
    line = refused(capsys, main, "export", str(store.root), "--format", "cleanlab", "--output", str(tmp_path / "a.csv"))
    assert "--format cleanlab writes a .npz file" in line
    folder = run(["path", "label", "probability"], ["x.png", "cat", "0.9"], ["x.jpg", "cat", "0.9"])
    words = ("export", folder, "--format", "fiftyone", "--output", str(tmp_path / "labels.json"))
    assert "is not the only image x; rename one" in refused(capsys, main, *words)
    assert not (tmp_path / "labels.json").exists()


# ---- a data set for others ------------------------------------------------------------------------------------------


def test_a_published_store_has_the_evidence_and_no_folder_of_its_maker(store, tmp_path, capsys):
    words = ["publish", str(store.root), "--output_dir", str(tmp_path / "published")]
    main(words)
    theirs = AnnotationStore.open(tmp_path / "published")  # every checksum
    assert np.array_equal(theirs.votes(), store.votes()) and np.array_equal(theirs.probs(), store.probs())
    assert list(theirs.paths) == list(store.paths) and theirs.unreadable.tolist() == store.unreadable.tolist()
    assert theirs.images_spec == store.root.parent.name
    for file in (tmp_path / "published").rglob("*"):
        assert not file.is_file() or str(store.root.parent).encode() not in file.read_bytes(), file
    assert theirs.at(str(store.root.parent), None).images().load(0).size == (3, 3)  # beside whoever has the images
    assert "is there already; give another --output_dir" in refused(capsys, main, *words)


def test_croissant_names_every_file_with_its_checksum_and_every_column(store, tmp_path):
    main(["publish", str(store.root), "--output_dir", str(tmp_path / "published")])
    described = json.loads((tmp_path / "published" / "croissant.json").read_text())
    files = {file["contentUrl"]: file["sha256"] for file in described["distribution"]}
    there = {path.relative_to(tmp_path / "published").as_posix(): path for path in (tmp_path / "published").rglob("*")}
    there = {name: path for name, path in there.items() if path.is_file() and name != "croissant.json"}
    assert files == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()}
    (records,) = described["recordSet"]
    with (tmp_path / "published" / "annotations.csv").open(newline="") as file:
        head = next(csv.reader(file))
    assert [field["source"]["extract"]["column"] for field in records["field"]] == head
    assert described["conformsTo"] == "http://mlcommons.org/croissant/1.0"


def test_the_data_sets_card_escapes_what_came_from_outside(store, tmp_path):
    main(["publish", str(store.root), "--output_dir", str(tmp_path / "published")])
    card = (tmp_path / "published" / "README.md").read_text()
    assert 'd<o"g' not in card and "d&lt;o&quot;g" in card and "Annotations of 4 images" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["size_categories"] == ["n<1K"] and "croissant" in front["tags"]


def test_uploading_is_private(store, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("coreg.annotate.tools.push_to_hub", lambda *words: calls.append(words) or "address")
    main(["publish", str(store.root), "--output_dir", str(tmp_path / "out"), "--push_to_hub", "someone/ann"])
    assert calls == [(tmp_path / "out", "someone/ann", "dataset", "Published by coreg")]
    assert capsys.readouterr().out.endswith("address\n")
