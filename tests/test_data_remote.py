"""Shards at URLs: the images that lie in a folder here, read by range, whatever their store does."""

import io
import logging
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_JOB
from object_store import FaultyProxy, Hub, WebServer
from PIL import Image
from runs import error_of, refused
from test_annotate_annotators import save_tiny_clip

import annotate_vlm
import train_coreg
from coreg.config import as_settings
from coreg.data import parquet, remote
from coreg.data.decode import UnreadableImage
from coreg.data.ranges import numbered
from coreg.data.sources import open_images
from coreg.settings import JobConfig
from coreg.store.store import AnnotationStore
from coreg.weak.__main__ import main as draw_sets

fsspec, pq = pytest.importorskip("fsspec"), pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402

NAMES = ["cat", "dog"]
SECRET = "X-Signature=5up3rs3cret"


def png(number):
    """An image of its own for every number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tar(numbers, extra=()):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        members = [(f"{i:02d}.png", png(i)) for i in numbers] + [(f"{i:02d}.cls", b"%d" % (i % 2)) for i in numbers]
        for name, content in [*members, *extra]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def table(columns, metadata=None, **options):
    file = io.BytesIO()
    made = pa.table(columns)
    pq.write_table(made.replace_schema_metadata(metadata) if metadata else made, file, **options)
    return file.getvalue()


def cells(numbers):
    return pa.array([None if i is None else {"bytes": png(i), "path": f"{i}.png"} for i in numbers])


TARS = {f"{shard:03d}.tar": tar(range(10 * shard, 10 * shard + 10)) for shard in range(3)}
PARQUETS = {
    f"{split}-0000{i}.parquet": table({"image": cells(numbers), "label": [n % 2 for n in numbers]}, row_group_size=3)
    for split, i, numbers in (("train", 0, range(7)), ("train", 1, range(10, 14)), ("test", 0, range(20, 25)))
}


@pytest.fixture(autouse=True)
def anew(tmp_path, monkeypatch):
    """Nothing is remembered from the test before; no test waits long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.02))
    remote._lost.clear()
    remote._blocks.forget()
    parquet._groups.forget()


