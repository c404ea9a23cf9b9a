"""Store tools: what they say about good, unfinished and damaged stores, and that what they write is what was stored."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from runs import refused
from runs import write_store as write_tensors

from coreg.annotate.tools import main
from coreg.data.sources import open_images
from coreg.store.blocks import pack_answers
from coreg.store.store import AnnotationStore, StoreWriter, make_manifest
from coreg.weak.rules import candidate_sets

NAMES = ["cat", "dog", "ca/rs"]


def photos(root, count=11, shift=0):
    for number in range(count):
        path = root / ("test" if number % 4 == 0 else "train") / NAMES[number % 2] / f"{number:02d}, 'é'\n.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), (number, shift, 0)).save(path)
    return root


def evidence(count, templates, seed, features=4):
    generator = np.random.default_rng(seed)
    tensors = {
        "votes": generator.integers(-1, 3, (count, templates)).astype(np.int16),
        "probs": generator.dirichlet(np.ones(3), count).astype(np.float16),
    }
    return tensors | ({"features": generator.normal(size=(count, features)).astype(np.float16)} if features else {})


def write_store(
    root, images, templates=("a {}", "the {}"), seed=0, skip=(), spec="m", errors=None, features=4, block_size=4
):
    details = {"features": features, "data_root": "data", "preprocessing": {}, "versions": {}}
    writer = StoreWriter(
        root, make_manifest(images, NAMES, templates, {"spec": spec, "weights": "w"}, block_size, **details)
    )
    writer.start(images)
    whole = evidence(len(images), len(templates), seed, features)
    for index in set(range(len(writer.files))) - set(skip):
        rows = writer.rows(index)
        bad = {row: reason for row, reason in (errors or {}).items() if row in rows}
        writer.write(index, {name: table[rows.start : rows.stop] for name, table in whole.items()}, bad)
    if not skip:
        writer.complete(images.paths)
    return whole


@pytest.fixture
def place(tmp_path):
    images = open_images(str(photos(tmp_path / "photos")), NAMES)
    write_store(tmp_path / "ann", images, errors={3: "empty file"})
    return tmp_path, images


def test_info_and_verify_of_a_whole_store(place, capsys):
    root = place[0] / "ann"
    assert main(["info", str(root)]) == 0
    text = capsys.readouterr().out
    for words in (
        "images     11 of",
        "model      spec m, weights w",
        "blocks     3 of 3",
        "row 3: empty file",
        "zero-shot",
    ):
        assert words in text
    assert main(["verify", str(root)]) == 0
    assert f"is whole: 3 blocks, 11 images, sha256 {AnnotationStore.open(root).hash}" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", "coreg.annotate", "verify", str(root)], capture_output=True, text=True)
    assert done.returncode == 0 and "is whole" in done.stdout and done.stderr == ""


def test_info_and_verify_of_an_unfinished_and_damaged_store(place, capsys):
    root, images = place
    write_store(root / "half", images, skip={1})
    assert main(["info", str(root / "half")]) == 0
    assert "blocks     2 of 3" in (text := capsys.readouterr().out) and "unfinished: run" in text
    content = bytearray((root / "half" / "blocks" / "00002.safetensors").read_bytes())
    content[-1] ^= 1
    (root / "half" / "blocks" / "00002.safetensors").write_bytes(content)
    assert main(["verify", str(root / "half")]) == 1
    text = capsys.readouterr().out
    assert "00002.safetensors is damaged" in text and "1 of 3 blocks are missing" in text and "made anew" in text
    (root / "ann" / "images.txt").write_text("changed\n")
    assert "images.txt was changed" in refused(capsys, main, "verify", root / "ann")


def test_a_damaged_store_names_the_command_that_made_it(place, capsys):
    root, images = place
    more = open_images(str(photos(root / "more", count=3)), NAMES)
    write_store(root / "parts", more)
    write_store(root / "n", images, spec="n")
    write_store(root / "synthetic", images, spec="synthetic:flip(q=0.1,seed=0)", features=None)
    merge = "delete it and run the same python -m coreg.annotate merge command again"
    for store, parts, again in (
        ("images", ("ann", "parts"), merge),
        ("annotators", ("ann", "n"), merge),
        ("synthetic", (), "delete it and run the same python -m coreg.weak command again"),
        ("ann", (), "run the same annotate_vlm.py command again"),
    ):
        if parts:
            main(["merge", *(str(root / name) for name in parts), "--output_dir", str(root / store)])
        block = root / store / "blocks" / "00001.safetensors"
        block.write_bytes(b"junk")
        assert refused(capsys, main, "export", root / store, "--output", root / "x.csv").endswith(f"; {again}")
        assert main(["verify", str(root / store)]) == 1
        assert f"\n{again}: " in capsys.readouterr().out
        block.unlink()
        assert main(["info", str(root / store)]) == 0
        assert capsys.readouterr().out.endswith(f"unfinished: {again}\n")


@pytest.mark.parametrize("rule", ["union", "topk:2"])
def test_export_to_csv(place, rule):
    root, images = place
    assert main(["export", str(root / "ann"), "--output", str(root / "out.csv"), "--candidates", rule]) == 0
    store = AnnotationStore.open(root / "ann")
    with (root / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11 and [row["path"] for row in rows] == list(images.paths)
    candidates = candidate_sets(store, rule)
    for index, row in enumerate(rows):
        assert row["split"] == ("test" if images.paths[index].startswith("test/") else "train")
        assert row["label"] == images.paths[index].split("/")[1]
        assert json.loads(row["candidates"]) == [NAMES[c] for c in np.flatnonzero(candidates[index])]
        probs = [float(row[f"p({name})"]) for name in NAMES]
        assert np.allclose(probs, store.probs()[index], rtol=1e-3)
        assert row["best"] == ("" if index == 3 else NAMES[int(np.argmax(store.probs()[index]))])
        assert float(row["probability"]) == max(probs)


def test_export_to_a_folder_that_torchvision_reads(place):
    from torchvision.datasets import ImageFolder

    root, images = place
    assert main(["export", str(root / "ann"), "--output", str(root / "out")]) == 0
    store = AnnotationStore.open(root / "ann")
    linked = {}
    for split in ("train", "test"):
        folder = ImageFolder(root / "out" / split)
        for path, label in folder.samples:
            number = Image.open(path).getpixel((0, 0))[0]
            linked[number] = (split, folder.classes[label])
    wanted = {}
    for row in set(range(11)) - {3}:
        name = NAMES[int(store.probs()[row].argmax())].replace("/", "_")
        wanted[images.load(row).getpixel((0, 0))[0]] = ("train", "test")[store.split[row]], name
    assert linked == wanted
    digits = open_images("builtin:digits")
    tensors = {"votes": digits.labels[:, None].astype(np.int16), "probs": np.eye(10, dtype=np.float16)[digits.labels]}
    write_tensors(root / "digits", digits, digits.class_names, ["{}"], tensors)
    assert main(["export", str(root / "digits"), "--output", str(root / "pngs")]) == 0
    row = int(np.flatnonzero(digits.split == 0)[0])
    path = root / "pngs" / "train" / digits.class_names[digits.labels[row]] / f"{digits.paths[row]}.png"
    assert (np.asarray(Image.open(path)) == np.asarray(digits.load(row))).all() and not path.is_symlink()


def test_export_to_parquet(place, capsys, monkeypatch):
    root, images = place
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert "pip install pyarrow" in refused(capsys, main, "export", root / "ann", "--output", root / "out.parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    main(["export", str(root / "ann"), "--output", str(root / "out.parquet")])
    table = parquet.read_table(root / "out.parquet").to_pydict()
    store = AnnotationStore.open(root / "ann")
    assert table["path"] == list(images.paths) and np.allclose(table["probabilities"], store.probs().astype(np.float32))
    assert table["candidates"][0] == [NAMES[c] for c in np.flatnonzero(candidate_sets(store)[0])]


def test_parts_of_one_job_are_merged_block_by_block(place, capsys):
    root, images = place
    write_store(root / "one", images, skip={0, 2}, errors={3: "empty file"})
    write_store(root / "two", images, skip={1}, errors={3: "empty file"})
    write_store(root / "three", images, skip={1, 2}, errors={3: "empty file"})
    (root / "two" / "blocks" / "00002.safetensors").write_bytes(b"junk")
    assert main(["merge", str(root / "one"), str(root / "two"), "--output_dir", str(root / "part")]) == 0
    assert "2 of 3 blocks are there; annotate the others" in capsys.readouterr().out
    assert "unfinished (1 of 3" in refused(capsys, main, "export", root / "part", "--output", root / "x.csv")
    write_store(root / "four", images, skip={0, 1})
    main(["merge", *(str(root / name) for name in ("one", "two", "three", "four")), "--output_dir", str(root / "all")])
    assert "all 3 blocks are there" in capsys.readouterr().out
    merged, whole = AnnotationStore.open(root / "all"), AnnotationStore.open(root / "ann")
    assert merged.hash == whole.hash
    assert (root / "all" / "errors.csv").read_bytes() == (root / "ann" / "errors.csv").read_bytes()


def test_other_images_are_put_one_behind_the_other(place, capsys):
    root, first = place
    second = open_images(str(photos(root / "more", count=6, shift=9)), NAMES)
    write_store(root / "ann2", second, seed=1, errors={5: "not an image"}, block_size=5)
    main(["merge", str(root / "ann"), str(root / "ann2"), "--output_dir", str(root / "all")])
    assert "17 images of 2 parts" in capsys.readouterr().out
    merged, one, two = (AnnotationStore.open(root / name) for name in ("all", "ann", "ann2"))
    for name in ("votes", "probs", "features"):
        assert (getattr(merged, name)() == np.concatenate([getattr(one, name)(), getattr(two, name)()])).all()
    assert merged.paths == [f"0/{path}" for path in one.paths] + [f"1/{path}" for path in two.paths]
    assert merged.paths == sorted(merged.paths, key=os.fsencode)
    assert (merged.labels == np.concatenate([one.labels, two.labels])).all()
    assert (merged.split == np.concatenate([one.split, two.split])).all()
    assert np.flatnonzero(merged.unreadable).tolist() == [3, 16]
    images = merged.images()  # opens both folders again
    assert images.load(0).getpixel((0, 0)) == first.load(0).getpixel((0, 0))
    assert images.load(12).getpixel((0, 0)) == second.load(1).getpixel((0, 0)) and (images.labels == merged.labels).all()


def test_other_annotators_of_the_same_images_vote_together(place, capsys):
    root, images = place
    write_store(
        root / "other",
        images,
        ("my {}", "a {}", "no {}"),
        seed=2,
        spec="n",
        errors={3: "empty file", 4: "x"},
        features=None,
    )
    main(["merge", str(root / "ann"), str(root / "other"), "--output_dir", str(root / "all")])
    assert "2 annotators of the same 11 images, 5 templates in all" in capsys.readouterr().out
    merged, one, two = (AnnotationStore.open(root / name) for name in ("all", "ann", "other"))
    assert merged.templates == ["m: a {}", "m: the {}", "n: my {}", "n: a {}", "n: no {}"]
    assert (merged.votes() == np.concatenate([one.votes(), two.votes()], axis=1)).all()
    mean = (2 * one.probs().astype(float) + 3 * two.probs().astype(float)) / 5
    assert np.allclose(merged.probs(), mean, atol=1e-3) and merged.features() is None
    assert np.flatnonzero(merged.unreadable).tolist() == [3]  # row 4 could be read by one of them
    spoke = [(store.votes() >= 0).any(axis=1)[:, None] for store in (one, two)]
    union = (candidate_sets(one) & spoke[0]) | (candidate_sets(two) & spoke[1])
    union[~union.any(axis=1)] = True
    assert (candidate_sets(merged) == union).all()
    assert merged.images().paths == images.paths


def test_answers_are_kept_by_merging(place):
    root, images = place
    more = open_images(str(photos(root / "more", count=3)), NAMES)
    for name, part in (("x", images), ("y", more)):
        details = {"features": None, "data_root": "data", "preprocessing": {}, "versions": {}}
        writer = StoreWriter(root / name, make_manifest(part, NAMES, ["{}"], {"spec": "m", "weights": "w"}, 4, **details))

        def tensors(rows, name=name):
            answers = [[f'{name}{row}\n"é'] for row in range(rows.start, rows.stop)]
            return evidence(len(answers), 1, rows.start, None) | {"answers": pack_answers(answers)}

        writer.write_all(part, tensors)
    main(["merge", str(root / "x"), str(root / "y"), "--output_dir", str(root / "all")])
    wanted = [[f'x{row}\n"é'] for row in range(11)] + [[f'y{row}\n"é'] for row in range(3)]
    assert AnnotationStore.open(root / "all").answers() == wanted
    assert AnnotationStore.open(root / "ann").answers() is None


def hostile_tar(path, names):
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            content = io.BytesIO()
            Image.new("RGB", (2, 2), (number, 0, 0)).save(content, "PNG")
            member = tarfile.TarInfo(name)
            member.size = content.tell()
            archive.addfile(member, io.BytesIO(content.getvalue()))


def test_export_writes_nowhere_but_into_its_folder(tmp_path, capsys):
    names = ["../../../victim.png", "/abs.png", "a/../../b.png", "a\\..\\c.png", "con/d.png", "e.png"]
    hostile_tar(tmp_path / "x.tar", names)
    (tmp_path / "victim.png").write_text("kept")
    images = open_images(str(tmp_path / "x.tar"))
    assert not any(path.startswith((".", "/")) and ".." in path.split("/") for path in images.paths)
    classes = ["../..", "nul", "a/b"]
    tensors = {"votes": np.zeros((6, 1), np.int16), "probs": np.eye(3, dtype=np.float16)[np.arange(6) % 3]}
    write_tensors(tmp_path / "ann", images, classes, ["{}"], tensors)
    before = {path for path in tmp_path.rglob("*") if not path.is_dir()}
    main(["export", str(tmp_path / "ann"), "--output", str(tmp_path / "deep" / "er" / "out")])
    written = {path for path in tmp_path.rglob("*") if not path.is_dir()} - before
    assert len(written) == 6 and all(tmp_path / "deep" / "er" / "out" / "train" in path.parents for path in written)
    assert (tmp_path / "victim.png").read_text() == "kept" and os.listdir(tmp_path / "deep" / "er") == ["out"]
    # two members whose copies would have one name
    hostile_tar(tmp_path / "y.tar", ["f.jpg", "f.jpg.png"])
    images = open_images(str(tmp_path / "y.tar"))
    tensors = {"votes": np.zeros((2, 1), np.int16), "probs": np.eye(3, dtype=np.float16)[[0, 0]]}
    write_tensors(tmp_path / "two", images, classes, ["{}"], tensors)
    assert "is there already" in refused(capsys, main, "export", tmp_path / "two", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_full_disk_leaves_nothing_of_exports_and_merged_stores(place, capsys, monkeypatch):
    root, images = place
    write_store(root / "other", images, spec="n")
    write_store(root / "part", images, skip={1})
    more = open_images(str(photos(root / "more", count=3)), NAMES)
    write_store(root / "ann3", more)
    before = sorted(root.rglob("*"))
    real, left = os.fsync, [0]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    def link(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coreg.files.os.fsync", full)
    monkeypatch.setattr("pathlib.Path.symlink_to", link)
    for words in (
        ["export", root / "ann", "--output", root / "x.csv"],
        ["export", root / "ann", "--output", root / "x"],
        ["merge", root / "ann", root / "other", "--output_dir", root / "x"],
        ["merge", root / "ann", root / "ann3", "--output_dir", root / "x"],
        ["merge", root / "ann", root / "part", "--output_dir", root / "x"],
    ):
        for left[0] in range(5):
            line = refused(capsys, main, *words) if left[0] == 0 or words[0] == "merge" else ""
            assert not line or ("No space left on device" in line and f"cannot write {root / 'x'}" in line)
            if line:
                assert sorted(root.rglob("*")) == before
    monkeypatch.undo()
    main(["merge", *(str(root / name) for name in ("ann", "other")), "--output_dir", str(root / "x")])
    AnnotationStore.open(root / "x")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(place, capsys):
    ann = place[0] / "ann"
    assert "there is no folder" in refused(capsys, main, "export", ann, "--output", place[0] / "no" / "x.csv")
    (place[0] / "file").write_text("kept")
    for words in (["export", ann, "--output"], ["merge", ann, ann, "--output_dir"]):
        assert "cannot write" in refused(capsys, main, *words, place[0] / "file" / "x")
    assert (place[0] / "file").read_text() == "kept"


def test_images_that_were_moved_are_named_in_a_new_place(place, capsys):
    root, _ = place
    (root / "photos").rename(root / "new")
    line = refused(capsys, main, "export", root / "ann", "--output", root / "out")
    assert "cannot be opened" in line and "say with --images where to" in line
    main(["export", str(root / "ann"), "--output", str(root / "out"), "--images", str(root / "new")])
    assert all(path.resolve().is_relative_to(root / "new") for path in (root / "out").rglob("*.png"))
    assert main(["health", str(root / "ann")]) == 0
    assert "note: without pictures" in capsys.readouterr().err
    assert main(["health", str(root / "ann"), "--images", str(root / "new")]) == 0
    output = capsys.readouterr()
    assert output.err == "" and "candidates  images" in output.out and "<img" in (root / "ann/report.html").read_text()
    (root / "new" / "test" / "cat").rename(root / "new" / "test" / "tiger")
    assert "--images" in refused(capsys, main, "export", root / "ann", "--output", root / "x", "--images", root / "new")


def test_what_cannot_be_done_ends_in_one_line(place, capsys):
    root, _ = place
    ann = root / "ann"
    assert "unknown command check" in refused(capsys, main, "check", ann)
    assert "write the folder of one annotation store, not 0" in refused(capsys, main, "info")
    assert "does not exist" in refused(capsys, main, "verify", root / "nowhere")
    assert "--output is missing" in refused(capsys, main, "export", ann)
    assert "no known form" in refused(capsys, main, "export", ann, "--output", root / "x.json")
    assert "is there already" in refused(capsys, main, "export", ann, "--output", root / "photos")
    assert "unknown candidate rule" in refused(
        capsys, main, "export", ann, "--output", root / "x.csv", "--candidates", "best"
    )
    assert not (root / "x.csv").exists()
    assert "at least two stores" in refused(capsys, main, "merge", ann, "--output_dir", root / "new")
    assert "--output_dir is missing" in refused(capsys, main, "merge", ann, ann)
    assert "is there already" in refused(capsys, main, "merge", ann, ann, "--output_dir", root / "photos")
    more = open_images(str(photos(root / "more", count=3)), NAMES)
    write_store(root / "other", more, spec="n")
    assert "other images and another model" in refused(
        capsys, main, "merge", ann, root / "other", "--output_dir", root / "new"
    )
    shutil.copytree(ann, root / "names")
    manifest = json.loads((ann / "manifest.json").read_text())
    (root / "names" / "manifest.json").write_text(json.dumps(manifest | {"class_names": ["x", "y", "z"]}))
    line = refused(capsys, main, "merge", ann, root / "names", "--output_dir", root / "new")
    assert "damaged" in line or "other class names" in line
    assert not (root / "new").exists()
    assert main(["--help"]) == 0 and "merge ann1 ann2" in capsys.readouterr().out
