"""Decoded images on the device, in shared memory and on the disk: the same training, decoded once, read ahead."""

import ctypes
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from runs import final_state, killed_at, refused, same_curves, script

import coreg.store.pixels as stored_pixels
import train_coreg
from coreg.annotate.work import Progress, work
from coreg.data.decode import UnreadableImage, as_square, decode
from coreg.data.images import ImageList
from coreg.data.pixels import StoredPixels
from coreg.data.sources import open_images
from coreg.errors import UserError
from coreg.run.loop import Run
from coreg.store.__main__ import main as store_command
from coreg.store.claims import BlockQueue
from coreg.store.pixels import PixelWriter, folder_name, make_manifest, start_folder
from coreg.views import ahead
from coreg.views.ahead import ReadAhead
from coreg.views.order import ShuffledRows
from coreg.weak.__main__ import main as draw_sets
from coreg.webpage import picture_of

NONE = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """150 small images, of which two cannot be read."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(150):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(root / f"{i:03d}.png")
    (root / "070.png").write_bytes(b"")
    (root / "149.png").write_text("no image")
    return root


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 images of 8x8 pixels, three of 150: the smallest that end with a page."""
    monkeypatch.setattr(stored_pixels, "BLOCK_BYTES", 1)


def built(images, root, wanted=NONE, decode=PixelWriter.decode_block):
    """The folder of these images, finished as one process does it."""
    manifest = make_manifest(images, 8, 1, "squash")
    start_folder(root, manifest, images, wanted)
    writer = PixelWriter(root, manifest)
    if not writer.finished:
        with BlockQueue(writer.root, writer.files) as queue:
            progress = Progress(queue, writer, shown=False)
            work(
                queue,
                writer,
                lambda blocks, _: ((i, *decode(writer, images, i, 1)) for i in blocks),
                progress,
                images.paths,
            )
        writer.complete(images.paths)
    return writer


def contents(root):
    return {path.name: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---- one file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (7, 50), (101, 8)])
@pytest.mark.parametrize("side", [8, 15])
def test_resize_and_crop_are_those_of_torchvision(size, side):
    from torchvision.transforms import v2

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    clip = v2.Compose([v2.Resize(side, v2.InterpolationMode.BILINEAR), v2.CenterCrop(side)])
    assert np.array_equal(np.asarray(as_square(image, side, 3, "crop")), np.asarray(clip(image)))
    squashed = image.resize((side, side), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(as_square(image, side, 3, "squash")), np.asarray(squashed))


def test_the_file_holds_what_decoding_gives(photos, tmp_path, small_blocks):
    images, failed = open_images(str(photos)), {}
    writer = built(images, tmp_path / "px")
    pixels = decode(images, np.arange(150), 8, 1, 1, failed).numpy()
    assert len(writer.files) == 3 and writer.finished
    assert np.array_equal(np.fromfile(tmp_path / "px" / "pixels.u8", np.uint8).reshape(pixels.shape), pixels)
    stored, errors = writer.open()
    assert errors == failed and set(errors) == {70, 149} and not pixels[70].any()
    rows = np.array([0, 1, 2, 63, 64, 100, 149])
    read = np.empty((7, 1, 8, 8), np.uint8)
    stored.read(rows, read)
    assert np.array_equal(read, pixels[rows])


def test_a_later_run_decodes_a_few_images_and_not_all(photos, tmp_path, small_blocks):
    images, loaded = open_images(str(photos)), []
    built(images, tmp_path / "px")
    counted = ImageList(
        images.spec, images.paths, None, images.split, None, lambda row: loaded.append(row) or images.load(row)
    )
    built(counted, tmp_path / "px")
    assert 0 < len(loaded) <= 8


def test_other_images_of_the_same_names_are_noticed(photos, tmp_path, small_blocks):
    built(open_images(str(photos)), tmp_path / "px")
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    for path in other.glob("*.png"):
        if path.name not in ("070.png", "149.png"):
            Image.new("RGB", (9, 9), (200, 10, 30)).save(path)
    with pytest.raises(UserError, match=r"holds other pixels of .*\(another set of the same names"):
        start_folder(tmp_path / "px", make_manifest(open_images(str(other)), 8, 1, "squash"), open_images(str(other)), NONE)


