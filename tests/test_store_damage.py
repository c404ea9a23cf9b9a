"""Annotation stores that moved, were damaged, or hold what is no evidence: what is read, mended and refused."""

import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from runs import error_of
from safetensors.numpy import save_file
from test_store import NAMES, evidence, image_list, manifest, write_store

from coreg.annotate.tools import info, verify
from coreg.data.sources import open_images
from coreg.store.blocks import read_block, write_block
from coreg.store.manifest import set_name
from coreg.store.store import AnnotationStore, StoreWriter

# ---- where the images are -------------------------------------------------------------------------------------------


def job_of_version_1(content):
    """The hash that blocks of version 1 carry, written down independently."""
    keys = ("class_names", "templates", "model", "images", "block_size")
    return hashlib.sha256(json.dumps({key: content[key] for key in keys}, sort_keys=True).encode()).hexdigest()


def write_old_store(root, images):
    """A store as the first version of the format had it: the place of the images is hashed, there are no checksums."""
    old = manifest(images) | {"version": 1}
    (root / "blocks").mkdir(parents=True)
    (root / "manifest.json").write_text(json.dumps(old, indent=1, ensure_ascii=False) + "\n")
    new, whole = write_store(root.with_name("new"), images)
    for name in ("images.txt", "samples.safetensors", "errors.csv"):
        (root / name).write_bytes((root.with_name("new") / name).read_bytes())
    job = job_of_version_1(old)
    for index, file in enumerate(new.files):
        rows = new.rows(index)
        block = {name: table[rows.start : rows.stop] for name, table in whole.items()}
        write_block(root / "blocks" / file.name, index, job, block, {})
    sums = [read_block(root / "blocks" / file.name, index, job)[2] for index, file in enumerate(new.files)]
    parts = [job, hashlib.sha256((root / "samples.safetensors").read_bytes()).hexdigest(), *sums]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest(), whole


def at(images, place):
    return dataclasses.replace(images, spec=place)


def test_the_place_of_the_images_is_no_part_of_the_job(tmp_path):
    images = image_list()
    writer, whole = write_store(tmp_path / "ann", images)
    before = AnnotationStore.open(tmp_path / "ann").hash
    elsewhere = at(images, "/elsewhere/photos")
    write_store(tmp_path / "other", elsewhere)
    assert AnnotationStore.open(tmp_path / "other").hash == before
    writer.files[1].unlink()
    again = StoreWriter(tmp_path / "ann", manifest(elsewhere, data_root="/data"))
    again.start(elsewhere)
    again.write(1, {name: table[3:6] for name, table in whole.items()}, {})
    store = AnnotationStore.open(tmp_path / "ann")
    assert store.hash == before and store.images_spec == "/elsewhere/photos" and store.manifest["data_root"] == "/data"


def test_old_stores_are_read_continued_and_moved_and_keep_their_hash(tmp_path):
    images = image_list()
    digest, whole = write_old_store(tmp_path / "old", images)
    before = (tmp_path / "old" / "manifest.json").read_bytes()
    assert AnnotationStore.open(tmp_path / "old").hash == digest
    StoreWriter(tmp_path / "old", manifest(images)).start(images)  # the same command
    assert (tmp_path / "old" / "manifest.json").read_bytes() == before
    for place in ("/elsewhere", "/elsewhere", "/third"):
        moved_images = at(images, place)
        writer = StoreWriter(tmp_path / "old", manifest(moved_images))
        writer.start(moved_images)
        assert writer.discard_damaged() == []
        writer.files[2].unlink()
        writer.write(2, {name: table[6:] for name, table in whole.items()}, {})
        store = AnnotationStore.open(tmp_path / "old")
        assert store.hash == digest and store.images_spec == place
    assert store.at("/fourth", None).images_spec == "/fourth" and store.at(None, None).manifest == store.manifest


def test_data_sets_with_made_up_names_are_not_mistaken_for_each_other(tmp_path):
    images = at(image_list(), "torchvision:CIFAR10")
    write_store(tmp_path / "ann", images)
    other = at(images, "torchvision:CIFAR100")
    message = error_of(StoreWriter(tmp_path / "ann", manifest(other)).start, other)
    assert "images spec ('torchvision:CIFAR10' there, 'torchvision:CIFAR100' asked for)" in message
    # their hash is the one of version 1
    assert StoreWriter(tmp_path / "ann", manifest(images)).job == job_of_version_1(manifest(images))
    joined = 'joined:["/a", "torchvision:CIFAR10"]'
    assert set_name(joined) == 'joined:["", "torchvision:CIFAR10"]' and set_name("/a") == set_name("joined:[") == ""


