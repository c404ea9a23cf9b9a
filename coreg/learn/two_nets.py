"""Two networks that divide the training set for each other: what they remember of it, and the batches that they train on.

Co-Reg and DivideMix share it. Positions 0 .. N-1 number the training images; a batch holds this process's share of the
global one (see `coreg.learn.collective.my_slice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coreg.learn.collective import my_slice
from coreg.learn.coreg import CoRegBatch, Guess
from coreg.learn.pseudo import draw_mixup
from coreg.learn.tables import OwnedRows, Table, owned, share
from coreg.views.resident import TrainingImages


@dataclass
class Verdict:
    """One network's division of the training set; the other network trains on it."""

    weight: Tensor  # (N,) w
    targets: Table  # (N, C), p, predictions rescaled to the candidate sets
    trusted: np.ndarray  # bool (N,), P
    guess: Table | None = None  # (N, C), mean prediction of two weak views, where it is made once an epoch
    features: Table | None = None  # (N, D), of the first of these views, likewise

    def state_dict(self) -> dict[str, Any]:
        """Whole tables; those whose rows processes own come together on process 0 alone. All have to call it."""
        whole = {name: value.gathered() if isinstance(value, OwnedRows) else value for name, value in vars(self).items()}
        return whole | {"trusted": torch.from_numpy(self.trusted)}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device, sharded: bool = False) -> Verdict:
        """What `state_dict` gave; `sharded` where this process is to have the rows that it owns."""
        tables = {name: value for name, value in state.items() if name in ("targets", "guess", "features")}
        for name, value in tables.items():
            if value is not None:
                tables[name] = owned(value, device) if sharded else value.to(device)
        # nothing stays in the file where it was
        return cls(state["weight"].clone().to(device), trusted=state["trusted"].clone().numpy(), **tables)


class Divisions:
    """What two networks remember of their divisions."""

    def __init__(self, nets: Sequence[nn.Module], count: int, sharded: bool = False) -> None:
        self.nets, self.count = nets, count  # both of them; N
        self.sharded = sharded  # whether each process holds the rows of tables that it owns
        self.losses: list[list[np.ndarray]] = [[] for _ in nets]  # of each, (N,) in the last epochs, oldest first
        self.verdicts: list[Verdict] = []  # of this epoch's division, none before it
        self.health: dict[str, float] = {}  # curves of it
        self.weights: list[np.ndarray] = []  # w (N,) of both networks' last division; none before the first
        # of the networks that looked best without labels so far: the number of finished epochs, the score, the weights
        self.chosen: dict[str, Any] | None = None

    def remember(self, number: int, losses: np.ndarray, epochs: int) -> list[np.ndarray]:
        """Division losses, K of (N,), of network `number` in the last `epochs` epochs, these (N,) the newest."""
        self.losses[number] = [*self.losses[number], losses][-epochs:]
        return self.losses[number]

    def finish_epoch(self) -> dict[str, float]:
        """Forget this epoch's verdicts; gives the curves of its division."""
        curves, self.verdicts, self.health = self.health, [], {}
        return curves

    def consider(self, epoch: int, score: float) -> None:
        """Remember the networks as they are now, after `epoch` epochs, if no epoch before had a larger score."""
        if self.chosen is None or score > self.chosen["score"]:
            weights = [{k: v.detach().clone() for k, v in net.state_dict().items()} for net in self.nets]
            self.chosen = {"epoch": epoch, "score": score, "nets": weights}

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain values, for a checkpoint."""
        return {
            "losses": [torch.from_numpy(np.stack(rows)) if rows else None for rows in self.losses],
            "verdicts": [verdict.state_dict() for verdict in self.verdicts],
            "health": self.health,
            "weights": [torch.from_numpy(weight) for weight in self.weights],
            "chosen": self.chosen,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take what `state_dict` gave."""
        self.losses = [[] if rows is None else list(rows.numpy()) for rows in state["losses"]]
        self.verdicts = [Verdict.from_state(saved, device, self.sharded) for saved in state["verdicts"]]
        self.weights = [weight.numpy() for weight in state["weights"]]
        self.health, self.chosen = state["health"], state["chosen"]