@pytest.fixture
def web():
    server = WebServer(TARS | PARQUETS)
    yield server
    server.close()


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket in a store of its own on this machine."""
    server_of, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-5up3rs3cret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patched.setenv(name, value)
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        for folder, files in (("tars", TARS), ("tables", PARQUETS)):
            for name, content in files.items():
                system.pipe(f"bucket/{folder}/{name}", content)
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Folders with the same shards on the disk."""
    root = tmp_path_factory.mktemp("shards")
    for folder, files in (("tars", TARS), ("tables", PARQUETS)):
        (root / folder).mkdir()
        for name, content in files.items():
            (root / folder / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def pixels_of(images, rows=None):
    return [np.asarray(images.load(row)).tobytes() for row in (range(len(images)) if rows is None else rows)]


def raw(numbers):
    return [np.asarray(Image.open(io.BytesIO(png(number)))).tobytes() for number in numbers]


# ---- lists ----------------------------------------------------------------------------------------------------------


def test_numbers_in_braces():
    assert numbered("a.tar") == ["a.tar"]
    assert numbered("a{8..11}.tar") == ["a8.tar", "a9.tar", "a10.tar", "a11.tar"]
    assert numbered("{08..11}") == ["08", "09", "10", "11"] and numbered("{000..1}") == ["000", "001"]
    assert numbered("{0..1}/{3..4}.tar") == ["0/3.tar", "0/4.tar", "1/3.tar", "1/4.tar"]
    assert numbered("{a,b}{1..}.tar") == ["{a,b}{1..}.tar"]
    assert "stands for 0 files" in error_of(numbered, "{3..1}.tar")
    assert "stands for 10000000 files" in error_of(numbered, "{0..9999999}.tar")


@pytest.mark.parametrize("kind", ["s3", "s3 folder", "memory", "file", "pattern", "https"])
def test_a_list_is_that_of_the_same_files_in_a_folder(kind, s3, here, web):
    alone = open_images(str(here / "tars"), NAMES)
    assert pixels_of(alone) == raw(range(30)) and alone.labels.tolist() == [i % 2 for i in range(30)]
    if kind == "memory":
        for name, content in TARS.items():
            fsspec.filesystem("memory").pipe(f"/set/{name}", content)
    spec = {
        "s3": f"{s3}/tars/{{000..002}}.tar", "s3 folder": f"{s3}/tars", "memory": "memory://set/{000..002}.tar",
        "file": f"file://{here}/tars", "pattern": f"{here}/tars/{{000..002}}.tar", "https": web.url + "/{000..002}.tar",
    }[kind]  # fmt: skip
    images = open_images(spec, NAMES)
    assert images.spec == spec and images.paths == alone.paths and images.labels.tolist() == alone.labels.tolist()
    assert pixels_of(images) == raw(range(30))
    again = pickle.loads(pickle.dumps(images))  # for decoding processes
    assert pixels_of(again, [29, 0]) == raw([29, 0])
    one = open_images(spec.replace("{000..002}", "001") if "{" in spec else f"{spec}/001.tar", NAMES)
    assert one.paths == [f"{i:02d}.png" for i in range(10, 20)] and pixels_of(one, [3]) == raw([13])


def test_shards_in_several_folders_keep_them_and_say_the_split(s3):
    import s3fs

    for place, number in (("train/0.tar", 0), ("train/1.tar", 1), ("test/0.tar", 2)):
        s3fs.S3FileSystem().pipe(f"bucket/split/{place}", TARS[f"{number:03d}.tar"])
    images = open_images(f"{s3}/split/", NAMES)
    assert images.paths[0] == "test/0.tar/20.png" and images.paths[29] == "train/1.tar/19.png"
    assert images.split.tolist() == [1] * 10 + [0] * 20 and pixels_of(images, [0, 29]) == raw([20, 19])
    joined = open_images(f'joined:["{s3}/split/train/0.tar", "{s3}/tars/001.tar"]', NAMES)
    assert pixels_of(joined, [0, 19]) == raw([0, 19])


@pytest.mark.parametrize("kind", ["folder", "s3", "https"])
def test_parquet_files_by_row_group(kind, s3, here, web):
    spec = {"folder": f"{here}/tables", "s3": f"{s3}/tables/", "https": f"{web.url}/train-{{00000..00001}}.parquet"}[kind]
    images = open_images(spec, NAMES)
    numbers = [*([] if kind == "https" else range(20, 25)), *range(7), *range(10, 14)]
    assert images.labels.tolist() == [number % 2 for number in numbers]
    assert images.split.tolist() == [int(number >= 20) for number in numbers]
    assert images.paths[-1] == "train-00001.parquet/00000003" and images.spec.rstrip("/") == spec.rstrip("/")
    assert pixels_of(images) == raw(numbers)
    assert pixels_of(pickle.loads(pickle.dumps(images)), [4, 0]) == raw([numbers[4], numbers[0]])


def test_a_data_set_of_a_hub_is_streamed(monkeypatch):
    hub = Hub({f"data/{name}": content for name, content in PARQUETS.items()} | {"README.md": b"x"})
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url})
    try:
        images = open_images("hf://datasets/me/set", NAMES)
        numbers = [*range(20, 25), *range(7), *range(10, 14)]
        assert images.paths[0] == "test-00000.parquet/00000000" and pixels_of(images) == raw(numbers)
        parquet._groups.forget()
        remote._blocks.forget()
        hub.files["data/test-00000.parquet"] = PARQUETS["train-00001.parquet"]
        assert "was changed since it was listed" in error_of(images.load, 0)
        assert "cannot list hf://datasets/me/other" in error_of(open_images, "hf://datasets/me/other")
    finally:
        hub.close()