def test_a_link_to_the_images_may_point_elsewhere_later(tmp_path):
    for place in ("first", "second"):
        (tmp_path / place / "cat").mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / place / "cat" / "1.png")
    link = tmp_path / "photos"
    link.symlink_to("first")
    images = open_images(str(link), NAMES)
    assert images.spec == str(link)
    writer = StoreWriter(tmp_path / "ann", manifest(images))
    writer.start(images)
    writer.write(0, evidence(1), {})
    writer.complete(images.paths)
    link.unlink()
    link.symlink_to("second")
    shutil.rmtree(tmp_path / "first")
    store = AnnotationStore.open(tmp_path / "ann")
    store.images().load(0)
    assert store.at(str(tmp_path / "second"), None).images().spec == str(tmp_path / "second")
    link.unlink()
    assert "--images" in error_of(store.images)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    link.symlink_to("deep/er")
    assert open_images(f"{link}/../../second").spec == str(tmp_path / "second")  # as the system reads it


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"{}", "class", "count"])
@pytest.mark.parametrize("old", [False, True])
def test_a_damaged_manifest_is_written_anew_by_the_same_command(tmp_path, content, old):
    images, root = image_list(), tmp_path / "ann"
    if old:
        write_old_store(root, images)
    else:
        write_store(root, images)
    before, file = AnnotationStore.open(root).hash, root / "manifest.json"
    text = file.read_text()
    wrong = {"class": lambda: text.replace('"dog"', '"dig"'), "count": lambda: text.replace('"count": 7', '"count": 6')}
    if content is None:
        file.unlink()
    else:
        file.write_bytes(wrong[content]().encode() if content in wrong else content)
    message = error_of(AnnotationStore.open, root)
    assert "the same annotate_vlm.py command" in message or "command that made it again" in message
    other = manifest(images, templates=["x {}", "y {}"])
    assert "give another --output_dir" in error_of(StoreWriter(root, other).start, images)
    StoreWriter(root, manifest(images)).start(images)
    assert AnnotationStore.open(root).hash == before


def test_a_manifest_that_no_writer_wrote_is_refused_at_once(tmp_path):
    write_store(tmp_path / "ann")
    good = json.loads((tmp_path / "ann" / "manifest.json").read_text())
    for change in (
        {"images": good["images"] | {"count": 10**12}},
        {"images": good["images"] | {"count": 10**9}, "block_size": 1},
        {"images": good["images"] | {"count": 0}},
        {"images": [1]},
        {"block_size": 0},
        {"block_size": -3},
        {"block_size": "3"},
        {"class_names": []},
        {"class_names": [1, 2, 3]},
        {"class_names": ["\ud800", "a", "b"]},
        {"templates": "a {}"},
        {"model": "m"},
        {"model": {"spec": 5, "weights": "w"}},
        {"features": 0},
        {"data_root": None},
        {"hashed_spec": 7},
        {"version": "2"},
    ):
        (tmp_path / "ann" / "manifest.json").write_text(json.dumps(good | change))
        for reader in (AnnotationStore.open, info, verify):
            assert "manifest.json is missing or damaged" in error_of(reader, str(tmp_path / "ann")), change
    (tmp_path / "ann" / "manifest.json").write_text("[" * 100_000)
    assert "damaged" in error_of(AnnotationStore.open, tmp_path / "ann")


def test_headers_and_samples_that_no_writer_wrote_are_refused(tmp_path):
    """Checksums that are right do not make content right."""
    writer, whole = write_store(tmp_path / "ann")
    tensors, file = {name: table[:3] for name, table in whole.items()}, writer.files[0]
    for errors in ({6: "not in this block"}, {10**30: "x"}, {-1: "x"}):
        write_block(file, 0, writer.job, tensors, errors)
        assert "00000.safetensors" in error_of(AnnotationStore.open, tmp_path / "ann")
    write_block(file, 0, writer.job, tensors, {})
    AnnotationStore.open(tmp_path / "ann")
    for head in ("5", "[]", "{}", '{"job": 1}', "[" * 100_000, json.dumps({"errors": {"a": "b"}})):
        save_file(tensors, file, metadata={"coreg": head})
        assert "is damaged: 00000.safetensors" in error_of(AnnotationStore.open, tmp_path / "ann")
        assert writer.unreadable() == {}
    file.unlink()
    os.mkfifo(file)  # at which a reader would wait
    assert "00000.safetensors" in error_of(AnnotationStore.open, tmp_path / "ann")
    file.unlink()
    write_block(file, 0, writer.job, tensors, {})
    for label, split in [
        (np.full(7, 3, np.int32), np.zeros(7, np.uint8)),
        (np.full(7, -2, np.int32), np.zeros(7, np.uint8)),
        (np.zeros(7, np.int32), np.full(7, 3, np.uint8)),
        (np.zeros(7, np.int64), np.zeros(7, np.uint8)),
        (np.zeros(6, np.int32), np.zeros(7, np.uint8)),
    ]:
        save_file({"label": label, "split": split}, tmp_path / "ann" / "samples.safetensors")
        (tmp_path / "ann" / "checksums.json").unlink(missing_ok=True)
        message = error_of(AnnotationStore.open, tmp_path / "ann")
        assert "samples.safetensors holds" in message or "samples.safetensors does not hold" in message