def test_an_image_that_is_wanted_and_could_not_be_read_is_tried_again(photos, tmp_path, small_blocks):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    images = open_images(str(folder))
    built(images, tmp_path / "px")
    Image.new("RGB", (8, 8), (7, 7, 7)).save(folder / "070.png")
    writer = built(images, tmp_path / "px")
    assert set(writer.open()[1]) == {70, 149}  # nobody asks for it
    writer = built(images, tmp_path / "px", wanted=np.array([3, 70]))
    stored, errors = writer.open()
    pixels = np.empty((1, 1, 8, 8), np.uint8)
    stored.read(np.array([70]), pixels)
    assert set(errors) == {149} and (pixels == 7).all()


def test_names_differ_where_pixels_may(photos, tmp_path):
    images = open_images(str(photos))
    manifests = [
        make_manifest(images, *how) for how in ((8, 1, "squash"), (9, 1, "squash"), (8, 3, "squash"), (8, 1, "crop"))
    ]
    part = ImageList(images.spec, images.paths[:149], None, images.split[:149], None, images.pixels)
    digits = ImageList("builtin:digits", images.paths, None, images.split, None, images.pixels)
    manifests += [make_manifest(one, 8, 1, "squash") for one in (part, digits)]
    assert len({folder_name(manifest) for manifest in manifests}) == 6
    assert folder_name(manifests[0]).startswith("8x8x1-squash-")


def test_damage_is_one_line_or_mended(photos, tmp_path, small_blocks):
    images, root = open_images(str(photos)), tmp_path / "px"
    writer = built(images, root)
    whole = contents(root)
    with (root / "pixels.u8").open("r+b") as file:
        file.seek(64 * 65 + 3)
        file.write(bytes([255 - whole["pixels.u8"][64 * 65 + 3]]))
    stored, _ = writer.open()
    stored.read(np.array([64]), np.empty((1, 1, 8, 8), np.uint8))
    with pytest.raises(UserError, match=rf"pixels.u8 is damaged \(image 65\); type python -m coreg.store delete {root}"):
        stored.read(np.array([64, 65]), np.empty((2, 1, 8, 8), np.uint8))
    os.truncate(root / "pixels.u8", 64 * 100)
    with pytest.raises(UserError, match=r"pixels.u8 is damaged \(image 100\)"):
        stored.read(np.array([100]), np.empty((1, 1, 8, 8), np.uint8))
    assert contents(built(images, root).root) == whole  # shorter than it has to be: nothing in it is believed
    record = root / "blocks" / "00001.safetensors"
    record.write_bytes(record.read_bytes()[:-1])
    lines = start_folder(root, make_manifest(images, 8, 1, "squash"), images, NONE)
    assert len(lines) == 1 and lines[0].startswith("00001.safetensors") and not PixelWriter(root, writer.manifest).finished
    assert contents(built(images, root).root) == whole


def test_a_full_disk_is_one_line_and_keeps_what_is_there(photos, tmp_path, small_blocks, monkeypatch):
    images, root = open_images(str(photos)), tmp_path / "px"
    manifest = make_manifest(images, 8, 1, "squash")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
        with pytest.raises(UserError, match=r"150 decoded images take 0.0 MB in .*px, and for .* the disk has 0.0 MB left"):
            start_folder(root, manifest, images, NONE)
        assert not root.exists() and not list(tmp_path.iterdir())
    write, calls = os.pwrite, []

    def full(descriptor, content, offset):
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(
            UserError, match=r"cannot write .*pixels.u8 \(No space left on device\), .* run the same command"
        ):
            built(images, root)
    assert [file.exists() for file in PixelWriter(root, manifest).files] == [True, False, False]
    assert contents(built(images, root).root) == contents(built(images, tmp_path / "alone").root)