def test_columns_of_parquet_files(tmp_path, monkeypatch):
    def images_of(columns, names=NAMES, metadata=None):
        (tmp_path / "x.parquet").write_bytes(table(columns, metadata))
        return open_images(str(tmp_path / "x.parquet"), names)

    plain = images_of({"jpg": [png(1), None, b"x"], "class": ["Dog", "cow", None]})
    assert plain.paths == ["00000000", "00000001", "00000002"] and plain.labels.tolist() == [1, -1, -1]
    assert pixels_of(plain, [0]) == raw([1])
    for row, reason in ((1, "no image in this row"), (2, "not an image of a known format")):
        with pytest.raises(UnreadableImage, match=reason):
            plain.load(row)
    about = b'{"info": {"features": {"photo": {"_type": "Image"}, "y": {"_type": "ClassLabel", "names": ["dog", "cat"]}}}}'
    named = {"thumbnail": [b"x", b"x"], "photo": cells([1, None]), "y": [0, 1], "label": [0, 0]}
    images = images_of(named, metadata={b"huggingface": about})
    assert images.class_names == ["dog", "cat"] and images.labels.tolist() == [1, 0] and pixels_of(images, [0]) == raw([1])
    assert images_of(named, None, {b"huggingface": about}).labels.tolist() == [0, 1]
    assert images_of({"image": [png(1)], "label": [7]}).labels is None
    assert "no column of encoded images (a)" in error_of(images_of, {"a": [1]})
    assert "several columns of encoded images (a, b)" in error_of(images_of, {"a": [b"x"], "b": [b"x"]})
    os.mkfifo(tmp_path / "pipe.parquet")  # at which a reader would wait
    assert "it is no file" in error_of(open_images, str(tmp_path / "pipe.parquet"))
    assert "holds no row" in error_of(images_of, {"image": pa.array([], pa.binary())})
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 100)
    assert "row groups of" in error_of(images_of, {"image": [png(1)]})


def test_a_damaged_shard_among_others_is_one_unreadable_image(tmp_path):
    whole = TARS["000.tar"]
    for name, content in {"a.tar": whole, "b.tar": b"junk" * 999, "c.tar": whole[:3000]}.items():
        (tmp_path / name).write_bytes(content)
    images = open_images(str(tmp_path), NAMES)
    assert images.paths == [f"a.tar/{i:02d}.png" for i in range(10)] + ["b.tar", "c.tar"]
    assert images.labels.tolist()[8:] == [0, 1, -1, -1]
    assert images.notes == [
        f"2 of 3 files cannot be read (the first, {tmp_path}/b.tar cannot be read as a tar file: invalid header)"
    ]
    with pytest.raises(UnreadableImage, match=r"c\.tar cannot be read as a tar file"):
        images.load(11)
    (tmp_path / "x").mkdir()
    for name, content in {"a.parquet": PARQUETS["test-00000.parquet"], "b.parquet": b"PAR1junk"}.items():
        (tmp_path / "x" / name).write_bytes(content)
    images = open_images(str(tmp_path / "x"), NAMES)
    assert images.paths[4:] == ["a.parquet/00000004", "b.parquet"] and "1 of 2 files" in images.notes[0]
    with pytest.raises(UnreadableImage, match="as a parquet file"):
        images.load(5)