# ---- what is no evidence --------------------------------------------------------------------------------------------

NO_EVIDENCE = [
    ("features", np.nan, "its features are not finite"),
    ("features", -np.inf, "its features are not finite"),
    ("probs", np.nan, "its probabilities are NaN or not between 0 and 1"),
    ("probs", [1.5, -0.5, 0], "its probabilities are NaN or not between 0 and 1"),
    ("probs", [0.5, 0.25, 0.125], "its probabilities do not sum to 1"),
    ("probs", 0, "its probabilities do not sum to 1"),
    ("votes", 3, "its votes are not between -1 and 2"),
    ("votes", -2, "its votes are not between -1 and 2"),
]


@pytest.mark.parametrize(("name", "value", "words"), NO_EVIDENCE)
def test_what_is_no_evidence_is_neither_written_nor_read(tmp_path, name, value, words):
    images, whole = image_list(), evidence(7)
    whole[name][4] = value
    for root, model, advice in [
        (tmp_path / "a", {"spec": "m", "weights": "w", "precision": "fp16"}, "annotate with --precision bf16"),
        (tmp_path / "b", {"spec": "m", "weights": "w"}, "its model or weights are damaged"),
    ]:
        writer = StoreWriter(root, manifest(images, block_size=3, model=model))
        writer.start(images)
        block = {key: table[3:6] for key, table in whole.items()}
        message = error_of(writer.write, 1, block, {})
        assert f"block 1 is not written: image {images.paths[4]!r}: {words}" in message and advice in message
        assert not writer.files[1].exists()
        # stores that were written before anybody checked
        for index in (0, 2):
            rows = slice(writer.rows(index).start, writer.rows(index).stop)
            writer.write(index, {key: table[rows] for key, table in whole.items()}, {})
        write_block(writer.files[1], 1, writer.job, block, {})
        writer.complete(images.paths)
        message = error_of(AnnotationStore.open, root)
        assert "00001.safetensors" in message and repr(images.paths[4]) in message and words in message
        assert advice in message
        # an image that cannot be read abstains, whatever the model made of its stand-in
        writer.files[1].unlink()
        writer.write(1, block, {4: "empty file"})
        writer.complete(images.paths)
        assert AnnotationStore.open(root).unreadable.tolist() == [row == 4 for row in range(7)]


def test_tables_of_another_kind_are_refused(tmp_path):
    writer, whole = write_store(tmp_path / "ann", block_size=7)
    for changed, words in [
        ({"probs": whole["probs"].astype(np.float32)}, "probs are float32 (7, 3), expected float16 (7, 3)"),
        ({"votes": whole["votes"][:, :1]}, "votes are int16 (7, 1), expected int16 (7, 2)"),
        ({"features": whole["features"][:5]}, "features are float16 (5, 4), expected float16 (7, 4)"),
        ({"more": whole["votes"]}, "it holds features, more, probs, votes, expected features, probs, votes"),
    ]:
        assert words in error_of(writer.write, 0, whole | changed, {})


def test_probabilities_of_many_classes_sum_to_one_but_for_rounding(tmp_path):
    """Softmax over many classes, most of them too small for float16's full precision, and uniform rows."""
    images, generator = image_list(), np.random.default_rng(0)
    for classes in (2, 10, 1000, 20_000):
        logits = generator.normal(size=(7, classes)) * np.linspace(0, 12, 7)[:, None]
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        names, votes = [f"c{number}" for number in range(classes)], np.zeros((7, 2), np.int16)
        writer = StoreWriter(tmp_path / str(classes), manifest(images, 7, class_names=names, features=None))
        writer.start(images)
        writer.write(0, {"votes": votes, "probs": probs.astype(np.float16)}, {})


def test_tables_that_lie_column_by_column_are_written_as_they_read(tmp_path):
    images, whole = image_list(), evidence(7)
    writer = StoreWriter(tmp_path / "ann", manifest(images, block_size=7))
    writer.start(images)
    writer.write(0, {name: np.asfortranarray(table) for name, table in whole.items()}, {})
    writer.complete(images.paths)
    store = AnnotationStore.open(tmp_path / "ann")
    assert (store.votes() == whole["votes"]).all() and (store.features() == whole["features"]).all()
    write_block(tmp_path / "block", 0, "job", {"votes": np.asfortranarray(whole["votes"])}, {})
    assert (read_block(tmp_path / "block", 0, "job")[0]["votes"] == whole["votes"]).all()
