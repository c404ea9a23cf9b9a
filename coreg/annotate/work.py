"""The loop over blocks: take one, annotate it, write it, take the next, until every block is there.

Nothing in here waits for another process except at the very end, when all blocks that are left are in work elsewhere.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from coreg.annotate.annotators import Annotator
from coreg.annotate.scores import TextSide
from coreg.data.decode import UnreadableImage
from coreg.data.eight_bit import USES_FEW_BITS
from coreg.data.images import ImageList
from coreg.errors import UserError
from coreg.progress import progress_bar
from coreg.store.blocks import DamagedBlockError, pack_answers, read_block
from coreg.store.claims import BlockQueue
from coreg.store.manifest import block_files, job_hash, same_command
from coreg.store.store import AnnotationStore
from coreg.store.writer import BlockWriter

POLL_SECONDS = 0.5
Evidence = tuple[int, dict[str, np.ndarray], dict[int, str]]  # number of a block, its tensors, rows that cannot be read


class Progress:
    """A progress bar over the images of all processes, drawn by one of them; it counts the blocks in the folder."""

    def __init__(self, queue: BlockQueue, writer: BlockWriter, shown: bool, doing: str = "annotating") -> None:
        self.queue, self.sizes = queue, np.array([len(writer.rows(index)) for index in range(len(writer.files))])
        self.counted_at, self.written = time.monotonic(), self._written()
        self.few_bits = 0  # images of this process that are nearly black because they use few of their 16 bits
        total = int(self.sizes.sum())
        self.bar = progress_bar(total=total, initial=self.written, unit="image", desc=doing, disable=not shown)

    def _written(self) -> int:
        return int(self.sizes[self.queue.finished()].sum())

    def show(self, unwritten: int = 0) -> None:
        """Draw; `unwritten` is the number of images this process has annotated and not written yet."""
        if self.bar.disable:
            return
        if time.monotonic() - self.counted_at > POLL_SECONDS or not unwritten:
            self.counted_at, self.written = time.monotonic(), self._written()
        # The bar never goes back, as it would when a block is written by somebody else in the meantime.
        self.bar.update(max(0, min(self.written + unwritten, self.bar.total) - self.bar.n))


def work(
    queue: BlockQueue,
    writer: BlockWriter,
    evidence: Callable[[Iterator[int], Progress], Iterator[Evidence]],
    progress: Progress,
    paths: Sequence[str],
    max_errors: int | None = None,
) -> None:
    """Write blocks as soon as their evidence is there, until all of them are.

    Args:
        queue: entered already.
        evidence: that of blocks, in their order, which it takes from an iterator that claims them; and the bar.
        paths, max_errors: see `every_block`.
    """
    try:
        while not all(queue.finished()):
            first = queue.claim()
            if first is None:  # the rest is in work elsewhere; if one of those processes dies, its block comes back
                time.sleep(POLL_SECONDS)
            else:
                # a block is claimed when the evidence runs out of them, so a fast process takes many and a slow one few
                claimed = itertools.chain([first], iter(queue.claim, None))
                for index, tensors, errors in evidence(claimed, progress):
                    writer.write(index, tensors, errors)
                    queue.release(index)
                    if max_errors is not None and len(bad := writer.unreadable()) > max_errors:
                        first = min(bad)
                        raise UserError(
                            f"{len(bad)} images cannot be read and --max_errors is {max_errors} (the first, "
                            f"{paths[first]!r}: {bad[first]}); see python -m coreg.annotate info {writer.root}, then raise "
                            f"--max_errors and run the same command again"
                        )
                    progress.show()
            progress.show()
    finally:
        progress.bar.close()  # an error message begins on a new line


def every_block(
    writer: BlockWriter,
    paths: Sequence[str],
    accelerator: Accelerator,
    evidence: Callable[[Iterator[int], Progress], Iterator[Evidence]],
    doing: str = "annotating",
    safe_csv: bool = False,
    max_errors: int | None = None,
) -> Progress:
    """Write all blocks that are missing, together with whoever works on the same folder, and finish it.

    Processes meet in the folder only: they may be slow, die, or be joined by others.

    Args:
        paths: of all images, for errors.csv.
        evidence: see `work`.
        doing: a word for the progress bar.
        safe_csv: see `csv_rows`.
        max_errors: images that cannot be read, at most.

    Returns:
        this process's progress.

    Raises:
        UserError: more images cannot be read, or the disk is full.
    """
    start = accelerator.process_index / accelerator.num_processes
    with BlockQueue(writer.root, writer.files, start) as queue:
        progress = Progress(queue, writer, accelerator.is_main_process, doing)
        work(queue, writer, evidence, progress, paths, max_errors)
        if accelerator.is_main_process:
            writer.complete(paths, safe_csv)
            queue.clear()
    while not (writer.root / "errors.csv").exists():  # the last file, which the main process writes
        time.sleep(POLL_SECONDS)
    return progress


# ---- from images ----------------------------------------------------------------------------------------------------


class Preprocessed(Dataset):
    """Row -> (row, preprocessed image, reason, whether it uses few of its 16 bits); an unreadable image is black.

    What ends the job is a reason, too: raised in a worker process it would arrive as a page of text.
    """

    def __init__(self, images: ImageList, preprocess: Callable[[Image.Image], Any]) -> None:
        self.images, self.preprocess = images, preprocess

    def __getitem__(self, row: int) -> tuple[int, Any, str | UserError, bool]:
        try:
            image = self.images.load(row)
        except (UnreadableImage, UserError) as error:
            reason = error if isinstance(error, UserError) else str(error)
            return row, self.preprocess(Image.new("RGB", (32, 32))), reason, False
        return row, self.preprocess(image), "", USES_FEW_BITS in image.info


def _collated(
    collate: Callable[[list[Any]], Any], items: list[tuple[int, Any, str | UserError, bool]]
) -> tuple[list[int], Any, list[str | UserError], int]:
    """Items as (rows, batch, reasons, number of images with few bits)."""
    rows, pixels, reasons, few_bits = zip(*items)
    return list(rows), collate(list(pixels)), list(reasons), sum(few_bits)


class ClaimedBatches:
    """Batches of rows of blocks as they are claimed, which never cross the border of a block.

    So a block's content does not depend on which others were done before.
    """

    def __init__(self, blocks: Iterator[int], writer: BlockWriter, size: int) -> None:
        self.blocks, self.writer, self.size = blocks, writer, size
        self.claimed: deque[int] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        for index in self.blocks:
            self.claimed.append(index)
            rows = self.writer.rows(index)
            for start in range(0, len(rows), self.size):
                yield list(rows[start : start + self.size])


def annotated(
    blocks: Iterator[int],
    progress: Progress,
    images: ImageList,
    annotator: Annotator,
    writer: BlockWriter,
    batch_size: int,
    workers: int,
) -> Iterator[Evidence]:
    """The evidence of blocks, from their images.

    Raises:
        UserError: the place where the images are does not answer, or holds others by now.
    """
    batches = ClaimedBatches(blocks, writer, batch_size)
    loader = DataLoader(
        Preprocessed(images, annotator.preprocess),
        batch_sampler=batches,
        collate_fn=functools.partial(_collated, annotator.collate),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    parts: list[dict[str, torch.Tensor | list]] = []
    errors: dict[int, str] = {}
    done = 0
    for rows, pixels, reasons, few_bits in loader:
        for error in (reason for reason in reasons if isinstance(reason, UserError)):
            raise error
        progress.few_bits += few_bits
        # Results stay on the device until the block is complete, so that nothing waits for it batch by batch.
        parts.append(annotator.annotate(pixels))
        errors |= {row: reason for row, reason in zip(rows, reasons) if reason}
        done += len(rows)
        if done == len(writer.rows(batches.claimed[0])):
            yield batches.claimed.popleft(), _joined(parts), errors
            parts, errors, done = [], {}, 0
        else:
            progress.show(done)


def _joined(parts: list[dict[str, torch.Tensor | list]]) -> dict[str, np.ndarray]:
    """The columns of a block, put together from its batches."""
    columns = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name == "answers":
            columns[name] = pack_answers([row for piece in pieces for row in piece])
        else:
            columns[name] = torch.cat(pieces).cpu().numpy()
    return columns


# ---- from features --------------------------------------------------------------------------------------------------


def rescored(
    blocks: Iterator[int], progress: Progress, source: AnnotationStore, annotator: TextSide, batch_size: int
) -> Iterator[Evidence]:
    """The evidence of blocks, from the features in those of another store.

    Raises:
        UserError: a block of that store is damaged.
    """
    files, job = block_files(source.root, source.manifest), job_hash(source.manifest)
    for index in blocks:
        try:
            tensors, errors, _ = read_block(files[index], index, job)
        except DamagedBlockError as error:
            raise UserError(f"{files[index]} is damaged: {error}; {same_command(source.manifest)}") from None
        features = tensors["features"]
        parts = [annotator.score(features[start : start + batch_size]) for start in range(0, len(features), batch_size)]
        kept = {name: tensors[name] for name in ("features", "tiles") if name in tensors}
        yield index, _joined(parts) | kept, errors