def test_what_is_not_there_or_not_installed_is_one_line(s3, web, tmp_path, monkeypatch):
    missing = open_images(f"{s3}/tars/{{002..003}}.tar")
    assert missing.paths[-1] == "003.tar" and "003.tar cannot be read (no such file)" in missing.notes[0]
    for spec, words in {
        f"{s3}/tars/{{007..009}}.tar": "s3://bucket/tars/007.tar cannot be read (no such file); give the place",
        f"{s3}/nothing": "there is no .tar and no .parquet file in s3://bucket/nothing",
        "s3://nobody/set": "cannot list s3://nobody/set",
        f"{web.url}/x.tar.gz": "is compressed",
        f"{web.url}/x{{0..1}}.zip": "names files of several kinds, or of none",
        "nope://x.tar": "nope://x.tar cannot be opened (Protocol not known: nope)",
        str(tmp_path / "no.parquet"): "cannot be read",
    }.items():
        assert words in error_of(open_images, spec)
    for module, spec, words in (
        (
            "gcsfs",
            "gs://x/y.tar",
            "gs://x/y.tar needs gcsfs, which is not installed: pip install gcsfs (all that URLs need is ",
        ),
        ("aiohttp", "http://127.0.0.1/y.tar", "needs aiohttp, which is not installed"),
        (
            "fsspec",
            "s3://x/y.tar",
            "needs fsspec, which is not installed: pip install fsspec (all that URLs need is the extra",
        ),
        ("pyarrow.parquet", "y.parquet", "needs pyarrow, which is not installed: pip install pyarrow (the extra `data`)"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            assert words in error_of(open_images, spec)


# ---- reading --------------------------------------------------------------------------------------------------------


def content_asked(web):
    """Bytes of content that the server was asked for, by file."""
    counts = {}
    for method, name, span in web.asked:
        if method == "GET":
            first, last = span.removeprefix("bytes=").split("-")
            counts[name] = counts.get(name, 0) + int(last) + 1 - int(first)
    return counts


def test_a_shard_is_read_by_range_and_its_index_is_kept(web, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2048)
    web.files["000.tar"] = tar(range(10), [("big.bin", bytes(1 << 20))])
    open_images(f"{web.url}/000.tar")
    assert content_asked(web)["000.tar"] < 40_000  # of a megabyte; what is no header is passed over
    remote._blocks.forget()
    web.asked.clear()
    images = open_images(f"{web.url}/000.tar")
    assert not content_asked(web)  # the index is there
    assert pixels_of(images, [3, 4]) == raw([3, 4]) and content_asked(web)["000.tar"] <= 3 * 2048
    kept = next(Path(os.environ["XDG_CACHE_HOME"]).rglob("shards/*"))
    kept.write_bytes(kept.read_bytes()[:-1])
    assert open_images(f"{web.url}/000.tar").paths == images.paths and content_asked(web)["000.tar"] > 3 * 2048
    web.files["000.tar"] = TARS["001.tar"]  # another version has an index of its own
    assert open_images(f"{web.url}/000.tar").paths == [f"{i:02d}.png" for i in range(10, 20)]


def test_a_row_group_is_read_once_and_no_other(web, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1 << 16)
    noise = [np.random.default_rng(i).bytes(100_000) for i in range(30)]
    web.files["x.parquet"] = table({"image": noise}, row_group_size=10)
    images = open_images(f"{web.url}/x.parquet")
    assert content_asked(web)["x.parquet"] < 200_000
    for row in range(10, 20):
        with pytest.raises(UnreadableImage, match="known format"):
            images.load(row)
    assert 1_000_000 < content_asked(web)["x.parquet"] < 1_200_000


@pytest.mark.parametrize("names", [list(TARS), ["train-00000.parquet", "train-00001.parquet"]])
def test_what_passes_does_not_matter(web, names):
    spec = f"{web.url}/{{000..002}}.tar" if len(names) == 3 else f"{web.url}/train-{{00000..00001}}.parquet"
    whole = pixels_of(open_images(spec))
    remote._blocks.forget()
    parquet._groups.forget()
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]), ignore_errors=True)
    web.faults = dict(zip(names, (["cut", 500], ["slow", 503, "cut"], [429])))
    images = open_images(spec)
    web.faults |= dict(zip(names, ([500, "slow"], ["cut", 500], [503])))
    remote._blocks.forget()
    assert pixels_of(images) == whole


def test_a_shard_is_lost_alone_and_a_store_as_a_whole(web):
    images = open_images(f"{web.url}/{{000..002}}.tar")
    remote._blocks.forget()
    web.broken.add("001.tar")
    with pytest.raises(UnreadableImage, match=r"^001\.tar: .*500"):
        images.load(10)
    count = len(web.asked)
    with pytest.raises(UnreadableImage, match="500"):
        images.load(11)
    assert len(web.asked) == count  # it is remembered
    assert pixels_of(images, [0, 29]) == raw([0, 29])
    remote._lost.clear()
    remote._blocks.forget()
    web.down = True
    assert f"cannot read {web.url}/000.tar: " in error_of(images.load, 0)
    assert f"cannot read {web.url}/001.tar: " in error_of(images.load, 10)
    web.down = False
    web.broken.clear()
    assert pixels_of(images) == raw(range(30))  # nothing of it stays
    alone = open_images(f"{web.url}/000.tar")
    remote._blocks.forget()
    web.broken.add("000.tar")  # nobody knows whether it is the store
    assert "when it can be read again, run the same command again" in error_of(alone.load, 0)