def decoding(photos, root, pause, made=None):
    """A process that decodes what it can claim, some time an image; `made` gets the number of every block it writes."""

    def run():
        images = open_images(str(photos))
        load = images.pixels
        images.pixels = lambda row: (time.sleep(pause), load(row))[1]

        def decode(writer, images, index, workers):
            record = writer.decode_block(images, index, workers)
            made.put(index)
            return record

        built(images, root, decode=decode)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_two_jobs_decode_together_and_one_that_is_killed_leaves_whole_blocks(photos, tmp_path, small_blocks):
    alone = contents(built(open_images(str(photos)), tmp_path / "alone").root)
    made = multiprocessing.get_context("fork").SimpleQueue()
    killed = decoding(photos, tmp_path / "px", 0.03, made)
    assert made.get() == 0
    first, until = tmp_path / "px" / "blocks" / "00000.safetensors", time.monotonic() + 60
    while not first.exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(60)
    assert [path.name for path in first.parent.glob("*.safetensors")] == [first.name]
    made = multiprocessing.get_context("fork").SimpleQueue()
    two = [decoding(photos, tmp_path / "px", 0.005, made) for _ in range(2)]
    for process in two:
        process.join(120)
    assert [process.exitcode for process in two] == [0, 0]
    assert sorted((made.get(), made.get())) == [1, 2] and made.empty()
    there = contents(tmp_path / "px")
    assert {name: there[name] for name in alone} == alone


