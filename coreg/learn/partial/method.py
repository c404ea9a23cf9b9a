"""What all methods that learn from candidate sets share: one object has the network, its loss and what it remembers.

A method remembers something of every training image in tables (N, ...) among its buffers, so that checkpoints keep them.
`loss` only reads tables, `update` only writes them, and both are given the network's outputs. Tables are the same on all
processes: what one process learned about its rows is gathered in the order of the global batch and written everywhere.

Shapes: N training images, C classes, D projected features; a global batch of n rows, of which l are this process's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from coreg.learn.losses import log_probabilities
from coreg.learn.partial_options import PartialOptions
from coreg.learn.schedules import Step
from coreg.nets.model import Model
from coreg.nets.tuners.frozen import moving_weights, sharing_copy


@dataclass(frozen=True)
class Passes:
    """The views of a batch that a method wants to be passed through its networks in a step."""

    views: tuple[str, ...] = ("weak",)  # kinds of view (`weak`, `strong`) that go through the network with gradient
    key: str | None = None  # kind of the view that goes through the momentum encoder
    glance: str | None = None  # kind of one more view through the network, without gradient
    # partners of the first view: from the same `batch`, or from a second pass over the `epoch`
    mixup: Literal["none", "batch", "epoch"] = "none"


@dataclass
class Mixed:
    """The network's outputs on mixed views: share_kept x + (1 - share_kept) partner."""

    logits: Tensor  # (l, C)
    partner: Tensor  # int64 (l,), places in the global batch (`batch`) or rows of the training set (`epoch`)
    share_kept: float


@dataclass
class Outputs:
    """The network's outputs on this process's rows."""

    logits: tuple[Tensor, ...]  # (l, C) of each view
    features: tuple[Tensor, ...]  # (l, D) of each view
    keys: Tensor | None = None  # (l, D), features by the momentum encoder
    glance: Tensor | None = None  # (l, D), features of one more view
    mixed: Mixed | None = None


@dataclass
class PartialBatch:
    """This process's share of a step, with the views that the method's `passes` ask for."""

    index: Tensor  # int64 (n,), training rows of the global batch
    step: Step
    views: tuple[Tensor, ...]  # (l, c, H, W) each
    key: Tensor | None = None  # (l, c, H, W)
    glance: Tensor | None = None  # (l, c, H, W)
    mixed: Tensor | None = None  # (l, c, H, W), the first view mixed
    partner: Tensor | None = None  # as in `Mixed`
    share_kept: float = 1.0  # likewise
    labelled: tuple[Tensor, Tensor] | None = None  # images (l', c, H, W) and classes (l',) of an extra supervised term
    n_labelled: int = 0  # rows of that in the global batch
    draws: tuple[int | str, ...] = ()  # names what a method draws at random in this step

    @property
    def size(self) -> int:
        """Images of the global step."""
        return len(self.index)