def test_a_parquet_file_is_lost_alone_and_a_store_as_a_whole(web):
    images = open_images(f"{web.url}/train-{{00000..00001}}.parquet")
    parquet._groups.forget()
    remote._blocks.forget()
    web.broken.add("train-00001.parquet")
    with pytest.raises(UnreadableImage, match=r"^train-00001\.parquet: .*500"):
        images.load(10)
    assert pixels_of(images, [6]) == raw([6])
    parquet._groups.forget()
    remote._blocks.forget()
    web.down = True
    assert f"cannot read {web.url}/train-00000.parquet: " in error_of(images.load, 6)


def test_a_changed_file_is_one_line(web):
    images = open_images(f"{web.url}/{{000..002}}.tar")
    remote._blocks.forget()
    web.files["000.tar"] = tar(range(3))
    words = f"000.tar was changed since it was listed ({len(tar(range(3)))} bytes instead of {len(TARS['000.tar'])})"
    assert words in error_of(images.load, 0)
    remote._blocks.forget()
    web.files["000.tar"] = b""  # so that there is nothing at that range, which an error says
    assert f"(0 bytes instead of {len(TARS['000.tar'])})" in error_of(images.load, 0)
    changed = bytearray(TARS["001.tar"])
    changed[-1] ^= 1  # where no image is
    web.files["001.tar"] = bytes(changed)
    assert "another version of it" in error_of(images.load, 10)


def test_a_server_that_knows_no_ranges_is_one_line(web, monkeypatch):
    images = open_images(f"{web.url}/000.tar")
    remote._blocks.forget()
    monkeypatch.setattr(remote, "BLOCK_BYTES", 2048)
    web.faults["000.tar"] = ["whole"]
    assert "000.tar is served whole, not by range" in error_of(images.load, 0)


# ---- annotating and training ----------------------------------------------------------------------------------------


def annotated(clip, images, output, *more):
    (output.parent / "classes.txt").write_text("cat\ndog\n")
    words = ["--images", images, "--vlm", f"local-dir:{clip}", "--classes", output.parent / "classes.txt"]
    annotate_vlm.main([str(word) for word in (*words, "--output_dir", output, "--block_size", 7, "--batch_size", 5, *more)])
    return AnnotationStore.open(output)


def blocks_of(store):
    return {path.name: path.read_bytes() for path in (store.root / "blocks").iterdir()}


def test_annotation_of_a_bucket_is_that_of_a_folder(s3, here, clip, tmp_path, capsys):
    local = annotated(clip, here / "tars", tmp_path / "local", "--workers", 0)
    there = annotated(clip, f"{s3}/tars/{{000..002}}.tar", tmp_path / "there", "--workers", 1)
    assert blocks_of(there) == blocks_of(local) and there.hash == local.hash
    assert there.images_spec == "s3://bucket/tars/{000..002}.tar" and there.images().load(0)
    written = (
        b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) + capsys.readouterr().out.encode()
    )
    assert b"5up3rs3cret" not in written
    moved = annotated(clip, f"{s3}/tars", tmp_path / "there")  # the same job in another place
    assert moved.images_spec == "s3://bucket/tars" and moved.hash == local.hash