def _my_places(lengths: tuple[int, ...]) -> np.ndarray:
    """The places of this process's share in blocks of these lengths, one after the other."""
    starts = np.cumsum((0, *lengths[:-1]))
    return np.concatenate([start + np.arange(n)[my_slice(n)] for start, n in zip(starts, lengths)])


def partner_rows(
    seed: int, trusted: np.ndarray, rest: np.ndarray, key: tuple[int | str, ...], mixup_alpha: float
) -> np.ndarray:
    """Rows of the images whose views `co_train_batch` of the same arguments makes again to mix with, int64 (l,)."""
    lengths = (len(trusted), len(trusted), len(rest), len(rest))
    position = _my_places(lengths)
    if not mixup_alpha or len(position) == sum(lengths):
        return trusted[:0]
    _, order = draw_mixup(mixup_alpha, sum(lengths), (seed, "mixup", *key))
    return np.concatenate([trusted, trusted, rest, rest])[order[position]]


def co_train_batch(
    data: TrainingImages,
    trusted: np.ndarray,
    rest: np.ndarray,
    verdict: Verdict,
    key: tuple[int | str, ...],
    mixup_alpha: float,
    view: str = "strong",
    own: Verdict | None = None,
) -> CoRegBatch:
    """This process's share of a co-training step on the global batches `trusted` of P and `rest` of U.

    MixUp's lambda and permutation are drawn over the global rows [x_1; x_2; u_1; u_2] of the views that are trained on, x
    of P and u of U.

    Args:
        trusted: int64 (n_x,).
        rest: int64 (n_u,).
        verdict: of the peer's division, on the training device; all processes take part.
        key: (epoch, network, step). `mixup_alpha`: 0 means no MixUp.
        view: what is trained on: `strong`, or `weak` for the very views that are predicted.
        own: the own network's verdict, where weak views were predicted once for the epoch.
    """
    lengths = (len(trusted), len(trusted), len(rest), len(rest))
    my_trusted, my_rest = trusted[my_slice(len(trusted))], rest[my_slice(len(rest))]
    twice = ((trusted, my_trusted, "x1"), (trusted, my_trusted, "x2"), (rest, my_rest, "u1"), (rest, my_rest, "u2"))
    x, u = data.pixels(my_trusted), data.pixels(my_rest)
    pixels = torch.cat([x, x, u, u])

    def name(split: str, kind: str) -> tuple[int | str, ...]:
        return (f"{split[0]}-{kind[0]}{split[1]}", *key)

    def views(kind: str) -> Tensor:
        return data.views(kind, [(my_rows, name(split, kind)) for _, my_rows, split in twice], pixels)

    made = views("weak") if own is None or view == "weak" else None
    trained = made if made is not None and view == "weak" else views(view)
    weak = [] if own is not None or made is None else made.split([len(my_rows) for _, my_rows, _ in twice])
    kept, order = draw_mixup(mixup_alpha, sum(lengths), (data.seed, "mixup", *key))
    position = _my_places(lengths)
    blocks = [(view, rows, name(split, view)) for rows, _, split in twice]
    guess = None
    if own is not None:
        both = (share(own.guess, rest) + share(verdict.guess, rest)) / 2
        guess = Guess(share(own.guess, trusted), both, share(own.features, trusted), share(own.features, rest))
    return CoRegBatch(
        x_weak=tuple(weak[:2]),
        u_weak=tuple(weak[2:]),
        strong=trained,
        partners=data.partners(trained, blocks, order[position]) if mixup_alpha else trained,
        position=data.places(position),
        partner_position=data.places(order[position]),
        x_targets=share(verdict.targets, trusted),
        x_weight=verdict.weight[data.places(my_trusted)],
        n_x=len(trusted),
        n_u=len(rest),
        share_kept=kept,
        guess=guess,
    )