class PartialMethod(nn.Module):
    """A network that learns from candidate sets, and the state that its loss needs; derived classes hold what differs.

    net: what is trained. key_net: its momentum encoder, where the method's `passes` ask for keys.
    """

    linear_head = False  # whether the network's classifier has to be one linear layer
    prediction = ""  # what `judged` changes about the network, said to those who get its export
    # whether `survey` gets the network's outputs on all training images after every epoch
    surveys = False
    reads_again = False  # whether `update` gets the network's outputs on the batch after its weights have moved, not before

    def __init__(
        self,
        net: Model,
        candidates: Tensor,
        options: PartialOptions,
        certain: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Begin with these candidate sets.

        Args:
            candidates: bool (N, C), at least one True a row. certain: bool (N,), images that a person labelled: their
                candidate sets are never doubted. dtype: of the tables.
        """
        super().__init__()
        self.net, self.options = net, options
        certain = torch.zeros(len(candidates), dtype=torch.bool) if certain is None else certain
        # they come from the annotation store in every start
        self.register_buffer("candidates", candidates.clone(), persistent=False)
        self.register_buffer("certain", certain.clone(), persistent=False)
        self.init_state(candidates, dtype)
        if self.passes(Step(0, 1)).key is not None:
            self.key_net = sharing_copy(net)
            self._average = get_ema_multi_avg_fn(options.key_momentum)
        self._unread: list[PartialBatch] = []

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        """Make the tables of the method. Candidates: bool (N, C)."""

    def passes(self, step: Step) -> Passes:
        """The views that this step needs."""
        return Passes()

    def trained(self) -> nn.Module:
        """The networks whose weights the optimiser moves."""
        return self.net

    def stage(self, step: Step) -> Step:
        """When a step happens in its stage of the training, which the learning rate follows.

        A method may train in two stages; the second one begins with fresh networks, and with `restart`.
        """
        return step

    def restart(self) -> None:
        """Forget what the next stage of the training is not to know."""

    def outputs_on(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What passes through the networks give: logits (l, C) and features (l, D) of a view."""
        return self.net(images)

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        """The step's `loss` and its parts, scalars: sums over this process's rows divided by global counts.

        Added up over all processes, every one is a mean over the global batch (`reliable` and `guessed` of PiCO+: over its
        rows that are reliable, and that are not).

        Args:
            index: int64 (n,), training rows of the global batch.
        """
        raise NotImplementedError

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        """Write into the tables what follows from the network's outputs; called without gradient, on all processes."""

    def survey(self, logits: Tensor, step: Step) -> None:
        """Take in the logits (N, C) of all training images, in evaluation mode; called before `finish_epoch`."""

    def finish_epoch(self, step: Step) -> dict[str, float]:
        """Draw conclusions from the epoch that `step` belongs to; gives curves."""
        return {}

    def judged(self) -> Model:
        """The network whose logits are the method's prediction, as it is now: what is tested, reported and exported.

        The trained one, where a method corrects its logits by nothing that it remembers.
        """
        return self.net

    def forward(self, batch: PartialBatch) -> dict[str, Tensor]:
        """The step's `loss` (with gradient) and its parts (without), each a scalar and this process's share.

        The parts are those of `loss`, and `supervised`, a mean over the labelled rows.
        """
        outputs = self._outputs(batch)
        parts = self.loss(outputs, batch.index, batch.step)
        if batch.labelled is not None:
            images, classes = batch.labelled
            parts["supervised"] = self._supervised(images, classes) / batch.n_labelled
            parts["loss"] = parts["loss"] + parts["supervised"]
        if not self.reads_again:
            with torch.no_grad():
                self.update(outputs, batch.index, batch.step)
        return {name: part.detach() for name, part in parts.items()} | {"loss": parts["loss"]}

    @torch.no_grad()
    def after_step(self, batch: PartialBatch, moved: bool = True) -> None:
        """To be called after every batch: a method that wants to reads those again by which the weights have moved.

        Args:
            moved: whether they have, or this batch's gradients wait for those of others.
        """
        if self.reads_again:
            self._unread.append(batch)
            for one in self._unread if moved else ():
                self.update(self._outputs(one), one.index, one.step)
            if moved:
                self._unread.clear()

    def _supervised(self, images: Tensor, classes: Tensor) -> Tensor:
        """The sum of the cross-entropies of labelled images."""
        return nn.functional.nll_loss(log_probabilities(self.net(images)[0]), classes, reduction="sum")

    def _outputs(self, batch: PartialBatch) -> Outputs:
        """Every view is a batch of its own to the network's batch statistics."""
        logits, features = zip(*(self.outputs_on(view) for view in batch.views))
        outputs = Outputs(logits, features)
        with torch.no_grad():
            if batch.key is not None:
                self._average(*moving_weights(self.key_net, self.net), None)
                outputs.keys = self.key_net(batch.key)[1]
            if batch.glance is not None:
                outputs.glance = self.net(batch.glance)[1]
        if batch.mixed is not None:
            outputs.mixed = Mixed(self.net(batch.mixed)[0], batch.partner, batch.share_kept)
        return outputs


def uniform(candidates: Tensor, dtype: torch.dtype) -> Tensor:
    """Distributions that are uniform on the candidate sets. bool (N, C) -> (N, C)."""
    return candidates.to(dtype) / candidates.sum(dim=1, keepdim=True)


def within(log_scores: Tensor, members: Tensor) -> Tensor:
    """Softmax over the members of each row alone, zero elsewhere; a row without members is zero. (n, C), bool (n, C)."""
    some = members.any(dim=1, keepdim=True)
    masked = log_scores.masked_fill(~members & some, -torch.inf)
    return torch.softmax(masked, dim=1) * some
