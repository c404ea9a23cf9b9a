"""ALIM and IRNet: PiCO for candidate sets that may miss the truth; they weigh, or add, classes outside of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from coreg.learn.collective import gather_rows, my_rows, write_rows
from coreg.learn.losses import log_probabilities, soft_cross_entropy
from coreg.learn.options import Contrast
from coreg.learn.partial.method import Outputs, Passes
from coreg.learn.partial.pico import PiCO
from coreg.learn.pseudo import mix
from coreg.learn.schedules import Step


class NoisyPiCO(PiCO):
    """PiCO as ALIM's and IRNet's authors run it: supervised contrast from the first epoch on, and epochs counted from 1.

    With `prototype_start` 1 the confidence moves in the first epoch too.
    """

    first_epoch = 1

    def _mode(self, step: Step) -> Contrast:
        return "supervised"


class ALIMOnehot(NoisyPiCO):
    """Adjusting label importance (Xu et al., NeurIPS 2023): a class outside the candidate set counts lambda.

    lambda is 0 until the share `correction_start` of the epochs is over. From then on, where the noise rate eta is known,
    it is after every epoch the eta-quantile of the images' margins (the best score in the set over the best outside), at
    most 1: so many images then believe most in a class that was not offered. Otherwise it is the constant `importance`.
    The confidence moves towards the best class.
    """

    score_temperature = 0.07

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        super().init_state(candidates, dtype)
        self.register_buffer("weight", torch.zeros((), dtype=dtype))
        # one place an image, so that each counts once; nan: not seen in this epoch
        self.register_buffer("log_margin", torch.full((len(candidates),), torch.nan, dtype=dtype))

    def passes(self, step: Step) -> Passes:
        return Passes(key="strong", mixup="epoch")

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        parts, mixed = super().loss(outputs, index, step), outputs.mixed
        targets = self._next_confidence(outputs, my_rows(index), step)
        targets = mix(targets, self._confidence_of(mixed.partner, index, targets), mixed.share_kept)
        mixup = soft_cross_entropy(mixed.logits, targets).sum() / len(index)
        return parts | {"loss": parts["loss"] + mixup, "mixup": mixup}

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        log_score, members = self._log_score(outputs.features[0]), self.candidates[my_rows(index)]
        inside = log_score.masked_fill(~members, -torch.inf).amax(dim=1)
        outside = log_score.masked_fill(members, -torch.inf).amax(dim=1)
        write_rows(self.log_margin, index, inside - outside)
        super().update(outputs, index, step)

    def finish_epoch(self, step: Step) -> dict[str, float]:
        if Step(step.epoch + 1, step.epochs).reached(self.options.correction_start):
            self.weight.fill_(self.options.importance if self.options.noise_rate < 0 else self._quantile())
        self.log_margin.fill_(torch.nan)
        return {"importance": float(self.weight)}

    def _quantile(self) -> Tensor | float:
        """The eta-quantile of the doubtful images' margins of this epoch, at most 1; 0 for eta = 0."""
        margins = self.log_margin[~self.log_margin.isnan() & ~self.certain].sort().values
        if not self.options.noise_rate or not len(margins):
            return 0.0
        return margins[min(int(len(margins) * self.options.noise_rate), len(margins) - 1)].clamp_max(0).exp()

    def _confidence_of(self, partners: Tensor, index: Tensor, after: Tensor) -> Tensor:
        """(l, C), confidence of the training rows `partners` (l,): of those in the batch `index` what this step makes it.

        Args:
            after: (l, C), s after this step of this process's rows of the batch.
        """
        after = gather_rows(after, len(index))
        place = torch.arange(1, len(index) + 1, device=index.device)
        # 0 for rows that are not in the batch; the last place of one that is there twice, as in the table
        place = ((partners[:, None] == index) * place).amax(dim=1)
        return torch.where(place[:, None] > 0, after[place - 1], self.confidence[partners])

    def _log_trust(self, rows: Tensor) -> Tensor:
        trust, members = super()._log_trust(rows), self.candidates[rows]
        return torch.where(members | self.certain[rows, None], trust, self.weight.log())


class ALIMScale(ALIMOnehot):
    """ALIM whose confidence moves towards the weighted scores, renormalised."""

    def _aim(self, log_score: Tensor) -> Tensor:
        return torch.softmax(log_score, dim=1)


class IRNet(NoisyPiCO):
    """Iterative refinement (Lian et al., "IRNet", 2022): classes are added to candidate sets, for good.

    After the share `correction_start` of the epochs, an image whose two weak views both score the same class outside the
    set higher than any candidate, by a margin, gets that class as a candidate. The authors start when the accuracy on the
    test set stops growing; a fixed time needs no labels.
    """

    alpha, beta = 6.0, 1.0  # weights of cross-entropy and reverse cross-entropy in the symmetric one

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        super().init_state(candidates, dtype)
        self.register_buffer("candidates", candidates.clone())  # in checkpoints: they grow
        self.margin = self.options.correction_margin / candidates.shape[1]

    def passes(self, step: Step) -> Passes:
        return Passes(key="strong", glance="weak" if step.reached(self.options.correction_start) else None)

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        scores = self._log_score(outputs.features[0]).exp()
        super().update(outputs, index, step)
        if outputs.glance is not None:
            # the second view meets the prototypes that the first one has moved
            self._correct(scores, self._log_score(outputs.glance).exp(), index)

    def finish_epoch(self, step: Step) -> dict[str, float]:
        return {"candidates": float(self.candidates.sum(dim=1).double().mean())}

    def _classification(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not self.options.symmetric:
            return super()._classification(logits, targets)
        log_p = log_probabilities(logits).clamp_min(math.log(1e-7))
        targets = targets.clamp(1e-4, 1)
        return -(self.alpha * targets * log_p + self.beta * log_p.exp() * targets.log()).sum(dim=1)

    def _correct(self, scores: Tensor, glanced: Tensor, index: Tensor) -> None:
        """Add the class that both views (l, C) agree on to candidate sets, with its score as confidence."""
        rows = my_rows(index)
        members, confidence = self.candidates[rows], self.confidence[rows]
        agreed = []
        for view in (scores, glanced):
            best, best_class = view.masked_fill(members, -torch.inf).max(dim=1)
            agreed.append((best > view.masked_fill(~members, -torch.inf).amax(dim=1) + self.margin, best_class))
        (first, new_class), (second, same_class) = agreed
        noisy = first & second & (new_class == same_class) & ~self.certain[rows]
        added = F.one_hot(new_class, members.shape[1]).bool() & noisy[:, None]
        confidence = torch.where(added, scores.to(confidence.dtype), confidence)
        write_rows(self.confidence, index, confidence / confidence.sum(dim=1, keepdim=True))
        write_rows(self.candidates, index, members | added)
