"""What all methods that learn several labels an image share: one object has the network, its loss and what it remembers.

As with `coreg.learn.partial.method`: what is remembered of every training image stands in tables (N, L) among the buffers,
so that checkpoints keep it; `loss` only reads them, `update` only writes them; they are the same on all processes.

Shapes: N training images, L labels; a global batch of n rows, of which l are this process's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coreg.learn.collective import gather_rows, my_rows
from coreg.learn.multi.best import BestEpoch
from coreg.learn.multi.plain import CELLS
from coreg.learn.multi_options import MultiOptions
from coreg.learn.schedules import Step
from coreg.weak.multi import ObservedLabels


@dataclass
class MultiBatch:
    """This process's part of a step."""

    index: Tensor  # int64 (n,), training rows of the global batch
    step: Step
    view: Tensor  # (l, c, H, W)

    @property
    def size(self) -> int:
        """Images of the global step."""
        return len(self.index)


class MultiMethod(nn.Module):
    """A network that learns from observed labels, and the state that its loss needs; derived classes hold what differs.

    net: what is trained; the first of what it returns are logits (n, L).
    """

    cells = "an"  # what each cell loses, where that is all there is to a method: one of `CELLS`

    def __init__(
        self,
        net: nn.Module,
        weak: ObservedLabels,
        options: MultiOptions,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Begin with these observed labels.

        Args:
            seed: of tables that begin at random. dtype: of the tables.

        Raises:
            UserError: the method needs an annotator's similarities, and there are none.
        """
        super().__init__()
        self.net, self.options = net, options
        self.best: BestEpoch | None = None  # where validation labels choose the epoch
        # they come from the data in every start
        self.register_buffer("observed", torch.from_numpy(weak.table).clone(), persistent=False)
        self.init_state(weak, seed, dtype)

    def init_state(self, weak: ObservedLabels, seed: int, dtype: torch.dtype) -> None:
        """Make the tables of the method."""

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        """The step's `loss` and its parts, scalars: sums over this process's cells divided by the global count.

        Added up over all processes, every one is a mean over the cells of the global batch.

        Args:
            logits: (l, L). index: int64 (n,), training rows of the global batch.
        """
        cells = CELLS[self.cells](logits, self.observed[my_rows(index)], self.options)
        return {"loss": cells.sum() / (len(index) * logits.shape[1])}

    def update(self, logits: Tensor, index: Tensor, step: Step) -> None:
        """Write into the tables what follows from the logits; called without gradient, on all processes."""

    def reads_all(self, step: Step) -> bool:
        """Whether `finish_epoch` needs the logits of all training images."""
        return False

    def finish_epoch(self, step: Step, logits: Tensor | None = None) -> dict[str, float]:
        """Draw conclusions from the epoch that `step` belongs to; gives curves.

        Args:
            logits: (N, L) of all training images where `reads_all`, the same on all processes.
        """
        return {}

    def forward(self, batch: MultiBatch) -> dict[str, Tensor]:
        """The step's `loss` (with gradient) and its parts (without), each a scalar and this process's share."""
        logits = self.net(batch.view)[0]
        parts = self.loss(logits, batch.index, batch.step)
        with torch.no_grad():
            self.update(logits, batch.index, batch.step)
        return {name: part.detach() for name, part in parts.items()} | {"loss": parts["loss"]}


def count_share(p: Tensor, expected: float, n: int) -> Tensor:
    """This process's share of ((mean number of labels an image - expected) / L)^2, R of EPR and ROLE. A scalar.

    Args:
        p: (l, L), of its rows. expected: k, labels an image. n: rows of the global batch.
    """
    return ((gather_rows(p, n).sum(dim=1).mean() - expected) / p.shape[1]).square() * (len(p) / n)