@pytest.mark.slow
def test_a_bucket_that_fails_now_and_then_is_annotated_the_same(s3, here, clip, tmp_path, monkeypatch):
    """A third of all answers is an error, ends in the middle, or comes late."""
    import s3fs

    local = annotated(clip, here / "tars", tmp_path / "local", "--workers", 0)
    proxy = FaultyProxy(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"), 1 / 3)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
        monkeypatch.setattr(remote, "WAITS", (0.01,) * 20)
        s3fs.S3FileSystem.clear_instance_cache()
        there = annotated(clip, f"{s3}/tars/{{000..002}}.tar", tmp_path / "there", "--workers", 2)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.close()
    assert set(proxy.spoiled) == {500, "cut", "late"}
    assert blocks_of(there) == blocks_of(local) and there.hash == local.hash


def test_images_of_a_lost_shard_are_remembered(web, here, clip, tmp_path):
    whole = annotated(clip, here / "tars", tmp_path / "local", "--workers", 0)
    open_images(f"{web.url}/{{000..002}}.tar")  # the index is there
    remote._blocks.forget()
    web.faults["001.tar"] = [500] * 1000
    store = annotated(clip, f"{web.url}/{{000..002}}.tar", tmp_path / "there", "--workers", 1)
    assert np.flatnonzero(store.unreadable).tolist() == list(range(10, 20))
    lines = (store.root / "errors.csv").read_text().splitlines()
    assert len(lines) == 11 and lines[1].startswith("001.tar/10.png,") and "500" in lines[1]
    readable = ~store.unreadable
    assert (store.votes()[readable] == whole.votes()[readable]).all()
    assert (store.features()[readable] == whole.features()[readable]).all()


def test_a_changed_shard_stops_annotation_and_what_is_done_is_kept(web, here, clip, tmp_path, capsys, monkeypatch):
    spec = f"{web.url}/{{000..002}}.tar"
    write, before = annotate_vlm.StoreWriter.write, web.files["002.tar"]

    def write_then_change(self, index, *rest):
        write(self, index, *rest)
        web.files["002.tar"] = TARS["001.tar"]

    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    words = ["--images", spec, "--vlm", f"local-dir:{clip}", "--classes", tmp_path / "classes.txt", "--workers", 1]
    words += ["--output_dir", tmp_path / "ann", "--block_size", 4, "--batch_size", 4]
    with monkeypatch.context() as patched:
        patched.setattr(annotate_vlm.StoreWriter, "write", write_then_change)
        patched.setattr(remote, "BLOCK_BYTES", 2048)
        line = refused(capsys, annotate_vlm.main, *words)
    assert "002.tar was changed since it was listed (another version of it)" in line
    kept = blocks_of_folder(tmp_path / "ann")
    assert kept and "of another job: images" in refused(capsys, annotate_vlm.main, *words)
    web.files["002.tar"] = before
    annotate_vlm.main([str(word) for word in words])
    store = AnnotationStore.open(tmp_path / "ann")
    assert not store.unreadable.any() and kept.items() <= blocks_of(store).items()


def blocks_of_folder(root):
    return {path.name: path.read_bytes() for path in (root / "blocks").glob("*.safetensors")}


def test_credentials_open_a_store_and_are_written_nowhere(web, tmp_path, capsys):
    web.key = SECRET
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    job = [
        "--classes", tmp_path / "classes.txt", "--rule", "flip", "--q", "0.3", "--eta", "0.2", "--output_dir",
        tmp_path / "ann",
    ]  # fmt: skip
    signed = f"{web.url}/{{000..002}}.tar?{SECRET}"
    for spec in (f"{web.url}/000.tar?wrong-{SECRET}", f"http://user:5up3rs3cret@{web.place}1/000.tar"):
        line = refused(capsys, draw_sets, "--images", spec, *job)
        assert "/000.tar cannot be read" in line and "s3cret" not in line
    draw_sets([str(word) for word in ("--images", signed, *job)])
    train = [
        "--annotations", tmp_path / "ann", "--output_dir", tmp_path / "run", *SMALL_JOB, "--epochs", 1, "--pixels", "disk",
    ]  # fmt: skip
    assert "403" in refused(capsys, train_coreg.main, *train)
    train_coreg.main([str(word) for word in (*train, "--images", signed)])
    (pixels,) = (tmp_path / "ann" / "pixels").glob("*/pixels.u8")
    assert pixels.stat().st_size == 30 * 12 * 12 * 3
    rows = pixels.read_bytes()
    assert [rows[i * 432 : (i + 1) * 432] for i in range(30)] == [
        np.frombuffer(one, np.uint8).reshape(12, 12, 3).transpose(2, 0, 1).tobytes() for one in raw(range(30))
    ]
    printed = capsys.readouterr()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any(web.place.encode() in content for content in written.values())
    assert not [path for path, content in written.items() if b"s3cret" in content]
    assert "s3cret" not in printed.out + printed.err


def test_the_settings_that_are_written_have_no_credentials():
    job = JobConfig(images="https://me:secret@host/a.tar?key=secret")
    assert as_settings(job)["images"] == "https://host/a.tar" and "secret" not in str(as_settings(job))
