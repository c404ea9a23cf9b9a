"""The loop over blocks: balanced, elastic, and the same store whatever happens to the processes."""

import os
import shutil
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from runs import in_processes, on_two_processes
from test_annotate_annotators import save_tiny_clip

from annotate_vlm import main
from coreg.annotate import work as loop
from coreg.annotate.work import Progress, annotated, work
from coreg.data.sources import open_images
from coreg.errors import UserError
from coreg.store.claims import BlockQueue
from coreg.store.store import AnnotationStore, StoreWriter, make_manifest

NAMES = ["red thing", "green thing", "blue thing"]


class Brightness:
    """An annotator that is one small class: it names class 0, 1 or 2 by the mean of the first pixel row."""

    features = None
    preprocessing = {"what": "mean"}  # noqa: RUF012
    collate = staticmethod(torch.stack)

    def __init__(self, seconds=0.0):
        self.seconds, self.images = seconds, 0

    @staticmethod
    def preprocess(image):
        return torch.tensor(float(np.asarray(image.convert("L"), dtype=float)[0].mean()))

    def annotate(self, batch):
        time.sleep(self.seconds)
        self.images += len(batch)
        votes = (batch / 86).to(torch.int16)
        probs = torch.nn.functional.one_hot(votes.long(), 3).half()
        return {"votes": votes[:, None], "probs": probs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(0)
    for number in range(61):
        pixels = generator.integers(0, 90, (24, 24, 3), dtype=np.uint8)
        pixels[..., number % 3] += 120
        Image.fromarray(pixels).save(root / f"{number:03d}.png")
    (root / "030.png").write_bytes(b"")
    (root / "060.png").write_text("no image")
    return root


def begun(folder, root, block_size=4):
    images = open_images(str(folder), NAMES)
    model = {"spec": "m", "weights": "w"}
    details = {"features": None, "data_root": "data", "preprocessing": None, "versions": {}}
    writer = StoreWriter(root, make_manifest(images, NAMES, ["{}"], model, block_size, **details))
    writer.start(images)
    return images, writer


def take_part(images, writer, annotator, start=0.0, max_errors=None, workers=0):
    with BlockQueue(writer.root, writer.files, start) as queue:
        progress = Progress(queue, writer, shown=False)
        evidence = partial(annotated, images=images, annotator=annotator, writer=writer, batch_size=3, workers=workers)
        work(queue, writer, evidence, progress, images.paths, max_errors)


def test_a_slow_process_does_not_hold_a_fixed_share(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "POLL_SECONDS", 0.02)
    images, writer = begun(folder, tmp_path / "alone")
    take_part(images, writer, Brightness())
    writer.complete(images.paths)

    images, writer = begun(folder, tmp_path / "ann")
    workers = [Brightness(seconds) for seconds in (0.15, 0.002, 0.01)]
    threads = [
        threading.Thread(target=take_part, args=(images, StoreWriter(writer.root, writer.manifest), annotator, rank / 3))
        for rank, annotator in enumerate(workers)
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # 16 blocks of two batches: the slow one alone would need 4.8 s and a third of them 1.6 s
    assert time.monotonic() - start < 1.4
    assert sum(annotator.images for annotator in workers) == 61  # and nothing was done twice
    assert workers[0].images < 61 / 3 < workers[1].images
    writer.complete(images.paths)
    one, many = (AnnotationStore.open(tmp_path / name) for name in ("alone", "ann"))
    assert one.hash == many.hash and np.flatnonzero(many.unreadable).tolist() == [30, 60]
    bright = [int(Brightness.preprocess(images.load(row)) / 86) for row in range(61) if row not in (30, 60)]
    assert many.votes()[~many.unreadable, 0].tolist() == bright and len(set(bright)) > 1


def test_too_many_errors_stop_the_job_and_a_higher_limit_goes_on(folder, tmp_path):
    images, writer = begun(folder, tmp_path / "ann")
    with pytest.raises(UserError) as raised:
        take_part(images, writer, Brightness(), max_errors=0)
    message = str(raised.value)
    assert "1 images cannot be read and --max_errors is 0 (the first, '030.png': empty file)" in message
    assert "\n" not in message and len(list((writer.root / "blocks").iterdir())) == 8  # up to the block with 030.png
    # another process counts what the first one could not read
    with pytest.raises(UserError, match="2 images cannot be read and --max_errors is 1"):
        take_part(images, StoreWriter(writer.root, writer.manifest), Brightness(), max_errors=1)
    take_part(images, writer, Brightness(), max_errors=2)
    writer.complete(images.paths)
    assert AnnotationStore.open(writer.root).unreadable.sum() == 2
    assert os.listdir(writer.root / "claims") == []


def test_progress_counts_the_blocks_of_all_processes(folder, tmp_path, capfd):
    _, writer = begun(folder, tmp_path / "ann")
    other = StoreWriter(writer.root, writer.manifest)
    for index in (0, 15):  # 4 images and the last one
        count = len(writer.rows(index))
        other.write(index, {"votes": np.zeros((count, 1), np.int16), "probs": np.full((count, 3), 1 / 3, np.float16)}, {})
    with BlockQueue(writer.root, writer.files) as queue:
        progress = Progress(queue, writer, shown=True)
        assert (progress.bar.n, progress.bar.total) == (5, 61)
        progress.show(3)
        assert progress.bar.n == 8
        other.write(1, {"votes": np.zeros((4, 1), np.int16), "probs": np.full((4, 3), 1 / 3, np.float16)}, {})
        progress.show(0)
        assert progress.bar.n == 9
        progress.show(0)
        assert progress.bar.n == 9
        progress.bar.close()
    assert "9/61" in capfd.readouterr().err


# ---- real processes -------------------------------------------------------------------------------------------------


def dying(*left):
    """What kills the process of rank r when it has written as many blocks as the r-th number says."""

    def before():
        left_over, write = left[int(os.environ["RANK"])], StoreWriter.write

        def write_then_die(*arguments):
            nonlocal left_over
            write(*arguments)
            left_over -= 1
            if left_over == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        StoreWriter.write = write_then_die

    return before


@pytest.mark.multiprocess
def test_kill_and_restart_matrix(folder, tmp_path):
    """Two processes are killed, then three, then one or two finish: the same store, byte by byte."""
    save_tiny_clip(tmp_path / "model")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))

    def arguments(output):
        options = f"--images {folder} --vlm local-dir:{tmp_path}/model --classes {tmp_path}/classes.txt --workers 0"
        return [*options.split(), "--batch_size", "3", "--block_size", "4", "--output_dir", str(output)]

    main(arguments(tmp_path / "whole"))
    output = tmp_path / "ann"
    assert in_processes(2, main, *arguments(output), before=dying(3, 5)).codes == [-signal.SIGKILL] * 2
    assert not (output / "errors.csv").exists()
    written = {file.name for file in (output / "blocks").glob("0*")}
    assert len(written) == 8 and "00000.safetensors" in written
    assert in_processes(3, main, *arguments(output), before=dying(1, 1, 1)).codes == [-signal.SIGKILL] * 3
    assert not (output / "errors.csv").exists()
    assert written < {file.name for file in (output / "blocks").glob("0*")}
    content = bytearray((output / "blocks" / "00000.safetensors").read_bytes())
    content[-1] ^= 255
    (output / "blocks" / "00000.safetensors").write_bytes(content)  # and a disk that lies
    copy = shutil.copytree(output, tmp_path / "copy")
    main(arguments(output))
    printed = on_two_processes(main, *arguments(copy))
    assert printed.count("damaged, annotated again: 00000.safetensors") == 1
    assert printed.count("next: accelerate launch ") == 1
    whole = AnnotationStore.open(tmp_path / "whole")
    for root in (output, copy):
        for file in sorted((tmp_path / "whole" / "blocks").iterdir()):
            assert (root / "blocks" / file.name).read_bytes() == file.read_bytes()
        assert AnnotationStore.open(root).hash == whole.hash
        assert (root / "errors.csv").read_bytes() == (tmp_path / "whole" / "errors.csv").read_bytes()
        assert sorted(os.listdir(root / "blocks")) == sorted(os.listdir(tmp_path / "whole" / "blocks"))
        assert not (root / "claims").exists()
