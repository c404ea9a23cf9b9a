"""One network's side of Co-Reg: a module whose forward is a whole training step and returns its loss.

The same module serves warm-up and co-training, so that a data-parallel wrapper sees one module with one forward. A batch
holds this process's rows (see `coreg.learn.collective.my_slice`); the loss and all its parts are sums over them
divided by global counts, so that their sums over all processes are means over the global batch.

Shapes: n_x and n_u rows of P and U in the global step, l_x and l_u of them here, C classes, D projected features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from coreg.learn import losses
from coreg.learn.collective import gather_rows, my_slice
from coreg.learn.memory import Prototypes, Queue
from coreg.learn.options import CoRegOptions
from coreg.learn.pseudo import fuse_trusted, mix, sharpen
from coreg.nets.model import Model
from coreg.nets.tuners.frozen import moving_weights, sharing_copy


@dataclass
class WarmUpBatch:
    """This process's share of a warm-up step."""

    images: Tensor  # (l, c, H, W)
    candidates: Tensor  # bool (l, C)
    size: int  # images of the global step
    n_informative: int  # those of them whose candidate set is not full


@dataclass
class Guess:
    """The networks' predictions for weak views of this process's rows of P (x) and U (u), before the step."""

    x: Tensor  # (l_x, C), p-bar, the own network's mean
    u: Tensor  # (l_u, C), mean of both networks
    x_features: Tensor  # (l_x, D), the own q
    u_features: Tensor  # (l_u, D), likewise


@dataclass
class CoRegBatch:
    """This process's share of a co-training step: views, the peer's verdict on P, and the MixUp draw.

    x are rows of P, trusted, and u of U, the rest.
    """

    x_weak: tuple[Tensor, ...]  # two weak views of the P rows, (l_x, c, H, W); none where `guess` was made before
    u_weak: tuple[Tensor, ...]  # likewise of the U rows, (l_u, c, H, W)
    strong: Tensor  # (2 l_x + 2 l_u, c, H, W), strong views [x_s1; x_s2; u_s1; u_s2]
    partners: Tensor  # the same shape, the views that `strong` is mixed with
    position: Tensor  # int64 (2 l_x + 2 l_u,), where these rows stand in the global [x_s1; x_s2; u_s1; u_s2]
    partner_position: Tensor  # int64 (2 l_x + 2 l_u,), likewise of their partners
    x_targets: Tensor  # (l_x, C), p, the dividing network's prediction rescaled to the candidate set
    x_weight: Tensor  # (l_x,), w
    n_x: int  # rows of P in the global batch
    n_u: int  # rows of U in it
    share_kept: float  # MixUp's lambda
    ramp: float = 1.0  # factor of lambda_u
    gate: bool = False  # whether the prototype and contrastive losses count
    fill_queue: bool = False  # whether keys are wanted at all
    guess: Guess | None = None  # predictions of the weak views made before, if any
    labelled: tuple[Tensor, Tensor] | None = None  # images (l, c, H, W) and classes (l,) of an extra supervised term
    n_labelled: int = 0  # rows of that in the global batch

    @property
    def size(self) -> int:
        """Images of the global step."""
        return self.n_x + self.n_u


