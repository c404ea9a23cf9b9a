"""Training steps of tuned models: modules whose forward takes a batch and gives its loss, with what is trained as state.

A batch holds this process's share of the rows (see `coreg.learn.collective.my_slice`); loss and accuracy are sums over that
share divided by global counts, so that their sums over all processes are means over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # label of what is not learnt; torch's cross-entropy leaves it out


@dataclass
class ClipBatch:
    """This process's share of a step on labelled images."""

    images: Tensor  # float (l, 3, H, W), preprocessed; where `encoded`, their features (l, E) of length 1
    encoded: bool
    classes: Tensor  # int64 (l,), `IGNORED` for an image that is there only because a process cannot be without one
    size: int  # images of the global batch


@dataclass
class ChatBatch:
    """This process's share of a step on conversations."""

    inputs: dict[str, Any]  # what the model's forward takes, l rows of L tokens padded at the end
    labels: Tensor  # int64 (l, L), the answers' tokens, and `IGNORED` for every other
    size: int  # conversations of the global batch
    tokens: int  # answer tokens of the global batch


class Learner(nn.Module):
    """A model of which a few parameters are trained; its state is those parameters, so that checkpoints are small."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: weight for name, weight in self.trained.named_parameters() if weight.requires_grad}

    def train(self, mode: bool = True) -> Learner:
        """Switch dropout of adapters alone: a frozen tower reads as it does in evaluation, whatever it was trained with."""
        super().train(False)
        for name, part in self.named_modules():
            if "lora_dropout" in name.split("."):
                part.train(mode)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.trainable().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave.

        Raises:
            KeyError: it names other parameters.
        """
        own = self.trainable()
        if own.keys() != state.keys():
            raise KeyError(f"the saved parameters are not those that are trained: {sorted(own.keys() ^ state.keys())[:3]}")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(state[name])


class ClipLearner(Learner):
    """Image features against the text features of all classes: logits s * r . t with scale s, as in zero-shot use."""

    def __init__(
        self, trained: nn.Module, text: Callable[[], Tensor], image: Callable[[Tensor], Tensor], scale: float
    ) -> None:
        """Use a model's two sides; they may be parts of `trained`.

        Args:
            trained: holds the parameters that are trained. text: -> (C, E) features of length 1.
            image: (l, 3, H, W) -> (l, E), of any length. scale: exp(logit_scale).
        """
        super().__init__(trained)
        self.text, self.image, self.scale = text, image, scale

    def logits(self, images: Tensor, encoded: bool) -> Tensor:
        """(l, C), in float32 at least."""
        features = images if encoded else nn.functional.normalize(self.image(images), dim=-1)
        text = self.text()
        wide = torch.promote_types(text.dtype, torch.float32)
        # not in autocast's bfloat16, in which a logit of 100 is rounded to halves
        with torch.autocast(text.device.type, enabled=False):
            return self.scale * features.to(wide) @ text.to(wide).T

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Cross-entropy: `loss` with gradient, `accuracy` on the batch; both are this process's shares."""
        logits = self.logits(batch.images, batch.encoded)
        loss = nn.functional.cross_entropy(logits, batch.classes, reduction="sum") * (1 / batch.size)
        right = (logits.detach().argmax(dim=1) == batch.classes).sum().to(loss.dtype) * (1 / batch.size)
        return {"loss": loss, "accuracy": right}


class ChatLearner(Learner):
    """A chat model that learns to answer: cross-entropy of the answers' tokens and of nothing else."""

    def __init__(self, network: nn.Module, keeps_logits: bool) -> None:
        """Train a chat model's parameters that have a gradient.

        Args:
            network: an image-text-to-text model of transformers. keeps_logits: whether it can be asked for the last
                tokens' logits alone.
        """
        super().__init__(network)
        self.keeps_logits = keeps_logits

    def logits(self, batch: ChatBatch) -> tuple[Tensor, Tensor]:
        """What the model says where an answer's token comes next, (k, V) in float32, and those tokens, int64 (k,)."""
        first = max(1, int((batch.labels != IGNORED).long().argmax(dim=1).min()))
        kept = batch.labels.shape[1] - first + 1  # a token is predicted by the one before it
        inputs = batch.inputs | ({"logits_to_keep": kept} if self.keeps_logits else {})
        logits = self.trained(**inputs, use_cache=False, return_dict=True).logits[:, -kept:-1]
        labels = batch.labels[:, -(kept - 1) :]
        answers = labels != IGNORED
        return logits[answers].float(), labels[answers]

    def forward(self, batch: ChatBatch) -> dict[str, Tensor]:
        """`loss` with gradient, and `accuracy`: this process's shares of means over all answer tokens of the batch."""
        logits, labels = self.logits(batch)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") * (1 / batch.tokens)
        right = (logits.detach().argmax(dim=1) == labels).sum().to(loss.dtype) * (1 / batch.tokens)
        return {"loss": loss, "accuracy": right}
