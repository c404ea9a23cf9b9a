"""Images inside tar files and saved data sets: the same pixels as the files that went in, and damage named in one line."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from runs import error_of

from coreg.data.decode import UnreadableImage
from coreg.data.sources import open_images

NAMES = ["cat", "dog"]


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members, mode="w", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def refused(spec, words):
    assert words in error_of(open_images, str(spec), NAMES)


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_file_is_read_in_place(tmp_path, style):
    members = [("b/dog/2.png", png(2)), ("b/CAT/1.png", png(1)), ("test/dog/3.PNG", png(3)), ("notes.txt", b"x")]
    long = "/".join(["directory"] * 9) + "/é.png"
    path = write_tar(tmp_path / "all.tar", [*members, (long, png(4)), ("./z.jpg", b"")], format=style)
    images = open_images(str(path), NAMES)
    assert images.paths == ["b/CAT/1.png", "b/dog/2.png", long, "test/dog/3.PNG", "z.jpg"]
    assert images.labels.tolist() == [0, 1, -1, 1, -1] and images.split.tolist() == [0, 0, 0, 1, 0]
    assert [images.load(row).getpixel((0, 0))[0] for row in range(4)] == [1, 2, 4, 3]
    with pytest.raises(UnreadableImage, match="empty file"):
        images.load(4)
    again = pickle.loads(pickle.dumps(images))  # for decoding processes
    assert again.load(1).getpixel((0, 0))[0] == 2 and open_images(images.spec).paths == images.paths


def test_webdataset_shards_give_labels_by_number_or_name(tmp_path):
    shards = tmp_path / "shards"
    write_tar(shards / "train-000.tar", [("a.png", png(1)), ("a.cls", b"1"), ("b.png", png(2)), ("b.cls", b"Cat\n")])
    write_tar(
        shards / "train-001.tar",
        [("a.cls", b"0"), ("a.png", png(3)), ("c.png", png(4)), ("d.png", png(5)), ("d.cls", b"9")],
    )
    write_tar(shards / "test-000.tar", [("a.png", png(6)), ("a.cls", b"1")])
    images = open_images(str(shards), NAMES)
    names = ["test-000.tar/a.png", "train-000.tar/a.png", "train-000.tar/b.png", "train-001.tar/a.png"]
    assert images.paths == [*names, "train-001.tar/c.png", "train-001.tar/d.png"]
    assert images.labels.tolist() == [1, 1, 0, 0, -1, -1] and images.split.tolist() == [1, 0, 0, 0, 0, 0]
    assert [images.load(row).getpixel((0, 0))[0] for row in range(6)] == [6, 1, 2, 3, 4, 5]
    assert open_images(str(shards)).labels is None
    (shards / "readme.png").write_bytes(png(1))  # now it is a folder like any other, with one image
    images = open_images(str(shards))
    assert images.paths == ["readme.png"]
    assert images.notes == ["images lie beside 3 .tar files, which are not opened: put either into a folder of its own"]


def test_what_img2dataset_writes_is_read_as_shards(tmp_path):
    """A .tar of KEY.jpg, KEY.txt and KEY.json, a .parquet and a _stats.json for each shard."""
    for number in range(2):
        members = [(f"{number}{i}.{kind}", png(i) if kind == "png" else b"x") for i in range(3) for kind in ("json", "png")]
        write_tar(tmp_path / f"{number:05d}.tar", members)
        (tmp_path / f"{number:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{number:05d}_stats.json").write_text("{}")
    images = open_images(str(tmp_path))
    assert images.paths == [f"{number:05d}.tar/{number}{i}.png" for number in range(2) for i in range(3)]
    assert images.load(4).getpixel((0, 0))[0] == 1
    assert images.notes == ["passed over: 8 .json, 2 .parquet"]
    assert open_images(images.spec).paths == images.paths


def test_shards_and_folders_in_them_say_the_split(tmp_path):
    for name in ("set-train-0.tar", "set-val-0.tar", "plain.tar"):
        write_tar(tmp_path / name, [("test/1.png", png(1)), ("2.png", png(2))])
    images = open_images(str(tmp_path))
    split_of = dict(zip(images.paths, images.split.tolist()))
    assert split_of == {
        "plain.tar/test/1.png": 1, "plain.tar/2.png": 0, "set-train-0.tar/test/1.png": 1, "set-train-0.tar/2.png": 0,
        "set-val-0.tar/test/1.png": 1, "set-val-0.tar/2.png": 1,
    }  # fmt: skip
    assert any("'set-val-0.tar' is test (there is no other)" in note for note in images.notes)
    write_tar(tmp_path / "test-0.tar", [("3.png", png(3))])
    images = open_images(str(tmp_path))
    assert images.split[list(images.paths).index("set-val-0.tar/2.png")] == 2
    assert any("'set-val-0.tar' is held out" in note for note in images.notes)


def test_a_pipe_called_like_a_shard_does_not_block(tmp_path):
    write_tar(tmp_path / "0.tar", [("1.png", png(1))])
    os.mkfifo(tmp_path / "1.tar")
    assert open_images(str(tmp_path)).paths == ["0.tar/1.png"]


def test_what_is_no_regular_member_is_listed_and_says_so(tmp_path):
    path = tmp_path / "all.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [("link.png", tarfile.SYMTYPE), ("pipe.png", tarfile.FIFOTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for shade in (1, 2):  # a member that was added again counts as tar counts it: the last
            info = tarfile.TarInfo("a.png")
            info.size = len(png(shade))
            archive.addfile(info, io.BytesIO(png(shade)))
    images = open_images(str(path))
    assert images.paths == ["a.png", "link.png", "pipe.png"] and images.load(0).getpixel((0, 0))[0] == 2
    for row in (1, 2):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            images.load(row)


def test_archives_that_cannot_be_used_are_one_line(tmp_path):
    members = [("a.png", png(1)), ("b.png", np.random.default_rng(0).bytes(5000))]
    refused(write_tar(tmp_path / "packed.tar.gz", members, "w:gz"), "is compressed")
    refused(write_tar(tmp_path / "none.tar", [("notes.txt", b"x")]), "holds no image")
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:4000])
    refused(tmp_path / "cut.tar", "cut.tar cannot be read as a tar file")
    (tmp_path / "text.tar").write_text("this is no archive" * 100)
    refused(tmp_path / "text.tar", "cannot be read as a tar file")
    (tmp_path / "empty.tar").write_bytes(b"")
    refused(tmp_path / "empty.tar", "empty.tar")


def test_a_saved_data_set_needs_its_library(tmp_path, monkeypatch):
    import sys

    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tmp_path, "pip install datasets")


def test_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(
        {"id": datasets.Value("int32"), "img": datasets.Image(), "y": datasets.ClassLabel(names=["dog", "cat"])}
    )

    def part(shades, labels):
        cells = [None if shade is None else {"bytes": png(shade), "path": None} for shade in shades]
        return datasets.Dataset.from_dict({"id": list(range(len(shades))), "img": cells, "y": labels}, features=kinds)

    parts = {"train": part([1, 2, None], [0, 1, -1]), "test": part([3], [1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    validated = datasets.DatasetDict({"train": parts["train"], "validation": parts["test"]})
    validated.save_to_disk(tmp_path / "validated")
    images = open_images(str(tmp_path / "validated"))
    assert images.split.tolist() == [0, 0, 0, 1]
    assert images.notes == ["splits: 'train' is train, 'validation' is test (there is no other)"]
    images = open_images(str(tmp_path / "both"), NAMES)
    assert images.paths == ["test/00000000", "train/00000000", "train/00000001", "train/00000002"]
    assert images.labels.tolist() == [0, 1, 0, -1] and images.split.tolist() == [1, 0, 0, 0]
    assert images.class_names == ["dog", "cat"] and open_images(images.spec).labels.tolist() == [1, 0, 1, -1]
    assert [images.load(row).getpixel((0, 0))[0] for row in range(3)] == [3, 1, 2]
    with pytest.raises(UnreadableImage, match="no image in this row"):
        images.load(3)
    assert pickle.loads(pickle.dumps(images)).load(2).getpixel((0, 0))[0] == 2
    parts["train"].save_to_disk(tmp_path / "one")
    assert open_images(str(tmp_path / "one")).paths[0] == "train/00000000"
    parts["train"].remove_columns("img").save_to_disk(tmp_path / "none")
    refused(tmp_path / "none", "no column of images")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"junk")
    refused(tmp_path / "one", "cannot be read by datasets")
