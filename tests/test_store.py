"""The annotation store: round trip, identity, and everything that can be wrong with a folder."""

import csv
import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from runs import error_of
from safetensors.numpy import load_file, save_file

from coreg import files
from coreg.data.images import ImageList
from coreg.errors import UserError
from coreg.store.blocks import DamagedBlockError, read_block, write_block
from coreg.store.store import AnnotationStore, StoreWriter, continued, make_manifest

NAMES, TEMPLATES = ["cat", "dog", "猫"], ["a {}", "the {}"]


def image_list(count=7, labels=True):
    generator = np.random.default_rng(count)
    paths = sorted(
        [f"img {row:02d}.png" for row in range(count - 2)] + ["with\nnew,line.png", "back\\slash\udcff.png"],
        key=os.fsencode,
    )
    return ImageList(
        spec="/somewhere/images",
        paths=paths,
        labels=generator.integers(-1, 3, count) if labels else None,
        split=generator.integers(0, 2, count).astype(np.uint8),
        class_names=None,
        pixels=lambda row: Image.new("L", (1, 1)),
    )


def manifest(images, block_size=3, **changed):
    job = {"class_names": NAMES, "templates": TEMPLATES, "model": {"spec": "m", "weights": "w"}}
    details = {"features": 4, "data_root": "data", "preprocessing": {}, "versions": {"coreg": "0"}}
    return make_manifest(images, block_size=block_size, **(job | details | changed))


def evidence(count, seed=0):
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.ones(3), count)
    return {
        "votes": generator.integers(0, 3, (count, 2)).astype(np.int16),
        "probs": probs.astype(np.float16),
        "features": generator.normal(size=(count, 4)).astype(np.float16),
    }


def write_store(root, images=None, skip=(), errors=None, finish=True, **changed):
    images = images or image_list()
    writer = StoreWriter(root, manifest(images, **changed))
    writer.start(images)
    whole = evidence(len(images))
    for index in range(len(writer.files)):
        if index not in skip:
            rows = writer.rows(index)
            bad = {row: reason for row, reason in (errors or {}).items() if row in rows}
            writer.write(index, {name: table[rows.start : rows.stop] for name, table in whole.items()}, bad)
    if finish:
        writer.complete(images.paths)
    return writer, whole


def test_a_store_gives_back_what_was_written(tmp_path):
    images = image_list()
    _, whole = write_store(tmp_path / "a" / "ann", images)
    store = AnnotationStore.open(tmp_path / "a" / "ann")
    assert len(store) == 7 and store.paths == images.paths and store.images_spec == "/somewhere/images"
    assert store.class_names == NAMES and store.templates == TEMPLATES
    assert (store.labels == images.labels).all() and store.labels.dtype == np.int64
    assert (store.split == images.split).all() and store.split.dtype == np.uint8
    for name, table in (("votes", store.votes()), ("probs", store.probs()), ("features", store.features())):
        assert table.dtype == whole[name].dtype and (table == whole[name]).all()
    assert not store.unreadable.any()
    assert sorted(os.listdir(tmp_path / "a" / "ann")) == [
        "blocks", "checksums.json", "errors.csv", "images.txt", "manifest.json", "samples.safetensors",
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path / "a" / "ann" / "blocks")) == [f"0000{i}.safetensors" for i in range(3)]
    assert (tmp_path / "a" / "ann" / "images.txt").read_bytes().count(b"\n") == 7
    assert os.listdir(tmp_path / "a") == ["ann"]


def test_a_store_without_labels_and_features(tmp_path):
    images = image_list(labels=False)
    writer = StoreWriter(tmp_path / "ann", manifest(images, block_size=100, features=None))
    writer.start(images)
    tables = evidence(7)
    writer.write(0, {"votes": tables["votes"], "probs": tables["probs"]}, {})
    writer.complete(images.paths)
    store = AnnotationStore.open(tmp_path / "ann")
    assert store.labels is None and store.features() is None and (store.votes() == tables["votes"]).all()


def test_unreadable_images_abstain_and_are_listed_with_the_reason(tmp_path):
    images = image_list()
    write_store(tmp_path / "ann", images, errors={1: "empty file", 6: 'a "quoted", reason'})
    store = AnnotationStore.open(tmp_path / "ann")
    assert np.flatnonzero(store.unreadable).tolist() == [1, 6]
    assert (store.votes()[[1, 6]] == -1).all() and (store.votes()[[0, 2, 3, 4, 5]] >= 0).all()
    assert np.allclose(store.probs()[[1, 6]], 1 / 3, atol=1e-3) and not store.features()[[1, 6]].any()
    with (tmp_path / "ann" / "errors.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [
            ["path", "reason"], [images.paths[1], "empty file"], [images.paths[6], 'a "quoted", reason'],
        ]  # fmt: skip


