"""The same Co-Reg step as one would write it down from the papers, to measure against and to check against.

Images are augmented one by one with Pillow in the main process, every view of every split goes through a network by itself,
prototypes move in a loop over samples and masks of the contrastive loss are filled row by row: what published code does.
It shares nothing with the library but the networks that it is given.

Shapes: n_x and n_u rows of P and U, C classes, D projected features, Q places in the queue.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.augment import pil_batch

VIEWS = ("u_w1", "u_w2", "x_w1", "x_w2", "x_s1", "x_s2", "u_s1", "u_s2")


class PlainCoReg:
    """One network's side of the method, with the hyper-parameters of the reference."""

    temperature, mixup_alpha = 0.5, 4.0
    prototype_weight, prototype_momentum, prototype_temperature = 0.1, 0.999, 0.3
    contrast_weight, contrast_temperature, key_momentum = 0.1, 0.07, 0.999

    def __init__(self, net: nn.Module, peer: nn.Module, n_classes: int, dim: int, queue_size: int) -> None:
        like = next(net.parameters())
        self.net, self.peer, self.key_net = net, peer, copy.deepcopy(net)
        self.prototypes = like.new_zeros(n_classes, dim)
        self.queue, self.queue_targets = like.new_zeros(queue_size, dim), like.new_zeros(queue_size, n_classes)
        self.queue_marks = torch.zeros(queue_size, dtype=torch.bool, device=like.device)
        self.place, self.filled = 0, 0

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        x: np.ndarray,
        u: np.ndarray,
        p: Tensor,
        w: Tensor,
        ramp: float,
        rng: np.random.Generator,
    ) -> float:
        """Train on one batch of P and one of U; gives the loss.

        Args:
            x, u: uint8 (n_x, h, w, c) and (n_u, h, w, c). p: (n_x, C), the peer's rescaled prediction. w: (n_x,).
            ramp: factor of lambda_u.
        """
        padding = x.shape[1] // 8
        pixels = {"x": x, "u": u}
        views = {name: pil_batch(pixels[name[0]], padding, name[2] == "s", rng).to(p.device) for name in VIEWS}
        kept = float(rng.beta(self.mixup_alpha, self.mixup_alpha))
        order = torch.from_numpy(rng.permutation(2 * len(x) + 2 * len(u))).to(p.device)
        loss = self.loss(views, p, w, max(kept, 1 - kept), order, ramp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def loss(self, views: dict[str, Tensor], p: Tensor, w: Tensor, kept: float, order: Tensor, ramp: float) -> Tensor:
        """The whole objective once the gate is open; moves prototypes, key encoder and queue.

        Args:
            views: (n, c, h, w) each, the names of `VIEWS`. kept: MixUp's lambda. order: its permutation.
        """
        self.net.train()
        self.peer.eval()
        with torch.no_grad():
            x_targets, u_targets, features = self.pseudo_labels(views, p, w)
        n_p = 2 * len(x_targets)
        images = torch.cat([views["x_s1"], views["x_s2"], views["u_s1"], views["u_s2"]])
        targets = torch.cat([x_targets, x_targets, u_targets, u_targets])
        mixed_targets = kept * targets + (1 - kept) * targets[order]
        logits, projected = self.net(kept * images + (1 - kept) * images[order])
        trusted = -(mixed_targets[:n_p] * logits[:n_p].log_softmax(1)).sum(1).mean()
        distrusted = (logits[n_p:].softmax(1) - mixed_targets[n_p:]).square().mean()

        self.move_prototypes(features, x_targets)
        similar = (projected @ self.prototypes.T / self.prototype_temperature).softmax(1)
        prototype = F.kl_div(similar[:n_p].log(), mixed_targets[:n_p], reduction="batchmean")
        prototype = prototype + (similar[n_p:] - mixed_targets[n_p:]).square().mean()

        contrast = self.contrast(views, torch.cat([x_targets, u_targets]), len(x_targets))
        return trusted + ramp * distrusted + self.prototype_weight * prototype + self.contrast_weight * contrast

    @torch.no_grad()
    def move_prototypes(self, features: Tensor, targets: Tensor) -> None:
        """Take P's features (n_x, D) into the prototypes of their classes, one image after another."""
        gamma = self.prototype_momentum
        for feature, target in zip(features, targets):
            label = target.argmax()
            self.prototypes[label] = gamma * self.prototypes[label] + (1 - gamma) * feature
        self.prototypes = F.normalize(self.prototypes, dim=1)

    def pseudo_labels(self, views: dict[str, Tensor], p: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sharpened targets of P and of U, and the features of P's first weak view."""
        u = [network(views[name])[0].softmax(1) for name in ("u_w1", "u_w2") for network in (self.net, self.peer)]
        (first, features), (second, _) = self.net(views["x_w1"]), self.net(views["x_w2"])
        own = (first.softmax(1) + second.softmax(1)) / 2
        x_targets = (w[:, None] * p + (1 - w[:, None]) * own) ** (1 / self.temperature)
        u_targets = (sum(u) / len(u)) ** (1 / self.temperature)
        return x_targets / x_targets.sum(1, keepdim=True), u_targets / u_targets.sum(1, keepdim=True), features

    def contrast(self, views: dict[str, Tensor], targets: Tensor, n_x: int) -> Tensor:
        """Queries from the first strong views, keys from the second ones, and the loss between them."""
        queries = self.net(torch.cat([views["x_s1"], views["u_s1"]]))[1]
        with torch.no_grad():
            for key, query in zip(self.key_net.parameters(), self.net.parameters()):
                key.data = self.key_momentum * key.data + (1 - self.key_momentum) * query.data
            keys = self.key_net(torch.cat([views["x_s2"], views["u_s2"]]))[1]
        return self.contrastive_loss(queries, keys, targets, n_x)

    def contrastive_loss(self, queries: Tensor, keys: Tensor, targets: Tensor, n_x: int) -> Tensor:
        """The noise-tolerant loss of b anchors (b, D) against queries, keys and queue; then enqueue the keys.

        Args:
            targets: (b, C), pseudo-labels, those of the n_x images of P first.
        """
        b = len(targets)
        marks = torch.arange(b, device=targets.device) < n_x
        others = torch.cat([queries, keys, self.queue[: self.filled].clone()])
        labels = torch.cat([targets, targets, self.queue_targets[: self.filled]]).argmax(1)
        all_marks = torch.cat([marks, marks, self.queue_marks[: self.filled]])
        same = labels[:b, None] == labels[None, :]
        positive = same & marks[:, None] & all_marks[None, :]
        kept = ~same | positive
        for i in range(b):
            positive[i, b + i] = kept[i, b + i] = True
            positive[i, i] = kept[i, i] = False
        similarity = queries @ others.T / self.contrast_temperature
        log_total = (similarity.exp() * kept).sum(1, keepdim=True).log()
        loss = -((similarity - log_total) * positive).sum(1) / positive.sum(1)

        place = (self.place + torch.arange(b, device=targets.device)) % len(self.queue)
        self.queue[place], self.queue_targets[place], self.queue_marks[place] = keys, targets, marks
        self.place, self.filled = (self.place + b) % len(self.queue), min(self.filled + b, len(self.queue))
        return loss.mean()
