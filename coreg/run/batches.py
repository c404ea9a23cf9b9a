"""From row numbers to a step's views: every process makes the views of its own share of the global batch.

Positions 0 .. N-1 number the training images; `samples` gives each its row in the annotation store, which keys the
augmentation. A view is a pure function of (seed, purpose, epoch, network, step, sample).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coreg.data.keyed import keyed_generator
from coreg.learn.collective import rank_and_world, share
from coreg.learn.coreg import CoRegBatch, Guess, WarmUpBatch
from coreg.views.augment import Augmentation


@dataclass
class TrainingImages:
    """The training images and how to look at them.

    images: uint8 (N, c, H, W), on the training device when it fits there. samples: int64 (N,) on the CPU.
    channels_last: memory format of the views.
    """

    images: Tensor
    samples: Tensor
    augmentation: Augmentation
    device: torch.device
    seed: int
    dtype: torch.dtype = torch.float32

    def pixels(self, rows: np.ndarray) -> Tensor:
        """uint8 (n, c, H, W) on the training device."""
        where = torch.from_numpy(rows).to(self.images.device, non_blocking=True)
        return self.images.index_select(0, where).to(self.device, non_blocking=True)

    def view(self, kind: str, rows: np.ndarray, key: tuple[int | str, ...], pixels: Tensor | None = None) -> Tensor:
        """A view of one of `coreg.views.augment.VIEWS`, (n, c, H, W), normalised, in channels_last format."""
        pixels = self.pixels(rows) if pixels is None else pixels
        samples = self.samples[torch.from_numpy(rows)]
        view = self.augmentation.view(kind, pixels, samples, (self.seed, *key), self.dtype)
        return view.contiguous(memory_format=torch.channels_last)

    def in_batches(self, kind: str, rows: np.ndarray, batch_size: int, key: tuple[int | str, ...]) -> Iterator[Tensor]:
        """Views of many rows in order, for passes without gradient."""
        for start in range(0, len(rows), batch_size):
            yield self.view(kind, rows[start : start + batch_size], key)


@dataclass
class Verdict:
    """What one network's division says about the training set; the other network trains on it.

    weight: (N,) w. targets: (N, C), p, predictions rescaled to the candidate sets. trusted: bool (N,), P.
    guess, features: (N, C) and (N, D), mean prediction of two weak views and features of the first, where they are made
    once an epoch.
    """

    weight: Tensor
    targets: Tensor
    trusted: np.ndarray
    guess: Tensor | None = None
    features: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor | None]:
        return vars(self) | {"trusted": torch.from_numpy(self.trusted)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor | None], device: torch.device) -> Verdict:
        moved = {name: None if value is None else value.to(device) for name, value in state.items() if name != "trusted"}
        return cls(**moved, trusted=state["trusted"].numpy())


def warm_up_batch(
    data: TrainingImages,
    rows: np.ndarray,
    candidates: Tensor,
    key: tuple[int | str, ...],
    view: str,
    n_informative: int,
) -> WarmUpBatch:
    """This process's share of the global batch `rows`.

    Args:
        rows: int64 (n,), the global batch. candidates: bool (N, C) on the training device.
        key: (epoch, network), names the views. view: `strong` as in the reference, or `weak`.
        n_informative: rows of the global batch over which the partial loss is averaged.
    """
    mine = rows[share(len(rows))]
    return WarmUpBatch(
        images=data.view(view, mine, ("warm-up", *key)),
        candidates=candidates[torch.from_numpy(mine).to(data.device, non_blocking=True)],
        n=len(rows),
        n_informative=n_informative,
    )


def co_train_batch(
    data: TrainingImages,
    x: np.ndarray,
    u: np.ndarray,
    verdict: Verdict,
    key: tuple[int | str, ...],
    mixup_alpha: float,
    ramp: float,
    gate: bool,
    fill_queue: bool,
    own: Verdict | None = None,
    labelled: tuple[np.ndarray, np.ndarray] | None = None,
) -> CoRegBatch:
    """This process's share of a co-training step on the global batches x of P and u of U.

    MixUp's lambda and permutation are drawn over the global rows [x_s1; x_s2; u_s1; u_s2]. A partner that another
    process holds is made again here from its key: it costs augmentation, and no images travel.

    Args:
        x, u: int64 (n_x,), (n_u,). verdict: of the peer's division, on the training device.
        key: (epoch, network, step). `mixup_alpha`: 0 means no MixUp.
        own: the own network's verdict, where weak views were predicted once for the epoch.
        labelled: rows and classes (n,) of an extra supervised term. The rest goes into the batch as it is.
    """
    n_x, n_u = len(x), len(u)
    x_mine, u_mine = x[share(n_x)], u[share(n_u)]
    x_pixels, u_pixels = data.pixels(x_mine), data.pixels(u_mine)

    def view(name: str, split: str, rows: np.ndarray, pixels: Tensor | None = None) -> Tensor:
        kind = "weak" if name.startswith("w") else "strong"
        return data.view(kind, rows, (f"{split}-{name}", *key), pixels)

    strong = torch.cat(
        [
            view("s1", "x", x_mine, x_pixels),
            view("s2", "x", x_mine, x_pixels),
            view("s1", "u", u_mine, u_pixels),
            view("s2", "u", u_mine, u_pixels),
        ]
    )
    offsets = np.cumsum([0, n_x, n_x, n_u, n_u])
    position = np.concatenate(
        [np.arange(start, stop)[share(stop - start)] for start, stop in zip(offsets[:-1], offsets[1:])]
    )
    partner, kept = position, 1.0
    if mixup_alpha:
        draw = keyed_generator(data.seed, "mixup", *key)
        kept = float(draw.beta(mixup_alpha, mixup_alpha))
        kept = max(kept, 1 - kept)
        partner = draw.permutation(offsets[-1])[position]
    if not mixup_alpha:
        partners = strong
    elif rank_and_world()[1] == 1:
        partners = strong.index_select(0, torch.from_numpy(partner).to(strong.device, non_blocking=True))
    else:
        partners = torch.empty_like(strong)
        for i, (split, name, rows) in enumerate((("x", "s1", x), ("x", "s2", x), ("u", "s1", u), ("u", "s2", u))):
            here = np.flatnonzero((partner >= offsets[i]) & (partner < offsets[i + 1]))
            place = torch.from_numpy(here).to(strong.device, non_blocking=True)
            partners[place] = view(name, split, rows[partner[here] - offsets[i]])
    where, where_u = (torch.from_numpy(rows).to(data.device, non_blocking=True) for rows in (x_mine, u_mine))
    guess, weak = None, (("w1", "w2") if own is None else ())
    if own is not None:
        both = (own.guess[where_u] + verdict.guess[where_u]) / 2
        guess = Guess(own.guess[where], both, own.features[where], own.features[where_u])
    extra = None
    if labelled is not None:
        mine = share(len(labelled[0]))
        classes = torch.from_numpy(labelled[1][mine]).to(data.device, non_blocking=True)
        extra = (data.view("weak", labelled[0][mine], ("labelled", *key)), classes)
    return CoRegBatch(
        x_weak=tuple(view(name, "x", x_mine, x_pixels) for name in weak),
        u_weak=tuple(view(name, "u", u_mine, u_pixels) for name in weak),
        strong=strong,
        partners=partners,
        position=torch.from_numpy(position).to(data.device, non_blocking=True),
        partner_position=torch.from_numpy(partner).to(data.device, non_blocking=True),
        x_targets=verdict.targets[where],
        x_weight=verdict.weight[where],
        n_x=n_x,
        n_u=n_u,
        share_kept=kept,
        ramp=ramp,
        gate=gate,
        fill_queue=fill_queue,
        guess=guess,
        labelled=extra,
        n_labelled=0 if labelled is None else len(labelled[0]),
    )
