"""Where the decoded images of a run are kept: on the device, in memory that the processes of a machine share, or on a disk.

What is trained is the same in every bit. Images are decoded once: on the device and in shared memory each process decodes
its part, on the disk all processes of all jobs take blocks (`coreg.store.pixels`). What lies decoded on the disk is taken
from there, wherever it is to be kept.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from coreg.annotate.work import Evidence, Progress, every_block
from coreg.data.decode import UnreadableImage, decode, no_longer_readable
from coreg.data.images import ImageList
from coreg.data.pixels import CHUNK_BYTES, StoredPixels, write_at
from coreg.errors import UserError
from coreg.files import reason_of, this_machine
from coreg.learn.collective import gather_rows, my_slice
from coreg.plaintext import printable
from coreg.process import all_or_none, main_process_decides, of_every_process
from coreg.progress import progress_bar
from coreg.store.pixels import PixelWriter, folder_name, gigabytes, make_manifest, start_folder
from coreg.views.ahead import ReadAhead
from coreg.views.resident import TrainingImages
from coreg.webpage import picture_of

if TYPE_CHECKING:
    from coreg.run.loop import Run

Read = Callable[[np.ndarray, dict[int, str]], np.ndarray]  # rows of the list, failed -> uint8 (n, c, H, W)


def training_images(run: Run, *splits: np.ndarray) -> list[TrainingImages]:
    """The images at these rows of the store, int64 (n,) each; all processes take part.

    Raises:
        UserError: some cannot be read any more, or what was asked for has no room; on every process.
    """
    job, options, device = run.job, run.image_options, run.accelerator.device
    images = run.store.images()
    source = Source(images, options.image_size, options.channels, options.resize, job.workers)
    place = Path(job.pixels_dir) if job.pixels_dir else run.annotated.root / "pixels"
    root = place / folder_name(source.manifest())
    rows = np.concatenate(splits)
    home = choose_home(run, source, root, len(rows))
    if home == "disk":
        stored = _on_disk(run, source, root, np.unique(rows))
        kept = [ReadAhead(stored, split, device) for split in splits]
    else:
        read = _reading(run, source, root)
        if home == "device":
            kept = [on_device(run.accelerator, source, read, split) for split in splits]
        else:
            stored, ends = in_shared_memory(run.accelerator, source, read, rows), np.cumsum([len(s) for s in splits])
            kept = [
                ReadAhead(stored, np.arange(end - len(split), end), device) for end, split in zip(ends.tolist(), splits)
            ]
    augmentation, dtype = options.augmentation(), getattr(torch, job.dtype)
    return [
        TrainingImages(pixels, torch.from_numpy(split), augmentation, device, job.seed, dtype)
        for pixels, split in zip(kept, splits)
    ]


def photos(run: Run, rows: np.ndarray, pixels: np.ndarray) -> list[Image.Image]:
    """Images for a person to see: as they were annotated, or what was trained on where that is larger or all there is.

    Args:
        rows: int64 (n,), of the store. pixels: uint8 (n, c, H, W), what was trained on.
    """
    decoded = [picture_of(image) for image in pixels]
    try:
        images = run.store.images()
    except UserError:  # moved or changed since the start
        return decoded

    def larger(row: int, other: Image.Image) -> Image.Image:
        try:
            image = images.load(row)
        except UnreadableImage:
            return other
        return image if max(image.size) > max(other.size) else other

    with ThreadPoolExecutor(max(1, run.job.workers)) as threads:
        return list(threads.map(larger, rows.tolist(), decoded))


@dataclasses.dataclass
class Source:
    """Images and how they are decoded."""

    images: ImageList
    size: int
    channels: int
    resize: str
    workers: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, H, W) of a decoded image."""
        return self.channels, self.size, self.size

    @property
    def length(self) -> int:
        """Bytes of a decoded image."""
        return self.channels * self.size**2

    def manifest(self) -> dict[str, Any]:
        """Of these images on the disk."""
        return make_manifest(self.images, self.size, self.channels, self.resize)

    def decoded(self, rows: np.ndarray, failed: dict[int, str]) -> np.ndarray:
        """uint8 (n, c, H, W) of rows int64 (n,); `failed` takes the reasons of those that cannot be read."""
        return decode(self.images, rows, self.size, self.channels, self.workers, failed, self.resize).numpy()


# ---- which of them --------------------------------------------------------------------------------------------------