class CoRegLearner(nn.Module):
    """A network, its momentum encoder and queue, and the prototypes that both learners share."""

    def __init__(self, net: Model, prototypes: Prototypes, options: CoRegOptions) -> None:
        super().__init__()
        self.net = net
        self.key_net = sharing_copy(net)
        self.prototypes = prototypes
        self.queue = Queue(options.queue_size, options.projection_dim)
        self.options = options
        self._average = get_ema_multi_avg_fn(options.key_momentum)
        self._peer: list[Model] = []

    def set_peer(self, peer: Model) -> None:
        """The other network: read in evaluation mode, never trained here, and so no submodule of this one."""
        self._peer = [peer]

    @torch.no_grad()
    def reset_keys(self) -> None:
        """Copy the parameters of the network into the momentum encoder (not its batch statistics, which nobody reads)."""
        for key, query in zip(*moving_weights(self.key_net, self.net)):
            key.copy_(query)

    def forward(self, batch: WarmUpBatch | CoRegBatch) -> dict[str, Tensor]:
        """The step's `loss` (with gradient) and its parts (without), each a scalar and this process's share.

        In warm-up `partial` is a mean over the informative rows and `negative_entropy` over all; in co-training `trusted`
        is a mean over P, `distrusted` over U, `supervised` over the labelled rows, `contrast` over both splits, and
        `prototype` the sum of a mean over P and one over U.
        """
        return self._warm_up(batch) if isinstance(batch, WarmUpBatch) else self._co_train(batch)

    def _warm_up(self, batch: WarmUpBatch) -> dict[str, Tensor]:
        """Partial cross-entropy plus negative entropy (AAAI eq. 1-2)."""
        logits, _ = self.net(batch.images)
        partial = losses.partial_cross_entropy(logits, batch.candidates).sum() / max(batch.n_informative, 1)
        entropy = losses.negative_entropy(logits).sum() / batch.size
        loss = partial + self.options.entropy_weight * entropy
        return {"loss": loss, "partial": partial.detach(), "negative_entropy": entropy.detach()}

    def _co_train(self, batch: CoRegBatch) -> dict[str, Tensor]:
        """Fuse, sharpen, mix and train (AAAI eq. 5-11)."""
        options = self.options
        guess = batch.guess if batch.guess is not None else self._guess(batch)
        targets = self._pseudo_labels(batch, guess)
        kept, partner = targets[batch.position], targets[batch.partner_position]
        mixed_targets = mix(kept, partner, batch.share_kept)
        logits, features = self.net(mix(batch.strong, batch.partners, batch.share_kept))
        n_p = 2 * len(batch.x_weight)  # P rows stand first

        log_p = losses.log_probabilities(logits)
        trusted = losses.soft_cross_entropy(logits[:n_p], mixed_targets[:n_p]).sum() / max(2 * batch.n_x, 1)
        square = losses.squared_error(log_p[n_p:].exp(), mixed_targets[n_p:], options.squared_error)
        distrusted = square.sum() / max(2 * batch.n_u, 1)
        loss = trusted + options.lambda_u * batch.ramp * distrusted
        parts = {"trusted": trusted, "distrusted": distrusted}
        if batch.labelled is not None:
            images, classes = batch.labelled
            supervised = nn.functional.nll_loss(losses.log_probabilities(self.net(images)[0]), classes, reduction="sum")
            parts["supervised"] = supervised / batch.n_labelled
            loss = loss + parts["supervised"]

        labels = torch.cat([targets[: batch.n_x], targets[2 * batch.n_x : 2 * batch.n_x + batch.n_u]]).argmax(dim=1)
        if options.prototype_weight:
            self._move_prototypes(guess, labels, batch)
            if batch.gate:
                parts["prototype"] = self._prototype_loss(features, mixed_targets, n_p, batch)
                loss = loss + options.prototype_weight * parts["prototype"]
        if options.contrast_weight:
            self._average(*moving_weights(self.key_net, self.net), None)
            if batch.fill_queue:
                parts["contrast"] = self._contrast(batch, labels)
                if batch.gate:
                    loss = loss + options.contrast_weight * parts["contrast"]
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def _guess(self, batch: CoRegBatch) -> Guess:
        """Predict the weak views of this step.

        In `train` mode, as in the reference, the own network's batch statistics see every view as a batch of its own; in
        `eval` mode all views go through in one pass.
        """
        n_x, n_u = len(batch.x_weak[0]), len(batch.u_weak[0])
        if self.options.guess_mode == "eval":
            self.net.eval()
            p, q = self._predict(self.net, torch.cat([*batch.u_weak, *batch.x_weak]))
            self.net.train()
            u1, u2, x1, x2 = zip(*(v.split([n_u, n_u, n_x, n_x]) for v in (p, q)))
        else:
            u1, u2, x1, x2 = (self._predict(self.net, view) for view in (*batch.u_weak, *batch.x_weak))
        u = [u1[0], u2[0]]
        if self.options.co_pseudo_labels:
            u += self._predict(self._peer[0], torch.cat(batch.u_weak))[0].split([n_u, n_u])
        return Guess(x=(x1[0] + x2[0]) / 2, u=sum(u) / len(u), x_features=x1[1], u_features=u1[1])

    @torch.no_grad()
    def _pseudo_labels(self, batch: CoRegBatch, guess: Guess) -> Tensor:
        """Sharpened pseudo-labels of the global [x; x; u; u], (2 n_x + 2 n_u, C) (AAAI eq. 5-6)."""
        temperature = self.options.temperature
        trusted = sharpen(fuse_trusted(batch.x_targets, guess.x, batch.x_weight), temperature)
        x, u = gather_rows(trusted, batch.n_x), gather_rows(sharpen(guess.u, temperature), batch.n_u)
        return torch.cat([x, x, u, u])

    def _move_prototypes(self, guess: Guess, labels: Tensor, batch: CoRegBatch) -> None:
        """Take the features of the first weak views into the prototypes, rows in global order (AAAI eq. 9)."""
        features, momentum = gather_rows(guess.x_features, batch.n_x), self.options.prototype_momentum
        if self.options.prototype_update == "all":
            features = torch.cat([features, gather_rows(guess.u_features, batch.n_u)])
        self.prototypes.update(features, labels[: len(features)], momentum)

    @staticmethod
    def _predict(net: Model, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = net(images)
        return losses.log_probabilities(logits).exp(), features

    def _prototype_loss(self, features: Tensor, targets: Tensor, n_p: int, batch: CoRegBatch) -> Tensor:
        """Agreement of similarities to prototypes with pseudo-labels, L_prot (AAAI eq. 8), on the mixed strong views.

        The target is the mixed one; weighting the two targets' losses by lambda instead, as the reference does, differs
        by a constant and has the same gradient.
        """
        options = self.options
        tempered = options.prototype_form == "paper"
        t = options.prototype_temperature
        log_s = losses.prototype_log_probabilities(features[:n_p], self.prototypes.value, t)
        x_targets = sharpen(targets[:n_p], t) if tempered else targets[:n_p]
        trusted = losses.divergence(x_targets, log_s).sum() / max(2 * batch.n_x, 1)
        log_s = losses.prototype_log_probabilities(features[n_p:], self.prototypes.value, 1.0 if tempered else t)
        square = losses.squared_error(log_s.exp(), targets[n_p:], options.squared_error)
        return trusted + options.lambda_u * square.sum() / max(2 * batch.n_u, 1)

    def _contrast(self, batch: CoRegBatch, labels: Tensor) -> Tensor:
        """Noise-tolerant contrastive loss, L_ncont (AAAI eq. 10), between s1 queries and s2 keys; then enqueue the keys.

        labels: (n_x + n_u,), the pseudo-labels c of the global [x; u].
        Before the gate opens only the keys are made: the loss is then 0.
        """
        l_x = len(batch.x_weight)
        l_u = len(batch.strong) // 2 - l_x
        s1 = torch.cat([batch.strong[:l_x], batch.strong[2 * l_x : 2 * l_x + l_u]])
        s2 = torch.cat([batch.strong[l_x : 2 * l_x], batch.strong[2 * l_x + l_u :]])
        n = batch.n_x + batch.n_u
        confident = torch.arange(n, device=labels.device) < batch.n_x
        with torch.no_grad():
            k = self._gather(self.key_net(s2)[1], l_x, batch)
        loss = k.new_zeros(())
        if batch.gate:
            local = self.net(s1)[1]
            q = self._gather(local, l_x, batch)
            queue_keys, queue_labels, queue_confident = self.queue.rows()
            position = torch.cat(
                [
                    torch.arange(n, device=k.device)[my_slice(batch.n_x)],
                    batch.n_x + torch.arange(batch.n_u, device=k.device)[my_slice(batch.n_u)],
                ]
            )
            loss = (
                losses.contrastive_loss(
                    local,
                    torch.cat([q, k, queue_keys.to(q.dtype)]),
                    labels[position],
                    confident[position],
                    torch.cat([labels, labels, queue_labels]),
                    torch.cat([confident, confident, queue_confident]),
                    self_position=position,
                    key_position=n + position,
                    temperature=self.options.contrast_temperature,
                    mode=self.options.contrast,
                    n_batch=2 * n,
                ).sum()
                / n
            )
        self.queue.enqueue(k, labels, confident)
        return loss

    @staticmethod
    def _gather(rows: Tensor, l_x: int, batch: CoRegBatch) -> Tensor:
        return torch.cat([gather_rows(rows[:l_x], batch.n_x), gather_rows(rows[l_x:], batch.n_u)])
