"""One network's training step with any partial-label method: look, ask the method for its loss, let it learn."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from coreg.learn.losses import log_probabilities
from coreg.learn.partial.method import Mixed, Outputs, PartialMethod, Step
from coreg.nets.model import CoRegNet


@dataclass
class PartialBatch:
    """This process's share of a step, with the views that the method's `passes` asked for.

    index: int64 (n,), training rows of the global batch. views: (l, c, H, W) each; key, glance: one more each.
    mixed: (l, c, H, W), the first view mixed; partner, share_kept: as in `Mixed`.
    labelled: images (l', c, H, W) and classes (l',) of an extra supervised term, if any, of n_labelled rows.
    """

    index: Tensor
    step: Step
    views: tuple[Tensor, ...]
    key: Tensor | None = None
    glance: Tensor | None = None
    mixed: Tensor | None = None
    partner: Tensor | None = None
    share_kept: float = 1.0
    labelled: tuple[Tensor, Tensor] | None = None
    n_labelled: int = 0

    @property
    def size(self) -> int:
        """Images of the global step."""
        return len(self.index)


class PartialLearner(nn.Module):
    """A network, its momentum encoder where the method wants keys, and the method with its state."""

    def __init__(self, net: CoRegNet, method: PartialMethod) -> None:
        super().__init__()
        self.net = net
        self.method = method
        if method.passes(Step(0, 1)).key is not None:
            self.key_net = copy.deepcopy(net).requires_grad_(False)
            self._average = get_ema_multi_avg_fn(method.options.key_momentum)
        self._unread: list[PartialBatch] = []

    def forward(self, batch: PartialBatch) -> dict[str, Tensor]:
        """The step's `loss` (with gradient) and its parts (without), each a scalar and this process's share.

        The parts are those of the method, and `supervised`, a mean over the labelled rows.
        """
        outputs = self._look(batch)
        parts = self.method.loss(outputs, batch.index, batch.step)
        if batch.labelled is not None:
            images, classes = batch.labelled
            supervised = nn.functional.nll_loss(log_probabilities(self.net(images)[0]), classes, reduction="sum")
            parts["supervised"] = supervised / batch.n_labelled
            parts["loss"] = parts["loss"] + parts["supervised"]
        if not self.method.reads_again:
            with torch.no_grad():
                self.method.update(outputs, batch.index, batch.step)
        return {name: part.detach() for name, part in parts.items()} | {"loss": parts["loss"]}

    @torch.no_grad()
    def after_step(self, batch: PartialBatch, moved: bool = True) -> None:
        """To be called after every batch: a method that wants to reads those again by which the weights have moved.

        Args:
            moved: whether they have, or this batch's gradients wait for those of others.
        """
        if self.method.reads_again:
            self._unread.append(batch)
            for one in self._unread if moved else ():
                self.method.update(self._look(one), one.index, one.step)
            if moved:
                self._unread.clear()

    def _look(self, batch: PartialBatch) -> Outputs:
        """Every view is a batch of its own to the network's batch statistics."""
        logits, features = zip(*(self.net(view) for view in batch.views))
        outputs = Outputs(logits, features)
        with torch.no_grad():
            if batch.key is not None:
                self._average(list(self.key_net.parameters()), list(self.net.parameters()), None)
                outputs.keys = self.key_net(batch.key)[1]
            if batch.glance is not None:
                outputs.glance = self.net(batch.glance)[1]
        if batch.mixed is not None:
            outputs.mixed = Mixed(self.net(batch.mixed)[0], batch.partner, batch.share_kept)
        return outputs
