"""Stored images on the training device, read by a thread before a step asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coreg.data.pixels import StoredPixels

AHEAD_BYTES = 32 << 20  # read ahead of the next step, which is read whatever it takes
MOST_AHEAD = 8  # steps


@dataclass
class Window:
    """The images that one step asks for."""

    rows: np.ndarray  # int64 (n,), increasing, of the stored images
    read: Future[Tensor]  # uint8 (n, c, H, W) on the CPU, pinned where there is a GPU
    copied: Tensor | None = None  # on the training device
    event: torch.cuda.Event | None = None  # when the copy is done


class ReadAhead:
    """Images by number, as they lie in `stored`.

    What is asked for is always had; steps that were announced are read while those before them compute. On a GPU a copy
    runs beside computing, on a stream of its own.
    """

    def __init__(self, stored: StoredPixels, places: np.ndarray, device: torch.device) -> None:
        """Prepare to read.

        Args:
            stored: the images. places: int64 (N,), where image i of 0 .. N-1 is in there, all different.
            device: that of training.
        """
        self.stored, self.places, self.device = stored, places, device
        self.windows: deque[Window] = deque()
        self._coming: Iterable[int] = iter(())
        self._rows_of: Callable[[int], np.ndarray] | None = None
        self._unexpected: deque[np.ndarray] = deque()  # rows that the system has not been asked for yet
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixels")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def plan(self, rows_of: Callable[[int], np.ndarray], steps: Iterable[int]) -> None:
        """Announce steps; those announced before are forgotten.

        Args:
            rows_of: step -> int64 (n,), all images that `take` will be asked for in it, in any number of calls.
            steps: in the order in which they come.
        """
        for window in self.windows:
            window.read.cancel()
        self.windows.clear()
        self._unexpected = deque()
        self._rows_of, self._coming = rows_of, iter(steps)
        self._fill()

    def take(self, rows: np.ndarray) -> Tensor:
        """Images `rows`, int64 (n,): uint8 (n, c, H, W) on the training device.

        Raises:
            UserError: they cannot be read.
        """
        wanted = self.places[rows]
        if not len(wanted):
            return torch.empty((0, *self.stored.shape), dtype=torch.uint8, device=self.device)
        # what was not announced leaves the windows as they are
        number = next((number for number, window in enumerate(list(self.windows)[:2]) if _holds(window, wanted)), None)
        if number is None:
            unique = np.unique(wanted)
            ready: Future[Tensor] = Future()
            ready.set_result(self._read(unique))
            window = Window(unique, ready)
        else:
            if number:
                self.windows.popleft()
            window = self.windows[0]
            self._fill()
        pixels = self._on_device(window)
        if number is not None and len(self.windows) > 1 and self.windows[1].read.done():
            self._copy(self.windows[1])  # beside what is computed now
        where = torch.from_numpy(np.searchsorted(window.rows, wanted)).to(self.device, non_blocking=True)
        return pixels.index_select(0, where)

    def _fill(self) -> None:
        # several small steps at once: a thread that is woken in every step takes the interpreter from it each time
        if len(self.windows) > MOST_AHEAD // 2 + 1:
            return
        while len(self.windows) <= MOST_AHEAD:
            ahead = sum(len(window.rows) for window in list(self.windows)[1:]) * self.stored.length
            if len(self.windows) > 1 and ahead >= AHEAD_BYTES:
                return
            step = next(self._coming, None)
            if step is None:
                return
            rows = np.unique(self.places[self._rows_of(step)])
            if len(rows):
                self._unexpected.append(rows)
                self.windows.append(Window(rows, self._thread.submit(self._read_next, rows)))

    def _read_next(self, rows: np.ndarray) -> Tensor:
        """In the thread: ask the system for all that is announced, then read these rows; no step pays for the asking."""
        unexpected = self._unexpected
        for _ in range(len(unexpected)):
            self.stored.expect(unexpected.popleft())
        return self._read(rows)

    def _read(self, rows: np.ndarray) -> Tensor:
        pixels = torch.empty((len(rows), *self.stored.shape), dtype=torch.uint8, pin_memory=self._stream is not None)
        self.stored.read(rows, pixels.numpy())
        return pixels

    def _copy(self, window: Window) -> None:
        """Begin to copy a window to the device, if that has not begun."""
        if window.copied is not None:
            return
        pixels = window.read.result()
        if self._stream is None:
            window.copied = pixels.to(self.device, non_blocking=True)
            return
        with torch.cuda.stream(self._stream):
            window.copied = pixels.to(self.device, non_blocking=True)
            window.event = self._stream.record_event()

    def _on_device(self, window: Window) -> Tensor:
        self._copy(window)
        if window.event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(window.event)
            window.copied.record_stream(current)
        return window.copied


def _holds(window: Window, wanted: np.ndarray) -> bool:
    places = np.searchsorted(window.rows, wanted)
    return bool((places < len(window.rows)).all() and (window.rows[places] == wanted).all())
