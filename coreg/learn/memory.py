"""What a learner remembers across steps: class prototypes and the queue of momentum features.

Both are written in place with rows in global order, so that every process holds the same values without sending them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Module):
    """One feature a class, O (C, D), a moving average of the features pseudo-labelled with it (AAAI eq. 9).

    A class that was never seen stays the zero vector, as in the reference: its similarity to everything is 0.
    """

    def __init__(self, n_classes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(n_classes, dim))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, momentum: float, taken: Tensor | None = None) -> None:
        """Take in rows one after another, o_c <- gamma o_c + (1 - gamma) f, then normalise every prototype.

        The closed form of that loop: with f_1 .. f_k the rows of class c in order,
        o_c <- gamma^k o_c + (1 - gamma) sum_t gamma^(k - t) f_t.

        Args:
            features: (n, D) in global order. labels: (n,) int64. momentum: gamma in 0..1.
            taken: bool (n,), rows that count, as if the others were not there; all by default. (Leaving them out would
                make a GPU wait until the number of those that are left is known.)
        """
        member = F.one_hot(labels, len(self.value)).to(self.value.dtype)
        if taken is not None:
            member = member * taken[:, None]
        seen = member.cumsum(dim=0)
        count = member.sum(dim=0)
        later = count[labels] - seen.gather(1, labels[:, None])[:, 0]
        weighted = ((1 - momentum) * momentum**later)[:, None] * features.to(self.value.dtype)
        updated = (momentum**count)[:, None] * self.value + member.T @ weighted
        self.value.copy_(F.normalize(updated, dim=-1))


class Queue(nn.Module):
    """The last `size` keys of the momentum encoder with their pseudo-label c and mark m (in P or not)."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))
        self.register_buffer("confident", torch.zeros(size, dtype=torch.bool))
        # a tensor, so that checkpoints keep it; the int beside it spares the device a synchronisation in every step
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        self._taken = 0

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor, confident: Tensor) -> None:
        """Write rows after the last ones, wrapping round; of more rows than fit, the last `size` stay.

        Args:
            keys: (n, D). labels: (n,) int64. confident: (n,) bool.
        """
        first = self._taken + max(0, len(keys) - self.size)
        self._taken += len(keys)
        self.taken.fill_(self._taken)
        place = torch.arange(first, self._taken, device=keys.device) % self.size
        self.keys[place] = keys[-self.size :].to(self.keys.dtype)
        self.labels[place] = labels[-self.size :]
        self.confident[place] = confident[-self.size :]

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, labels, confident) of what has been written so far, at most `size` rows, no junk."""
        valid = min(self._taken, self.size)
        return self.keys[:valid], self.labels[:valid], self.confident[:valid]

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._taken = int(self.taken)