def test_the_command_lists_and_deletes(photos, tmp_path, small_blocks, capsys):
    images = open_images(str(photos))
    root = tmp_path / "ann" / "pixels" / folder_name(make_manifest(images, 8, 1, "squash"))
    built(images, root)
    (root / "errors.csv").unlink()
    (root / "blocks" / "00002.safetensors").unlink()
    assert store_command(["list", str(tmp_path / "ann")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{root}: 150 images, ") and out.endswith(" of 0.0 MB, 2 of 3 blocks, 1 unreadable\n")
    (root / "mine.txt").write_text("kept")
    assert "mine.txt besides decoded images" in refused(capsys, store_command, "delete", root)
    (root / "mine.txt").unlink()
    assert "holds no decoded images" in refused(capsys, store_command, "delete", photos)
    assert store_command(["delete", str(root)]) == 0 and not root.exists() and photos.exists()
    assert capsys.readouterr().out.startswith("deleted ")
    assert store_command(["list", str(tmp_path)]) == 0
    assert "no decoded images there" in capsys.readouterr().out
    assert "there is no folder" in refused(capsys, store_command, "list", tmp_path / "none")


# ---- read ahead -----------------------------------------------------------------------------------------------------


class Slow(StoredPixels):
    """Notes who reads what, and waits with it until it may."""

    def read(self, rows, pixels):
        self.may.wait(60)
        self.calls.append((threading.current_thread() is threading.main_thread(), rows.tolist()))
        super().read(rows, pixels)


@pytest.fixture
def slow(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (100, 3, 4, 4), dtype=np.uint8)
    pixels.tofile(tmp_path / "pixels.u8")
    descriptor = os.open(tmp_path / "pixels.u8", os.O_RDONLY)
    stored = Slow("pixels.u8", descriptor, (3, 4, 4))
    stored.calls, stored.may, stored.pixels = [], threading.Event(), torch.from_numpy(pixels)
    stored.may.set()
    yield stored
    os.close(descriptor)


def test_announced_steps_are_read_by_the_thread_in_the_order_of_the_file(slow):
    order = ShuffledRows(np.arange(50), 7, (0, "x"))
    places = np.arange(50) * 2  # image i lies at 2 i
    images = ReadAhead(slow, places, torch.device("cpu"))
    images.plan(order.batch, range(3, 10))
    for step in range(3, 10):
        rows = order.batch(step)
        for some in (rows[:3], rows[3:], rows[[1, 1, 0]]):
            assert torch.equal(images.take(some), slow.pixels[torch.from_numpy(places[some])])
    assert all(not main and rows == sorted(rows) for main, rows in slow.calls)
    assert [rows for _, rows in slow.calls] == [sorted((places[order.batch(step)]).tolist()) for step in range(3, 10)]


def test_the_next_steps_are_read_while_one_computes(slow):
    order = ShuffledRows(np.arange(100), 5, (0, "x"))
    images = ReadAhead(slow, np.arange(100), torch.device("cpu"))
    images.plan(order.batch, range(20))
    images.take(order.batch(0))
    until = time.monotonic() + 60
    while len(slow.calls) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(slow.calls) >= 4


def test_what_was_not_announced_is_had_too_and_disturbs_nothing(slow):
    images = ReadAhead(slow, np.arange(100), torch.device("cpu"))
    assert torch.equal(images.take(np.array([5, 9, 5])), slow.pixels[[5, 9, 5]])
    assert images.take(NONE).shape == (0, 3, 4, 4)
    images.plan(lambda step: np.arange(step, step + 3), (10, 20, 30))
    assert torch.equal(images.take(np.array([90])), slow.pixels[[90]])
    for step in (10, 20, 30):
        assert torch.equal(images.take(np.arange(step, step + 3)), slow.pixels[step : step + 3])
    images.plan(lambda step: np.arange(step, step + 3), (40, 50))  # the old plan is forgotten
    assert torch.equal(images.take(np.array([51])), slow.pixels[[51]])  # a step was left out
    assert [rows for main, rows in slow.calls if main] == [[5, 9], [90]]


def test_an_epoch_over_ten_times_the_memory_that_there_is(tmp_path):
    """2000 images of 96 KB are read in a process that may have 19 MB more than it has."""
    stored_file = tmp_path / "pixels.u8"
    with stored_file.open("wb") as file:
        file.truncate(2000 * 98304)
    checksums = np.full(2000, zlib.crc32(bytes(98304)), dtype=np.uint32)

    def run():
        stored = StoredPixels("pixels.u8", os.open(stored_file, os.O_RDONLY), (3, 128, 256), checksums)
        images, order = ReadAhead(stored, np.arange(2000), torch.device("cpu")), ShuffledRows(np.arange(2000), 16, ("x",))
        ahead.AHEAD_BYTES, seen = 2**20, 0
        images.take(np.array([0]))
        images.plan(lambda step: np.array([step]), range(1))
        images.take(np.array([0]))  # its thread is there
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        limit = int(status["VmData"].split()[0]) * 1024 + 19 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        images.plan(order.batch, range(order.per_round))
        for step in range(order.per_round):
            seen += len(images.take(order.batch(step)))
        with pytest.raises(RuntimeError, match="memory"):
            torch.ones(20 * 2**20, dtype=torch.uint8)
        os._exit(seen == 2000)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == 1


def writable():
    """Bytes of memory that this process may write, as RLIMIT_DATA counts it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmData"].split()[0]) * 1024


def most_of(main, words):
    """`main(words)`; gives the most memory that the process could write meanwhile."""
    most, over = [writable()], threading.Event()

    def watch():
        while not over.wait(0.002):
            most.append(max(most.pop(), writable()))

    thread = threading.Thread(target=watch)
    thread.start()
    main(words)
    over.set()
    thread.join()
    return most[0]


@pytest.mark.slow
def test_a_run_over_ten_times_the_memory_that_it_may_have(tmp_path):
    """4000 images of 48 KB, in a process that may have 19 MB more than the same run takes for a hundred of them.

    Not the address space is limited (RLIMIT_AS), of which torch and every thread reserve more than they use. Memory
    that was freed goes back to the system at once, in the test alone: what an allocator keeps for later would count too.
    """
    for i in range(4000):
        folder = tmp_path / "images" / "train" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (i % 256, i // 256, 9)).save(folder / f"{i}.png")
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    words = ["--images", tmp_path / "images", "--classes", tmp_path / "classes.txt", "--rule", "flip", "--q", "0.3"]
    draw_sets([str(word) for word in [*words, "--output_dir", tmp_path / "store"]])
    network = {"img_size": 128, "patch_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 1}
    words = ["--annotations", tmp_path / "store", "--recipe", "digits", "--refine", "none", "--channels", "3"]
    words += ["--image_size", "128", "--epochs", "1", "--batch_size", "8", "--backbone", "vit_tiny_patch16_224"]
    words += ["--backbone_args", json.dumps(network), "--workers", "0", "--report_to", "none", "--method", "cc"]
    words = [str(word) for word in [*words, "--pixels", "disk", "--output_dir"]]

    def run():
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX
        threading.stack_size(1 << 18)
        torch.set_num_threads(1)
        ahead.AHEAD_BYTES = stored_pixels.BLOCK_BYTES = 2**20
        few = most_of(script("pll").main, [*words, str(tmp_path / "few"), "--share", "100"])
        resource.setrlimit(resource.RLIMIT_DATA, (few + 19 * 2**20,) * 2)
        script("pll").main([*words, str(tmp_path / "all")])
        os._exit(7)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(600)
    assert process.exitcode == 7
    assert json.loads((tmp_path / "all" / "report.json").read_text())["images"]["train"] == 4000


def test_an_error_of_the_thread_is_raised_where_the_images_are_wanted(slow):
    slow.checksums = np.zeros(100, dtype=np.uint32)
    images = ReadAhead(slow, np.arange(100), torch.device("cpu"))
    images.plan(lambda step: np.array([step]), range(4))
    with pytest.raises(UserError, match=r"pixels.u8 is damaged \(image 0\)"):
        images.take(np.array([0]))


# ---- training -------------------------------------------------------------------------------------------------------

TINY = [
    "--recipe", "digits", "--refine", "none", "--channels", "3", "--image_size", "8", "--epochs", "2", "--batch_size", "13",
    "--backbone_args", '{"norm": "group", "widths": [4, 8], "depths": [1, 1]}', "--workers", "0", "--report_to", "none",
]  # fmt: skip
CO_TRAINED = [
    "--warmup_epochs", "1", "--mixup_alpha", "4", "--contrast_after", "-1", "--queue_size", "50", "--projection_dim", "8",
]  # fmt: skip
SCRIPTS = {
    "coreg": (train_coreg.main, CO_TRAINED),
    "pll": (script("pll").main, ["--method", "irnet", "--few_shot", "2", "--epochs", "1"]),
    "dividemix": (script("dividemix").main, ["--warmup_epochs", "1"]),
    "distill": (script("distill").main, ["--epochs", "1"]),
    "probe": (script("probe").main, []),
}


def left_behind(output):
    """What a run leaves that does not tell the time."""
    weights = {path.name: path.read_bytes() for path in sorted((output / "export").rglob("*.safetensors"))}
    state = final_state(output) if list((output / "checkpoints").glob("*")) else {}
    return (
        weights,
        {key: state.get(key) for key in ("learners", "curves", "divisions")},
        (output / "labels.csv").read_bytes(),
    )


def same(one, other):
    torch.testing.assert_close(other[1], one[1], rtol=0, atol=0, equal_nan=True)
    return one[0] == other[0] and one[2] == other[2]


def announce_all(monkeypatch):
    """From now on it is an error when a step asks for images that were not announced."""
    steps, read, training = Run.steps, StoredPixels.read, []

    def watched_steps(run, *args):
        for step in steps(run, *args):
            training.append(step)
            yield step
            training.clear()

    def watched_read(stored, rows, pixels):
        assert not training or threading.current_thread() is not threading.main_thread(), rows
        read(stored, rows, pixels)

    monkeypatch.setattr(Run, "steps", watched_steps)
    monkeypatch.setattr(StoredPixels, "read", watched_read)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_the_same_wherever_the_images_are(name, small_annotated, tmp_path, capsys, monkeypatch):
    announce_all(monkeypatch)
    main, more = SCRIPTS[name]
    job, px = ["--annotations", str(small_annotated), *TINY, *more], str(tmp_path / "px")
    homes = {"device": [], "host": [], "disk": ["--pixels_dir", px]}
    if name != "coreg":
        del homes["host"]
    for home, where in homes.items():
        main([*job, "--pixels", home, *where, "--output_dir", str(tmp_path / home)])
    assert "Decoding 102 images once: 0.0 MB in " in capsys.readouterr().out
    device, *others = (left_behind(tmp_path / home) for home in homes)
    assert all(same(device, other) for other in others)
    assert len(list(Path(px).glob("*/pixels.u8"))) == 1


def on_processes(count, main, words):
    """Run a script on processes of one group, without a launcher, which would take seconds."""

    def run(rank, port):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        torch.set_num_threads(1)
        main(words)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, port)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * count


@pytest.mark.multiprocess
@pytest.mark.parametrize(("name", "home"), [("coreg", "disk"), ("coreg", "host"), ("pll", "disk")])
def test_two_processes_are_one_wherever_the_images_are(name, home, small_annotated, tmp_path, monkeypatch):
    announce_all(monkeypatch)
    main, more = SCRIPTS[name]
    job = ["--annotations", str(small_annotated), *TINY, *more, "--dtype", "float64", "--pixels_dir", str(tmp_path / "px")]
    main([*job, "--output_dir", str(tmp_path / "one")])
    one = final_state(tmp_path / "one")
    on_processes(2, main, [*job, "--pixels", home, "--output_dir", str(tmp_path / home)])
    two = final_state(tmp_path / home)
    same_curves(one, two, 1e-9)
    for ours, theirs in zip(one["learners"], two["learners"]):
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-9, atol=1e-9, msg=key)


def test_a_run_goes_on_with_its_images_elsewhere_bit_for_bit(small_annotated, tmp_path, monkeypatch):
    job = ["--annotations", str(small_annotated), *TINY, *CO_TRAINED, "--pixels_dir", str(tmp_path / "px")]
    train_coreg.main([*job, "--output_dir", str(tmp_path / "whole")])
    killed = [*job, "--output_dir", str(tmp_path / "killed"), "--checkpoint_minutes", "0"]
    with killed_at(monkeypatch, 1, 2):
        train_coreg.main([*killed, "--pixels", "disk"])
    train_coreg.main([*killed, "--pixels", "host"])
    assert same(left_behind(tmp_path / "whole"), left_behind(tmp_path / "killed"))


def test_images_that_lie_decoded_on_the_disk_are_taken_from_there(small_annotated, tmp_path, monkeypatch):
    job = ["--annotations", str(small_annotated), *TINY, "--pixels_dir", str(tmp_path / "px"), "--epochs", "1"]
    main, loaded = SCRIPTS["distill"][0], []
    # the page to label on shows some images as they were annotated
    monkeypatch.setattr("coreg.run.results.photos", lambda run, rows, pixels: [picture_of(image) for image in pixels])
    main([*job, "--pixels", "disk", "--output_dir", str(tmp_path / "a")])
    load = ImageList.load
    monkeypatch.setattr(ImageList, "load", lambda images, row: loaded.append(row) or load(images, row))
    main([*job, "--output_dir", str(tmp_path / "b")])
    assert len(loaded) <= 8 and same(left_behind(tmp_path / "a"), left_behind(tmp_path / "b"))
    (file,) = (tmp_path / "px").glob("*/pixels.u8")
    file.write_bytes(bytes(file.stat().st_size))  # other pixels
    main([*job, "--output_dir", str(tmp_path / "c")])
    assert same(left_behind(tmp_path / "a"), left_behind(tmp_path / "c"))


def test_a_lost_image_is_one_line_wherever_the_images_are(small_annotated, tmp_path, capsys, monkeypatch):
    load = ImageList.load

    def lost(images, row):
        if row == 40:
            raise UnreadableImage("empty file")
        return load(images, row)

    monkeypatch.setattr(ImageList, "load", lost)
    for home in ("device", "host", "disk"):
        job = ["--annotations", small_annotated, *TINY, "--pixels_dir", tmp_path / "px", "--output_dir", tmp_path / "run"]
        line = refused(capsys, SCRIPTS["distill"][0], *job, "--pixels", home)
        assert line.startswith("error: 1 of the 102 images in ") and "cannot be now (empty file)" in line
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("free", "home"), [(10**9, "device"), (102 * 192 * 3, "host"), (102 * 192 - 1, "disk")])
def test_the_first_home_with_room_is_taken(free, home, small_annotated, tmp_path, monkeypatch, capsys):
    import coreg.run.pixels as homes

    monkeypatch.setattr(homes, "free_memory", lambda: free)
    # two processes share the machine
    monkeypatch.setattr(homes, "of_every_process", lambda accelerator, value: [value] * (2 if home == "host" else 1))
    taken = []
    for name, function in (("device", "on_device"), ("host", "in_shared_memory"), ("disk", "_on_disk")):
        monkeypatch.setattr(homes, function, lambda *args, name=name: taken.append(name) or (_ for _ in ()).throw(Stopped))
    job = ["--annotations", str(small_annotated), *TINY, "--pixels_dir", str(tmp_path / "px")]
    with pytest.raises(Stopped):
        SCRIPTS["distill"][0]([*job, "--output_dir", str(tmp_path / "run")])
    assert taken == [home]
    if home == "disk":
        line = refused(capsys, SCRIPTS["distill"][0], *job, "--pixels", "device", "--output_dir", tmp_path / "run")
        assert "--pixels device has room for" in line and "write --pixels disk" in line
        with pytest.raises(Stopped):
            SCRIPTS["distill"][0]([*job, "--pixels", "disk", "--output_dir", str(tmp_path / "run")])


class Stopped(BaseException):
    pass
