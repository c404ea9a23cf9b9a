"""The weights of the epoch that was best by validation labels, kept in checkpoints beside those that are trained."""

from __future__ import annotations

import torch
from torch import nn

_PARTS = 10**9  # a score is kept as a whole number of billionths, which no change of type rounds


class BestEpoch(nn.Module):
    """A copy of what training changes of a network, of the last epoch with the largest score.

    Public code takes the first of them. Of few images many epochs have the same score, and later ones have learnt more.
    """

    def __init__(self, net: nn.Module) -> None:
        """Begin with the network as it is, and no score."""
        super().__init__()
        self.register_buffer("score", torch.tensor(-1))
        self.register_buffer("epoch", torch.tensor(0))
        for name, value in net.state_dict().items():
            self.register_buffer(_inside(name), value.detach().clone())

    def consider(self, net: nn.Module, score: float, epoch: int) -> None:
        """Keep the network if no score, 0 to 1, was larger before. `epoch` counts from 1."""
        score = round(score * _PARTS)
        if score < int(self.score):
            return
        self.score.fill_(score)
        self.epoch.fill_(epoch)
        for name, value in net.state_dict().items():
            getattr(self, _inside(name)).copy_(value)

    def restore(self, net: nn.Module) -> int:
        """Put what is kept into the network; gives the epoch that it is of, 0 for that before the first."""
        net.load_state_dict({name: getattr(self, _inside(name)) for name in net.state_dict()})
        return int(self.epoch)


def _inside(name: str) -> str:
    """The name of a buffer, which has no dots."""
    return f"net/{name.replace('.', '/')}"