def choose_home(run: Run, source: Source, root: Path, count: int) -> str:
    """`device`, `host` or `disk`, the same on all processes: as asked for, or the first with room for `count` images.

    Raises:
        UserError: what is asked for has no room for them.
    """
    accelerator, asked, need = run.accelerator, run.job.pixels, count * source.length
    if asked == "disk":
        return asked
    processes = of_every_process(accelerator, this_machine()).count(this_machine())
    have = free_memory()
    if accelerator.device.type == "cuda":
        free = torch.cuda.mem_get_info(accelerator.device)[0]
        # memory is given out in pieces, so not all that is free can be had
        room = {"device": int(0.9 * free), "host": have // 2}
        if asked == "auto":
            room["device"] -= room_for_training(run, count)
    else:
        # without a GPU, the device is memory that each process has for itself
        room = {"device": have // processes, "host": have}
        if asked == "auto":
            room = {name: there // 2 for name, there in room.items()}
    if not hasattr(os, "memfd_create"):
        room["host"] = 0
    gathered = of_every_process(accelerator, room)
    least = {name: min(one[name] for one in gathered) for name in room}
    if asked != "auto":
        if need > least[asked]:
            raise UserError(
                f"{count} images of {source.size}x{source.size} take {gigabytes(need)}, and --pixels {asked} has room for "
                f"{gigabytes(max(least[asked], 0))}; write --pixels disk, or give a smaller --image_size",
                silent=not accelerator.is_main_process,
            )
        return asked
    if need <= least["device"]:
        return "device"
    there = main_process_decides(accelerator, lambda: _is_there(root, source))
    return "host" if need <= least["host"] and not there else "disk"


def free_memory() -> int:
    """Bytes of memory that this machine could still give to its processes, within a container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name, value in _table("/proc/meminfo"):
        if name == "MemAvailable:":
            free = 1024 * int(value)
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = Path("/sys/fs/cgroup")
        try:
            most, now = (int((group / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
        kept = sum(int(value) for name, value in _table(str((group / limit).parent / "memory.stat")) if name == cached)
        free = min(free, most - now + kept)
    return max(free, 0)


def _table(path: str) -> list[tuple[str, str]]:
    """The first two words of each line of a file of the system; none where it cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [(words[0], words[1]) for words in map(str.split, lines) if len(words) > 1]


def room_for_training(run: Run, count: int) -> int:
    """Bytes of a GPU's memory that training takes besides pixels.

    Measured on one network: its weights, and a pass forward and backward over as many views as the largest step has. Two
    networks have weights, gradients, the optimiser's state and momentum encoders; tables of the `count` images are counted
    (docs/distributed.md).
    """
    job, options, accelerator = run.job, run.image_options, run.accelerator
    device, classes, width = accelerator.device, len(run.store.class_names), 128
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        net = run.network(width)
        net.to(device, getattr(torch, job.dtype)).train()
        weights = torch.cuda.memory_allocated(device) - before
        shape = (-(-4 * job.batch_size // accelerator.num_processes), options.channels, *2 * (options.image_size,))
        with accelerator.autocast():
            logits, features = net(torch.zeros(shape, device=device, dtype=getattr(torch, job.dtype)))
            loss = logits.float().sum() + features.float().sum()
        loss.backward()
        passes = torch.cuda.max_memory_allocated(device) - before - 2 * weights
        del net, logits, features, loss
    except torch.cuda.OutOfMemoryError:
        return torch.cuda.get_device_properties(device).total_memory
    finally:
        torch.cuda.empty_cache()
    held = -(-count // accelerator.num_processes) if run.sharded else count
    tables = held * (classes + 8 * (classes + 1) + 4 * (classes + width))
    return passes + 10 * weights + tables


def _shown(accelerator: Accelerator, parts: range) -> Iterable[int]:
    """The parts of a set, with a bar where decoding them takes more than moments."""
    return progress_bar(iterable=parts, desc="decoding", unit="part", delay=3, disable=not accelerator.is_main_process)


# ---- on the device, and in shared memory ----------------------------------------------------------------------------


def on_device(accelerator: Accelerator, source: Source, read: Read, rows: np.ndarray) -> Tensor:
    """Images `rows` int64 (n,) of the list, uint8 (n, c, H, W) on the device; each process reads a part of them.

    Raises:
        UserError: some cannot be read any more; on every process.
    """
    pixels = torch.empty((len(rows), *source.shape), dtype=torch.uint8, device=accelerator.device)
    failed, problems = {}, []
    step = max(1, accelerator.num_processes * CHUNK_BYTES // source.length)
    for start in _shown(accelerator, range(0, len(rows), step)):
        some = rows[start : start + step]
        my_rows = some[my_slice(len(some))]
        part = np.zeros((len(my_rows), *source.shape), dtype=np.uint8)
        try:
            part = read(my_rows, failed)
        except UserError as error:  # the others wait for this part
            problems.append(error)
        pixels[start : start + step] = gather_rows(torch.from_numpy(part).to(accelerator.device), len(some))
    _refuse(accelerator, source, failed, problems)
    return pixels


def in_shared_memory(accelerator: Accelerator, source: Source, read: Read, rows: np.ndarray) -> StoredPixels:
    """Images `rows` int64 (n,) of the list, in memory without a name that the processes of a machine share.

    It goes when the last of them ends, however that ends. Each process reads a part of the images.

    Raises:
        UserError: some cannot be read any more; on every process.
    """
    machines, number = of_every_process(accelerator, this_machine()), accelerator.process_index
    group = [process for process, machine in enumerate(machines) if machine == machines[number]]
    descriptor, path = -1, ""
    if number == group[0]:
        descriptor = os.memfd_create("coreg-pixels")
        os.ftruncate(descriptor, len(rows) * source.length)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    paths = of_every_process(accelerator, path)
    failed, problems = {}, []
    try:
        if number != group[0]:
            descriptor = os.open(paths[group[0]], os.O_RDWR)
        step = max(1, CHUNK_BYTES // source.length)
        for start in _shown(accelerator, range(group.index(number) * step, len(rows), step * len(group))):
            write_at(descriptor, read(rows[start : start + step], failed), start * source.length)
    except UserError as error:
        problems.append(error)
    except OSError as error:
        problems.append(UserError(f"the processes cannot share memory ({reason_of(error)}); write --pixels disk"))
    _refuse(accelerator, source, failed, problems)
    return StoredPixels("shared memory", descriptor, source.shape)


def _refuse(accelerator: Accelerator, source: Source, failed: dict[int, str], problems: list[UserError]) -> None:
    """Raise on every process what one of them has met, images that all of them together could not read first."""
    every = of_every_process(accelerator, failed)
    failed = {row: reason for one in every for row, reason in one.items()}
    problems = [no_longer_readable(source.images, failed)] if failed else problems

    def raise_first() -> None:
        if problems:
            raise problems[0]

    all_or_none(accelerator, raise_first)


# ---- on the disk ----------------------------------------------------------------------------------------------------


def _is_there(root: Path, source: Source) -> bool:
    return (root / "manifest.json").exists() and PixelWriter(root, source.manifest()).finished


def _reading(run: Run, source: Source, root: Path) -> Read:
    """What reads images: from the disk, where they lie decoded, or from their files."""

    def check() -> bool:
        if not _is_there(root, source):
            return False
        try:
            start_folder(root, source.manifest(), source.images, np.zeros(0, dtype=np.int64))
        except UserError:  # other pixels lie there, or none that can be read, which `--pixels disk` reports
            return False
        return _is_there(root, source)

    if not main_process_decides(run.accelerator, check):
        return source.decoded
    stored, errors = all_or_none(run.accelerator, PixelWriter(root, source.manifest()).open)

    def read(rows: np.ndarray, failed: dict[int, str]) -> np.ndarray:
        pixels = np.empty((len(rows), *source.shape), dtype=np.uint8)
        stored.read(rows, pixels)
        lost = [place for place, row in enumerate(rows.tolist()) if row in errors]
        if lost:  # once; perhaps they can be read again
            pixels[lost] = source.decoded(rows[lost], failed)
        return pixels

    return read


def _on_disk(run: Run, source: Source, root: Path, wanted: np.ndarray) -> StoredPixels:
    """The decoded images of the whole list on the disk, after decoding what is missing; `wanted` rows have to be readable.

    Raises:
        UserError: some of them cannot be read any more, the disk is full, or other images lie there.
    """
    accelerator, manifest = run.accelerator, source.manifest()
    for line in main_process_decides(accelerator, lambda: start_folder(root, manifest, source.images, wanted)):
        accelerator.print(f"damaged, decoded again: {printable(line)}")
    writer = PixelWriter(root, manifest)
    if not main_process_decides(accelerator, lambda: writer.finished):
        accelerator.print(
            f"Decoding {len(source.images)} images once: {gigabytes(writer.bytes)} in {printable(root)}, which later runs "
            f"share."
        )

        def decoded(blocks: Iterator[int], progress: Progress) -> Iterator[Evidence]:
            for index in blocks:
                yield index, *writer.decode_block(source.images, index, source.workers)

        every_block(writer, source.images.paths, accelerator, decoded, "decoding")
    stored, errors = all_or_none(accelerator, writer.open)
    failed = {row: errors[row] for row in np.intersect1d(np.array(list(errors), dtype=np.int64), wanted).tolist()}
    _refuse(accelerator, source, failed, [])
    return stored