def test_the_same_job_gives_the_same_bytes_and_the_same_hash(tmp_path):
    write_store(tmp_path / "one", errors={2: "empty file", 0: "x"})
    write_store(tmp_path / "two", errors={0: "x", 2: "empty file"})
    for index in range(3):
        name = f"blocks/{index:05d}.safetensors"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert AnnotationStore.open(tmp_path / "one").hash == AnnotationStore.open(tmp_path / "two").hash


def test_the_hash_changes_with_the_job_the_evidence_and_the_split(tmp_path):
    hashes = set()
    split = image_list()
    split.split = 1 - split.split
    for number, (images, changed, errors) in enumerate(
        [
            (None, {}, None),
            (None, {"class_names": ["cat", "dog", "cow"]}, None),
            (None, {"templates": ["a {}", "one {}"]}, None),
            (None, {"model": {"spec": "m", "weights": "v"}}, None),
            (None, {"block_size": 4}, None),
            (None, {}, {3: "empty file"}),
            (split, {}, None),
        ]
    ):
        write_store(tmp_path / str(number), images, errors=errors, **changed)
        hashes.add(AnnotationStore.open(tmp_path / str(number)).hash)
    assert len(hashes) == 7
    write_store(tmp_path / "versions", versions={"coreg": "9"})
    assert AnnotationStore.open(tmp_path / "versions").hash in hashes  # tools' versions make no other job


def test_folders_that_are_no_finished_store_are_one_line(tmp_path):
    assert "does not exist" in error_of(AnnotationStore.open, tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "not an annotation store" in error_of(AnnotationStore.open, tmp_path / "empty")
    for content in ("", "[]", '{"schema": 1}', "{"):
        (tmp_path / "empty" / "manifest.json").write_text(content)
        assert "not a valid annotation store" in error_of(AnnotationStore.open, tmp_path / "empty")

    write_store(tmp_path / "part", skip={1}, finish=False)
    message = error_of(AnnotationStore.open, tmp_path / "part")
    assert "unfinished (1 of 3 blocks missing); run the same annotate_vlm.py command again" in message
    write_store(tmp_path / "last", finish=False)
    assert "unfinished (0 of 3" in error_of(AnnotationStore.open, tmp_path / "last")

    write_store(tmp_path / "next")
    manifest = json.loads((tmp_path / "next" / "manifest.json").read_text())
    (tmp_path / "next" / "manifest.json").write_text(json.dumps(manifest | {"version": 5}))
    assert "schema coreg-annotations version 5 but this coreg reads" in error_of(AnnotationStore.open, tmp_path / "next")
    manifest.pop("templates")
    (tmp_path / "next" / "manifest.json").write_text(json.dumps(manifest))
    assert "there is no 'templates'" in error_of(AnnotationStore.open, tmp_path / "next")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", ["tensor byte", "header byte", "metadata", "cut", "empty", "swapped", "foreign", "plain"]
)
def test_a_damaged_block_is_found_and_counts_as_not_written(tmp_path, damage):
    writer, whole = write_store(tmp_path / "ann")
    file = writer.files[1]
    if damage == "tensor byte":
        flip(file, -3)
    elif damage == "header byte":
        flip(file, 40)
    elif damage == "metadata":
        content = file.read_bytes()
        file.write_bytes(content.replace(b'"index\\": 1', b'"index\\": 2'))
        assert file.read_bytes() != content
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "swapped":
        file.write_bytes(writer.files[0].read_bytes())
    elif damage == "foreign":
        other, _ = write_store(tmp_path / "other", class_names=["x", "y", "z"])
        file.write_bytes(other.files[1].read_bytes())
    elif damage == "plain":
        save_file(load_file(file), file)
    message = error_of(AnnotationStore.open, tmp_path / "ann")
    assert "00001.safetensors" in message and "run the same annotate_vlm.py command again" in message
    assert [writer.is_written(index) for index in range(3)] == [True, False, True]
    writer.write(1, {name: table[3:6] for name, table in whole.items()}, {})
    assert (AnnotationStore.open(tmp_path / "ann").votes() == whole["votes"]).all()


