"""Training from a file on the disk against images on the device: images/s, MB/s of reading, resident memory.

    python -m benchmarks.pixels [--network small] [--megabytes 300] [--seconds 20]

A network trains on weak views in random order. The sides take turns, step for step of the same images: on the device,
from the file with whatever the page cache holds of it (warm), and from the file after it was dropped from the page cache
(cold), which it is before every turn; every second round goes backwards. The rate by that of the device is the median over
rounds, with quartiles: by the clock, and by the processor time of the training thread alone, which other programs on the
machine lengthen less and which leaves the reading thread out. Memory is what a process of its own has resident above what
it has after first steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import coreg.nets  # noqa: F401  registers the PreAct ResNets with timm
from benchmarks.growth import resident
from benchmarks.tables import as_markdown, environment
from coreg.data.pixels import StoredPixels
from coreg.nets.model import create_backbone
from coreg.views.ahead import ReadAhead
from coreg.views.augment import Augmentation
from coreg.views.order import ShuffledRows
from coreg.views.resident import TrainingImages


@dataclass(frozen=True)
class Case:
    """A network and what it is trained on."""

    backbone: str
    arguments: dict
    size: int
    batch: int
    turn: int = 10  # steps; then reading begins anew, as in every epoch


CASES = {
    "small": Case("preact_resnet_tiny", {"widths": [8, 16], "depths": [1, 1]}, 32, 32),
    "preact_resnet18": Case("preact_resnet18", {}, 32, 16),
    "vit": Case("vit_tiny_patch16_224", {"depth": 1}, 224, 8),
    "vit_b_16": Case("vit_base_patch16_224", {}, 224, 2, turn=2),
}


def write_file(path: Path, case: Case, megabytes: int) -> StoredPixels:
    """A file of random images, in pieces, so that little of it is ever in memory."""
    shape, rng = (3, case.size, case.size), np.random.default_rng(0)
    count, checksums = max(4 * case.batch, megabytes * 10**6 // int(np.prod(shape))), []
    with path.open("wb") as file:
        for start in range(0, count, 64):
            piece = rng.integers(0, 256, (min(64, count - start), *shape), dtype=np.uint8)
            checksums += [zlib.crc32(image) for image in piece]
            file.write(piece)
        os.fsync(file.fileno())
    return StoredPixels(str(path), os.open(path, os.O_RDONLY), shape, np.array(checksums, dtype=np.uint32))


class Side:
    """One way to have the images, with a network of its own that trains on them."""

    def __init__(self, case: Case, stored: StoredPixels, from_disk: bool) -> None:
        device, count = torch.device("cuda" if torch.cuda.is_available() else "cpu"), len(stored.checksums)
        views = Augmentation(case.size, case.size // 8, True, mean=(0.5,) * 3, std=(0.25,) * 3)
        images = ReadAhead(stored, np.arange(count), device)
        if not from_disk:
            pixels = np.empty((count, *stored.shape), dtype=np.uint8)
            stored.read(np.arange(count), pixels)
            images = torch.from_numpy(pixels).to(device)
        self.data = TrainingImages(images, torch.arange(count), views, device, seed=0)
        torch.manual_seed(0)
        net = create_backbone(case.backbone, 10, 3, case.arguments, False).to(device)
        self.net = net.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
        self.order = ShuffledRows(np.arange(count), case.batch, (0, "benchmark"))

    def steps(self, first: int, count: int) -> tuple[float, float]:
        """Train these steps; gives seconds by the clock, and of the processor for this thread."""
        start = time.perf_counter(), time.thread_time()
        self.data.read_ahead(self.order.batch, range(first, first + count))
        for step in range(first, first + count):
            rows = self.order.batch(step)
            views = self.data.view("weak", rows, (step,))
            F.cross_entropy(self.net(views), self.data.places(rows % 10)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.data.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start[0], time.thread_time() - start[1]


def forget(stored: StoredPixels) -> None:
    """Let the page cache forget the file."""
    os.posix_fadvise(stored.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def memory(case: Case, stored: StoredPixels, from_disk: bool) -> float:
    """MB that a process has resident at most in two rounds' worth of steps, above what it has before it has the images."""

    def run(answer: multiprocessing.SimpleQueue) -> None:
        torch.set_num_threads(1)
        small = StoredPixels(stored.path, stored.descriptor, stored.shape, stored.checksums[: 2 * case.batch])
        Side(case, small, from_disk).steps(0, 2)  # libraries, threads, the network's own needs
        before = resident()[0]
        Side(case, stored, from_disk).steps(0, 2 * case.turn)
        answer.put((resident()[1] - before) / 1e6)

    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=run, args=(answer,))
    process.start()
    process.join()
    return answer.get()


def measure(name: str, megabytes: int, seconds: float, folder: Path | None = None) -> list[dict[str, str]]:
    """One row for each side."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        stored = write_file(Path(place) / "pixels.u8", case, megabytes)
        grown = {from_disk: memory(case, stored, from_disk) for from_disk in (False, True)}
        sides = {"device": Side(case, stored, False), "disk, warm": Side(case, stored, True)}
        sides["disk, cold"] = Side(case, stored, True)
        before: dict[str, Callable[[], None]] = {"disk, cold": lambda: forget(stored)}
        spent, rounds, until = {side: [] for side in sides}, 0, time.monotonic() + seconds
        for images in sides.values():
            images.steps(0, 2)
        while rounds < 3 or time.monotonic() < until:
            for side in list(sides)[:: 1 - 2 * (rounds % 2)]:
                before.get(side, lambda: None)()
                spent[side].append(sides[side].steps(2 + rounds * case.turn, case.turn))
            rounds += 1
        os.close(stored.descriptor)
    rows = []
    for side, times in spent.items():
        # turns of the same number have the same images and, nearly, the same neighbours on the machine
        ratios = np.array(spent["device"]) / np.array(times)
        low, high = np.quantile(ratios[:, 0], (0.25, 0.75))
        rate = case.turn * case.batch / np.median(times, axis=0)[0]
        rows.append(
            {
                "network": name,
                "images": side,
                "images/s": f"{rate:,.1f}",
                "of device": f"{np.median(ratios[:, 0]):.2f}",
                "quartiles": f"{low:.2f} to {high:.2f}",
                "of its processor time": f"{np.median(ratios[:, 1]):.2f}",
                "rounds": str(rounds),
                "MB/s read": f"{rate * stored.length / 1e6:.2f}" if side != "device" else "0.00",
                "resident MB more": f"{grown[side != 'device']:,.0f}",
                "set, MB": f"{len(stored.checksums) * stored.length / 1e6:,.0f}",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=tuple(CASES), default=["small", "vit"])
    parser.add_argument("--megabytes", type=int, default=300, help="size of the file")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training a network, all sides together")
    parser.add_argument("--folder", type=Path, help="where the file is written, on the disk to be measured")
    args = parser.parse_args(argv)
    print(environment() + "\n")
    print(as_markdown([row for name in args.network for row in measure(name, args.megabytes, args.seconds, args.folder)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
