"""`--rescore`: other class names and templates from the features of a store give what annotating anew would give."""

import shutil

import numpy as np
import pytest
from PIL import Image
from test_annotate_annotators import save_tiny_clip

from annotate_vlm import main
from coreg.store.store import AnnotationStore, StoreWriter

NAMES = ["red thing", "green thing", "blue thing"]
OTHERS = ["Green_thing", "stone", "red thing", "cloud"]


@pytest.fixture
def place(tmp_path):
    save_tiny_clip(tmp_path / "model")
    generator = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / "photos" / NAMES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "photos" / "x.png").write_bytes(b"")
    for name, lines in {"names": NAMES, "others": OTHERS, "templates": ["a {}", "my {}", "the {} at night"]}.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    return tmp_path


def run(place, output, *options):
    main([*options, "--output_dir", str(place / output), "--batch_size", "3", "--workers", "0"])


def annotated(place, output, classes, *more):
    images = ["--images", str(place / "photos"), "--vlm", f"local-dir:{place}/model", "--block_size", "8"]
    run(place, output, *images, "--classes", str(place / f"{classes}.txt"), *more)


def blocks(root):
    return [file.read_bytes() for file in sorted((root / "blocks").iterdir())]


def test_the_result_is_what_annotating_anew_gives_and_no_image_is_touched(place):
    templates = ["--templates", str(place / "templates.txt")]
    annotated(place, "ann", "names")
    annotated(place, "anew", "others", *templates)
    annotated(place, "same", "names", *templates)
    (place / "photos").rename(place / "moved")
    run(place, "again", "--rescore", str(place / "ann"), "--classes", str(place / "others.txt"), *templates)
    assert blocks(place / "again") == blocks(place / "anew")
    again, anew = (AnnotationStore.open(place / name) for name in ("again", "anew"))
    assert again.class_names == OTHERS and again.paths == anew.paths and again.unreadable.sum() == 1
    assert (again.root / "errors.csv").read_bytes() == (anew.root / "errors.csv").read_bytes()
    # labels follow the names: what was called "blue thing" has no name any more
    assert (again.labels == anew.labels).all() and set(again.labels) == {0, 2, -1}
    # without --classes or --templates those of the store are kept
    run(place, "once", "--rescore", str(place / "ann"), *templates)
    assert blocks(place / "once") == blocks(place / "same")
    run(place, "copy", "--rescore", str(place / "ann"))
    assert AnnotationStore.open(place / "copy").hash == AnnotationStore.open(place / "ann").hash


def test_images_of_a_list_open_although_its_labels_are_no_longer_classes(place):
    rows = [f"photos/{NAMES[n % 3]}/{n}.png,{NAMES[n % 3]},{'test' if n % 4 == 3 else 'train'}" for n in range(20)]
    (place / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    images = ["--images", str(place / "list.csv"), "--vlm", f"local-dir:{place}/model"]
    run(place, "ann", *images, "--classes", str(place / "names.txt"))
    run(place, "again", "--rescore", str(place / "ann"), "--classes", str(place / "others.txt"))
    images = AnnotationStore.open(place / "again").images()
    numbers = [int(path.rsplit("/", 1)[1].removesuffix(".png")) for path in images.paths]
    assert [int(label) for label in images.labels] == [{0: 2, 1: 0, 2: -1}[n % 3] for n in numbers]
    assert [int(one) for one in images.split] == [int(n % 4 == 3) for n in numbers]
    assert np.shape(images.load(4)) == (30, 30, 3)


def test_it_can_be_killed_and_goes_on(place, monkeypatch, capsys):
    annotated(place, "ann", "names")
    options = ["--rescore", str(place / "ann"), "--classes", str(place / "others.txt")]
    run(place, "whole", *options)
    shutil.copytree(place / "whole", place / "half")
    (place / "half" / "blocks" / "00001.safetensors").write_bytes(b"junk")
    (place / "half" / "errors.csv").unlink()
    capsys.readouterr()
    run(place, "half", *options)
    assert "damaged, annotated again: 00001.safetensors" in capsys.readouterr().out
    assert blocks(place / "half") == blocks(place / "whole")
    run(place, "half", *options)
    assert "nothing to do" in capsys.readouterr().out


def refused(capsys, place, *options):
    with pytest.raises(SystemExit) as raised:
        run(place, "new", *options)
    assert raised.value.code == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 1 and not (place / "new").exists()
    return lines[0]


def test_stores_that_cannot_be_judged_again_are_one_line(place, capsys):
    assert "does not exist" in refused(capsys, place, "--rescore", str(place / "nowhere"))
    annotated(place, "ann", "names")
    capsys.readouterr()
    store = AnnotationStore.open(place / "ann")
    plain = StoreWriter(place / "plain", store.manifest | {"features": None})
    plain.write_all(store.images(), lambda rows: {"votes": store.votes()[rows], "probs": store.probs()[rows]})
    assert "keeps no features" in refused(capsys, place, "--rescore", str(place / "plain"))
    save_tiny_clip(place / "model", seed=3)
    others = ["--rescore", str(place / "ann"), "--classes", str(place / "others.txt")]
    assert "is not what made" in refused(capsys, place, *others)
    shutil.rmtree(place / "model")
    assert "does not exist" in refused(capsys, place, *others)