@pytest.mark.parametrize("name", ["images.txt", "samples.safetensors", "errors.csv"])
def test_a_changed_list_is_noticed_and_mended_by_the_same_command(tmp_path, name):
    """Every byte of labels, splits, paths and reasons: some flips give other labels or splits and nothing else."""
    images, generator = image_list(), np.random.default_rng(0)
    write_store(tmp_path / "ann", images, errors={1: "empty file"})
    whole, content = AnnotationStore.open(tmp_path / "ann").hash, (tmp_path / "ann" / name).read_bytes()
    for place in [*generator.integers(0, len(content), 40).tolist(), -1, -8]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "ann" / name).write_bytes(damaged)
        message = error_of(AnnotationStore.open, tmp_path / "ann")
        assert "is damaged" in message and name in message and "run the same annotate_vlm.py command again" in message
    for damaged in (b"", content[:-1], content + content, None):
        (tmp_path / "ann" / name).unlink(missing_ok=True)
        if damaged is not None:
            (tmp_path / "ann" / name).write_bytes(damaged)
        error_of(AnnotationStore.open, tmp_path / "ann")
        # what the same command does
        again = StoreWriter(tmp_path / "ann", manifest(images))
        again.start(images)
        assert again.discard_damaged() == []
        again.complete(images.paths)
        assert (tmp_path / "ann" / name).read_bytes() == content
        assert AnnotationStore.open(tmp_path / "ann").hash == whole
    (tmp_path / "ann" / "checksums.json").unlink()  # stores that are older than this file
    assert AnnotationStore.open(tmp_path / "ann").hash == whole


def test_another_job_is_refused_and_the_difference_named(tmp_path):
    root = tmp_path / "ann"
    write_store(root)
    images = image_list()
    continued(root, manifest(images))
    for changed, words in [
        ({"class_names": ["cat", "cow", "猫"]}, "class_names ('dog' there, 'cow' asked for)"),
        ({"class_names": NAMES[:2]}, "class_names (3 there, 2 asked for)"),
        ({"templates": TEMPLATES[::-1]}, "templates ('a {}' there, 'the {}' asked for)"),
        ({"model": {"spec": "m", "weights": "x"}}, "model weights ('w' there, 'x' asked for)"),
        ({"block_size": 5}, "block_size (3 there, 5 asked for)"),
    ]:
        message = error_of(continued, root, manifest(images, **changed))
        assert "another job" in message and words in message
    assert "images count (7 there, 8 asked for)" in error_of(continued, root, manifest(image_list(8)))
    images.paths[0] = "other"
    assert "images sha256" in error_of(StoreWriter(root, manifest(images)).start, images)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    images = image_list()
    assert "holds other things" in error_of(StoreWriter(tmp_path, manifest(images)).start, images)
    assert "holds other things" in error_of(continued, tmp_path / "thesis.txt", manifest(images))
    assert os.listdir(tmp_path) == ["thesis.txt"]
    message = error_of(StoreWriter(tmp_path / "thesis.txt" / "ann", manifest(images)).start, images)
    assert "cannot write" in message and os.listdir(tmp_path) == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    write_store(tmp_path / "empty", images)
    AnnotationStore.open(tmp_path / "empty")


def test_labels_that_came_later_are_taken_over(tmp_path):
    write_store(tmp_path / "ann", image_list(labels=False))
    assert AnnotationStore.open(tmp_path / "ann").labels is None
    images = image_list()
    StoreWriter(tmp_path / "ann", manifest(images)).start(images)
    assert (AnnotationStore.open(tmp_path / "ann").labels == images.labels).all()


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_block(tmp_path, monkeypatch):
    writer, whole = write_store(tmp_path / "ann", skip={2}, finish=False)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    message = error_of(writer.write, 2, {name: table[6:] for name, table in whole.items()}, {})
    assert "No space left on device" in message and "run the same command again" in message
    assert sorted(os.listdir(tmp_path / "ann" / "blocks")) == ["00000.safetensors", "00001.safetensors"]
    # a block that another process has written in the meantime is as good
    writer.write(1, {name: table[3:6] for name, table in whole.items()}, {})
    assert writer.is_written(1)


