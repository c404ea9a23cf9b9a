"""Knowledge distillation without labels: a small network mimics the probabilities of a fixed teacher.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), with the annotator's probabilities of the
image as it is for a teacher, and no labels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from coreg.learn import losses
from coreg.learn.pseudo import sharpen
from coreg.nets.model import Model


@dataclass
class DistillBatch:
    """This process's share of a step."""

    images: Tensor  # (l, c, H, W)
    teacher: Tensor  # (l, C), its probabilities
    size: int  # images of the global step


class DistillLearner(nn.Module):
    """A network whose forward is a whole training step."""

    def __init__(self, net: Model, temperature: float) -> None:
        super().__init__()
        self.net = net
        self.temperature = temperature

    def forward(self, batch: DistillBatch) -> dict[str, Tensor]:
        """The step's `loss` (with gradient) and `divergence` (without), scalars, this process's shares of means over rows.

        L = T^2 KL(t || f), t the teacher's probabilities and f the network's, both tempered by T; the factor keeps the size
        of the gradient as it is at T = 1.
        """
        logits, _ = self.net(batch.images)
        teacher = sharpen(batch.teacher, self.temperature)
        divergence = losses.divergence(teacher, losses.log_probabilities(logits / self.temperature)).sum() / batch.size
        return {"loss": self.temperature**2 * divergence, "divergence": divergence.detach()}
