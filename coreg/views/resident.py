"""The training images, wherever they are kept, and their views by key.

Positions 0 .. N-1 number the training images; `samples` gives each its row in the annotation store, which keys the
augmentation. A view is a pure function of (seed, purpose, epoch, network, step, sample).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coreg.views.ahead import ReadAhead
from coreg.views.augment import Augmentation


@dataclass
class TrainingImages:
    """The training images and how their views are made."""

    images: Tensor | ReadAhead  # uint8 (N, c, H, W), on the training device when it fits there, or read as it is needed
    samples: Tensor  # int64 (N,) on the CPU
    augmentation: Augmentation
    device: torch.device  # that of training
    seed: int  # of all keys
    dtype: torch.dtype = torch.float32  # of the views
    features: Tensor | None = None  # (N, d), pooled, of the plain views, where the backbone that makes them never changes

    def places(self, rows: np.ndarray) -> Tensor:
        """Row numbers, or other int64 (n,), on the training device, without waiting for it."""
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def pixels(self, rows: np.ndarray) -> Tensor:
        """uint8 (n, c, H, W) on the training device."""
        if isinstance(self.images, ReadAhead):
            return self.images.take(rows)
        where = torch.from_numpy(rows).to(self.images.device, non_blocking=True)
        return self.images.index_select(0, where).to(self.device, non_blocking=True)

    def read_ahead(self, rows_of: Callable[[int], np.ndarray], steps: Iterable[int]) -> None:
        """Announce the steps to come, so that none of them waits for a disk; nothing depends on it but time.

        Args:
            rows_of: step -> int64 (n,), this process's rows of it. steps: in the order in which they come.
        """
        if isinstance(self.images, ReadAhead):
            self.images.plan(rows_of, steps)

    def view(self, kind: str, rows: np.ndarray, key: tuple[int | str, ...], pixels: Tensor | None = None) -> Tensor:
        """A view of one of `coreg.views.augment.VIEWS`, (n, c, H, W), normalised, in channels_last format."""
        return self.views(kind, [(rows, key)], self.pixels(rows) if pixels is None else pixels)

    def views(self, kind: str, blocks: Sequence[tuple[np.ndarray, tuple[int | str, ...]]], pixels: Tensor) -> Tensor:
        """Views of several blocks of rows, each under a key of its own, one after another; pixels: those of all of them."""
        named = [(self.samples[torch.from_numpy(rows)], (self.seed, *key)) for rows, key in blocks]
        view = self.augmentation.views(kind, pixels, named, self.dtype)
        return view.contiguous(memory_format=torch.channels_last)

    def inputs(self, kind: str, rows: np.ndarray, key: tuple[int | str, ...], pixels: Tensor | None = None) -> Tensor:
        """What the network is given of a view: itself, or the features of a plain one where they are there, (n, d)."""
        if kind == "plain" and self.features is not None:
            return self.features.index_select(0, self.places(rows))
        return self.view(kind, rows, key, pixels)

    def in_batches(self, kind: str, rows: np.ndarray, batch_size: int, key: tuple[int | str, ...]) -> Iterator[Tensor]:
        """Views of many rows in order, for passes without gradient."""
        self.read_ahead(lambda start: rows[start : start + batch_size], range(0, len(rows), batch_size))
        for start in range(0, len(rows), batch_size):
            yield self.view(kind, rows[start : start + batch_size], key)

    def partners(
        self,
        views: Tensor,
        blocks: Sequence[tuple[str, np.ndarray, tuple[int | str, ...]]],
        partner: np.ndarray,
    ) -> Tensor:
        """The views that a process mixes its own ones with, (l, c, H, W).

        A partner that another process holds is made again here from its key: it costs augmentation, and no images travel.

        Args:
            views: (l, c, H, W), this process's. blocks: kind, rows and key of all processes' views, block after block.
            partner: int64 (l,), places in these blocks.
        """
        if len(views) == sum(len(rows) for _, rows, _ in blocks):
            return views.index_select(0, self.places(partner))
        partners, start = torch.empty_like(views), 0
        for kind, rows, key in blocks:
            here = np.flatnonzero((partner >= start) & (partner < start + len(rows)))
            partners[self.places(here)] = self.view(kind, rows[partner[here] - start], key)
            start += len(rows)
        return partners