def test_a_writer_that_is_killed_leaves_only_whole_blocks(tmp_path):
    file = tmp_path / "00000.safetensors"
    program = (
        "import os, sys, numpy as np\nfrom pathlib import Path\n"
        "from coreg import files\nfrom coreg.store import blocks\n"
        "files.os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "blocks.write_block(Path(sys.argv[1]), 0, 'job', {'votes': np.zeros((2, 2), np.int16)}, {})"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True)
    assert killed.returncode == -9 and not file.exists() and len(os.listdir(tmp_path)) == 1  # a temporary file
    with pytest.raises(DamagedBlockError, match="cannot be read"):
        read_block(file, 0, "job")
    write_block(file, 0, "job", {"votes": np.zeros((2, 2), np.int16)}, {1: "empty file"})
    assert read_block(file, 0, "job")[1] == {1: "empty file"}


def test_a_store_opens_its_images_again_only_if_they_are_the_same(tmp_path):
    from coreg.data.sources import open_images

    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "in" / name / "1.png")
    images = open_images(str(tmp_path / "in"), NAMES)
    writer = StoreWriter(tmp_path / "ann", manifest(images))
    writer.start(images)
    writer.write(0, evidence(2), {})
    writer.complete(images.paths)
    store = AnnotationStore.open(tmp_path / "ann")
    assert store.images().paths == images.paths and store.images().labels.tolist() == [0, 1]
    Image.new("RGB", (2, 2)).save(tmp_path / "in" / "cat" / "2.png")
    assert "held 2 images" in error_of(store.images)


# ---- several at once ------------------------------------------------------------------------------------------------


def start_at_once(root, images, barrier, results):
    """One of several processes that begin the same stores, one after the other, each time at the same moment."""
    files.os.fsync = lambda descriptor: None  # takes most of the time and changes nothing here
    for number in range(200):
        barrier.wait(120)
        try:
            StoreWriter(root / f"{number}" / "ann", manifest(images)).start(images)
        except BaseException as error:
            results.put(f"{number}: {error!r}")
    results.put("done")


@pytest.mark.multiprocess
def test_annotators_that_start_at_once_make_one_whole_store(tmp_path):
    fork, images = multiprocessing.get_context("fork"), image_list()
    barrier, results = fork.Barrier(3), fork.Queue()
    processes = [fork.Process(target=start_at_once, args=(tmp_path, images, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    outcomes = []
    while outcomes.count("done") < 3:
        outcomes.append(results.get(timeout=120))
    for process in processes:
        process.join(60)
    assert outcomes == ["done"] * 3
    write_store(tmp_path / "alone", images, skip=range(3), finish=False)
    wanted = {name: (tmp_path / "alone" / name).read_bytes() for name in os.listdir(tmp_path / "alone") if name != "blocks"}
    for number in range(200):
        assert os.listdir(tmp_path / str(number)) == ["ann"]
        root = tmp_path / str(number) / "ann"
        assert (root / "blocks").is_dir() and set(os.listdir(root)) == {"blocks", *wanted}
        assert all((root / name).read_bytes() == content for name, content in wanted.items())


def test_a_start_on_a_full_disk_leaves_nothing_and_a_folder_without_blocks_gets_them(tmp_path, monkeypatch):
    images = image_list()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert "No space left" in error_of(StoreWriter(tmp_path / "ann", manifest(images)).start, images)
    assert os.listdir(tmp_path) == []
    write_store(tmp_path / "ann", images, skip=range(3), finish=False)
    (tmp_path / "ann" / "blocks").rmdir()  # as an earlier version could leave it
    write_store(tmp_path / "ann", images)
    AnnotationStore.open(tmp_path / "ann")


def test_a_link_to_an_empty_folder_is_begun_in_and_what_killed_writers_left_is_removed(tmp_path):
    (tmp_path / "disk" / "ann").mkdir(parents=True)
    (tmp_path / "ann").symlink_to("disk/ann")
    dead = subprocess.Popen(["true"])
    dead.wait()
    token = "0" * 16
    left = [tmp_path / "disk" / f".tmp.{files.this_machine()}.{pid}.{token}.ann" for pid in (dead.pid, os.getpid())]
    left.append(tmp_path / "disk" / f".tmp.far.machine.7.{token}.ann")
    for folder in left:
        (folder / "blocks").mkdir(parents=True)
    write_store(tmp_path / "ann")
    assert (tmp_path / "ann").is_symlink() and len(AnnotationStore.open(tmp_path / "ann")) == 7
    assert [folder.exists() for folder in left] == [False, True, True]


@pytest.mark.parametrize("name", ["blocks/00001.safetensors", "errors.csv"])
def test_a_folder_in_the_place_of_a_file_is_left_to_the_person(tmp_path, name):
    images = image_list()
    write_store(tmp_path / "ann", images)
    (tmp_path / "ann" / "blocks" / "00000.safetensors").unlink()
    (tmp_path / "ann" / name).unlink()
    (tmp_path / "ann" / name).mkdir()
    writer = StoreWriter(tmp_path / "ann", manifest(images))
    with pytest.raises(UserError, match=f"{name} cannot be removed .*; remove it and run the same command again"):
        writer.discard_damaged()
