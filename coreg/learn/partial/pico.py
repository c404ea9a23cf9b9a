"""PiCO and PiCO+: prototypes of a contrastively trained feature space say which candidate is the truth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coreg.learn.collective import gather_rows, my_rows, my_slice, write_rows
from coreg.learn.losses import contrastive_loss, log_probabilities, prototype_log_probabilities, soft_cross_entropy
from coreg.learn.memory import Prototypes, Queue
from coreg.learn.options import Contrast
from coreg.learn.partial.method import Outputs, PartialMethod, Passes, uniform
from coreg.learn.pseudo import mix
from coreg.learn.schedules import Step


def nearest_contrast(
    queries: Tensor, others: Tensor, self_position: Tensor, key_position: Tensor, neighbours: int, temperature: float
) -> Tensor:
    """Contrastive loss whose positives are the own key and the nearest rows, whatever their labels (PiCO+, TPAMI 2023).

    Args:
        queries: (b, D) anchors, unit length, with gradient. others: (M, D), [q; k; queue].
        self_position, key_position: (b,) int64, rows of `others` that hold the anchor itself, left out, and its own key.
        neighbours: how many rows are near, the anchor itself, the nearest of all, counted as one of them.

    Returns:
        (b,) losses: the mean over positives of logsumexp over all rows minus the positive's similarity.
    """
    similarity = queries @ others.T / temperature
    columns = torch.arange(len(others), device=queries.device)
    kept = similarity.masked_fill(columns == self_position[:, None], -torch.inf)
    nearest = kept.detach().topk(min(neighbours, len(others)) - 1, dim=1).indices
    positive = torch.zeros_like(kept, dtype=torch.bool).scatter_(1, nearest, True) | (columns == key_position[:, None])
    return torch.logsumexp(kept, dim=1) - (similarity * positive).sum(dim=1) / positive.sum(dim=1)


class PiCO(PartialMethod):
    """Contrastive label disambiguation (Wang et al., ICLR 2022).

    Cross-entropy against a confidence s, and a contrastive loss whose positives share the label c, the candidate with the
    largest f. From epoch `prototype_start` on, s moves towards the candidate whose prototype is most similar; before that,
    contrast is MoCo's, which knows no labels. A step judges with the prototypes before it; its loss has the s after it.
    """

    score_temperature = 1.0
    first_epoch = 0  # how the authors number the first epoch

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        self.prototypes = Prototypes(candidates.shape[1], self.options.projection_dim).to(dtype)
        self.queue = Queue(self.options.queue_size, self.options.projection_dim).to(dtype)
        self.register_buffer("confidence", uniform(candidates, dtype))

    def passes(self, step: Step) -> Passes:
        return Passes(key="strong")

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        n = len(index)
        targets = self._next_confidence(outputs, my_rows(index), step)
        classification = self._classification(outputs.logits[0], targets).sum() / n
        contrast = self._contrast(outputs, index, self._mode(step)).sum() / n
        loss = classification + self.options.contrast_weight * contrast
        return {"loss": loss, "classification": classification, "contrast": contrast}

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        n, reliable = len(index), self._reliable(index)
        write_rows(self.confidence, index, self._next_confidence(outputs, my_rows(index), step))
        labels, features = self._labels(outputs, index), gather_rows(outputs.features[0].detach(), n)
        self.prototypes.update(features, labels, self.options.prototype_momentum, reliable)
        self.queue.enqueue(gather_rows(outputs.keys, n), labels, reliable)

    def _classification(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(l,), the loss that draws predictions to the confidence."""
        return soft_cross_entropy(logits, targets)

    def _mode(self, step: Step) -> Contrast:
        return "supervised" if step.epoch >= self.options.prototype_start else "unsupervised"

    def _reliable(self, index: Tensor) -> Tensor:
        """bool (n,), whose candidate sets of the global batch are believed: all."""
        return torch.ones_like(index, dtype=torch.bool)

    def _log_trust(self, rows: Tensor) -> Tensor:
        """(l, C), the logarithm of how far each class is believed to be possible: 0 in the candidate set, -inf outside."""
        members = self.candidates[rows]
        return torch.zeros_like(members, dtype=self.confidence.dtype).masked_fill_(~members, -torch.inf)

    def _labels(self, outputs: Outputs, index: Tensor) -> Tensor:
        """(n,) int64, the label c of every row of the global batch."""
        log_p = log_probabilities(outputs.logits[0].detach())
        return gather_rows((log_p + self._log_trust(my_rows(index))).argmax(dim=1), len(index))

    def _log_score(self, features: Tensor) -> Tensor:
        """(l, C), log softmax of the similarities to the prototypes as they are."""
        return prototype_log_probabilities(features.detach(), self.prototypes.value, self.score_temperature)

    def _aim(self, log_score: Tensor) -> Tensor:
        """(l, C), what the confidence moves towards, from scores that are -inf where a class is impossible."""
        return F.one_hot(log_score.argmax(dim=1), log_score.shape[1]).to(log_score.dtype)

    def _next_confidence(self, outputs: Outputs, rows: Tensor, step: Step) -> Tensor:
        """s after this step, (l, C): phi s + (1 - phi) aim.

        phi falls linearly over the epochs. The authors set it when an epoch ends, for the next one, and begin with 0.99.
        """
        before = self.confidence[rows]
        if step.epoch + self.first_epoch < self.options.prototype_start:
            return before
        first, last = self.options.confidence_momentum
        phi = first + (last - first) * (step.epoch - 1 + self.first_epoch) / step.epochs if step.epoch else 0.99
        aim = self._aim(self._log_score(outputs.features[0]) + self._log_trust(rows))
        return phi * before + (1 - phi) * aim

    def _contrast(self, outputs: Outputs, index: Tensor, mode: Contrast) -> Tensor:
        """(l,) contrastive losses of this process's queries against [q; k; queue] of all."""
        n, labels, reliable = len(index), self._labels(outputs, index), self._reliable(index)
        others, other_labels, other_reliable = self._others(outputs, labels, reliable)
        position = torch.arange(n, device=index.device)[my_slice(n)]
        return contrastive_loss(
            outputs.features[0],
            others,
            labels[position],
            reliable[position],
            other_labels,
            other_reliable,
            self_position=position,
            key_position=n + position,
            temperature=self.options.contrast_temperature,
            mode=mode,
            n_batch=2 * n,
        )

    def _others(self, outputs: Outputs, labels: Tensor, reliable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[q; k; queue] (M, D) of all processes, with labels and marks (M,)."""
        n = len(labels)
        q, k = gather_rows(outputs.features[0], n), gather_rows(outputs.keys, n)
        queue_keys, queue_labels, queue_reliable = self.queue.rows()
        return (
            torch.cat([q, k, queue_keys.to(q.dtype)]),
            torch.cat([labels, labels, queue_labels]),
            torch.cat([reliable, reliable, queue_reliable]),
        )


class PiCOPlus(PiCO):
    """PiCO for candidate sets that may miss the truth (Wang et al., "PiCO+", TPAMI 2023).

    The `pure_ratio` of the images that lie nearest to the prototype of their label are reliable; they are judged anew after
    every epoch from `prototype_start` on, and all are reliable before. The others are trained, weakly, on what all
    prototypes say, drawn to their nearest neighbours, and mixed with the reliable ones.

    As in the authors' code, `contrast_weight` is the weight of the contrastive loss until `prototype_start`. After that the
    loss counts fully, and from `neighbour_start` on `contrast_weight` is what a reliable image counts in it.
    """

    guess_temperature = 0.07
    all_weight = 0.1  # of the contrast that believes every label, of the neighbours, and of the guessed targets
    reliable_weight = 2.0

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        super().init_state(candidates, dtype)
        # infinitely far: not seen yet
        self.register_buffer("distance", torch.full((len(candidates),), torch.inf, dtype=dtype))
        self.register_buffer("reliable", torch.ones(len(candidates), dtype=torch.bool))

    def passes(self, step: Step) -> Passes:
        return Passes(key="strong", mixup="batch" if step.epoch >= self.options.prototype_start else "none")

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        if step.epoch < self.options.prototype_start:
            return super().loss(outputs, index, step)
        rows, n = my_rows(index), len(index)
        reliable, n_reliable = self.reliable[rows], self.reliable[index].sum()
        guess = torch.softmax(self._log_score(outputs.features[0]) / self.guess_temperature, dim=1)
        targets = torch.where(reliable[:, None], self._next_confidence(outputs, rows, step), guess)
        mixed = outputs.mixed
        mixed_targets = mix(targets, gather_rows(targets, n)[mixed.partner], mixed.share_kept)
        mixup = soft_cross_entropy(mixed.logits, mixed_targets).sum() / n
        each = soft_cross_entropy(outputs.logits[0], targets)
        # a batch may have no reliable rows, or only such
        sure = (each * reliable).sum() / n_reliable.clamp_min(1)
        guessed = (each * ~reliable).sum() / (n - n_reliable).clamp_min(1)
        contrast = self._contrast_over_reliable(outputs, index, step).sum() / n
        contrast = contrast + self.all_weight * self._contrast(outputs, index, "supervised").sum() / n
        loss = mixup + self.reliable_weight * sure + self.all_weight * guessed + contrast
        return {"loss": loss, "mixup": mixup, "reliable": sure, "guessed": guessed, "contrast": contrast}

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        log_p = log_probabilities(outputs.logits[0]) + self._log_trust(my_rows(index))
        own = self.prototypes.value[log_p.argmax(dim=1)]
        write_rows(self.distance, index, -(outputs.features[0] * own).sum(dim=1))
        super().update(outputs, index, step)

    def finish_epoch(self, step: Step) -> dict[str, float]:
        if step.epoch + 1 >= self.options.prototype_start:
            count = int(self.options.pure_ratio * self.distance.isfinite().sum())
            nearest = self.distance.argsort(stable=True)[: max(count, 1)]
            self.reliable.zero_()
            self.reliable[nearest] = True
            self.reliable |= self.certain
        return {"reliable": float(self.reliable.double().mean())}

    def _reliable(self, index: Tensor) -> Tensor:
        return self.reliable[index]

    def _labels(self, outputs: Outputs, index: Tensor) -> Tensor:
        """The label c: of all classes where the candidate set is not reliable."""
        rows = my_rows(index)
        trust = self._log_trust(rows).masked_fill(~self.reliable[rows, None], 0)
        return gather_rows((log_probabilities(outputs.logits[0].detach()) + trust).argmax(dim=1), len(index))

    def _contrast_over_reliable(self, outputs: Outputs, index: Tensor, step: Step) -> Tensor:
        """(l,) losses whose labelled positives are reliable; later the others have their nearest rows as positives."""
        each = self._contrast(outputs, index, "hcp")
        if not step.reached(self.options.neighbour_start):
            return each
        n, reliable = len(index), self._reliable(index)
        others, _, _ = self._others(outputs, self._labels(outputs, index), reliable)
        position = torch.arange(n, device=index.device)[my_slice(n)]
        nearest = nearest_contrast(
            outputs.features[0], others, position, n + position, self.options.neighbours, self.options.contrast_temperature
        )
        return torch.where(reliable[position], self.options.contrast_weight * each, self.all_weight * nearest)
