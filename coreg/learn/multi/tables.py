"""Methods whose loss is more than one of each cell, L1R, L2R and EPR, and those that remember something of every label of
every image: EM+APL, LL-R, LL-Ct, LL-Cp, ROLE, VLPL and Soft."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coreg.data.keyed import keyed_uniform
from coreg.errors import UserError
from coreg.learn.collective import gather_rows, my_rows, rank_and_world
from coreg.learn.losses import wide
from coreg.learn.multi.losses import (
    assume_negative,
    ignore_unknown,
    large_losses,
    probabilities,
    soft_loss,
    suggested_labels,
    suggested_labels_focal,
)
from coreg.learn.multi.method import MultiMethod, count_share
from coreg.learn.multi.plain import CELLS
from coreg.learn.multi_options import MultiOptions
from coreg.learn.schedules import Step
from coreg.weak.multi import ObservedLabels, suggestions
from coreg.weak.tag_evidence import probable_labels


class L1R(MultiMethod):
    """AN and a weight times the sum of absolute weights of the network."""

    power = 1

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        parts = super().loss(logits, index, step)
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        size = sum(parameter.abs().pow(self.power).sum() for parameter in trained)
        # once, and not once a process
        penalty = self.options.penalty * size / rank_and_world()[1]
        return {"loss": parts["loss"] + penalty, "penalty": penalty}


class L2R(L1R):
    """AN and a weight times the sum of squared weights of the network."""

    power = 2


class EPR(MultiMethod):
    """Expected positive regularisation: observed labels, and the number of labels an image (Cole et al., CVPR 2021)."""

    cells = "iu"

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        observed = super().loss(logits, index, step)["loss"]
        count = count_share(probabilities(logits)[0], self.options.expected_positives, len(index))
        return {"loss": observed + count, "observed": observed, "count": count}


class EMAPL(MultiMethod):
    """EM and asymmetric pseudo-labels: the least probable unknown labels become softly absent (Zhou et al., ECCV 2022).

    At the end of every epoch e, counted from 1, from `pseudo_after` on, each label takes the int(0.9 U / (epochs -
    `pseudo_after`)) images of lowest p among those of which it is unknown still; U of them were at the beginning. p becomes
    the target. As in the authors' code the last of these rounds is trained on no more.
    """

    def init_state(self, weak: ObservedLabels, seed: int, dtype: torch.dtype) -> None:
        self.register_buffer("soft", torch.full(weak.table.shape, -1, dtype=dtype))  # targets, -1 for none

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        rows = my_rows(index)
        soft = self.soft[rows]
        pseudo = self.options.pseudo_weight * soft_loss(logits, soft)
        cells = torch.where(soft >= 0, pseudo, CELLS["em"](logits, self.observed[rows], self.options))
        return {"loss": cells.sum() / (len(index) * logits.shape[1])}

    def reads_all(self, step: Step) -> bool:
        return self.options.pseudo_after <= step.epoch + 1 and self.options.pseudo_after < step.epochs

    def finish_epoch(self, step: Step, logits: Tensor | None = None) -> dict[str, float]:
        if logits is not None and self.reads_all(step):
            p, unknown = probabilities(logits)[0], self.observed == 0
            rounds = step.epochs - self.options.pseudo_after
            counts = (self.options.pseudo_share * unknown.sum(dim=0).double() / rounds).long()
            p_of_open = torch.where(unknown & (self.soft < 0), p, torch.inf)
            rank = p_of_open.argsort(dim=0, stable=True).argsort(dim=0, stable=True)
            chosen = (rank < counts) & p_of_open.isfinite()
            self.soft[chosen] = p[chosen].to(self.soft.dtype)
        return {"pseudo_absent": float((self.soft >= 0).double().mean())}


class LLR(MultiMethod):
    """Large-loss rejection: unknown labels of the largest losses of AN do not count (Kim et al., CVPR 2022).

    The first epoch is AN; then their number in a batch grows by the share `large_share` of all cells every epoch.
    """

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        each, large, _ = self._large(logits, index, step)
        cells = torch.where(large, self._of_large(logits, each), each)
        return {"loss": cells.sum() / (len(index) * logits.shape[1])}

    def _of_large(self, logits: Tensor, each: Tensor) -> Tensor:
        """(l, L), what a cell of large loss counts instead."""
        return torch.zeros_like(each)

    def _count(self, cells: int, step: Step) -> int:
        """How many cells of a global batch have a large loss."""
        clean = 1.0
        # as the authors count, since what ceil gives depends on it
        for _ in range(step.epoch):
            clean -= self.options.large_share
        return min(math.ceil(cells * (1 - clean)), cells)

    def _large(self, logits: Tensor, index: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """(l, L) losses of AN, with the natural logarithm; bool (l, L), whether they are large; bool (n, L), the largest
        but one at least, of the global batch."""
        rows, n = my_rows(index), len(index)
        z = wide(logits)
        target = (self.observed[rows] > 0).to(z.dtype)
        each = F.binary_cross_entropy_with_logits(z, target, reduction="none")
        losses, unknown = gather_rows(each.detach(), n), self.observed[index] == 0
        large, largest = large_losses(losses, unknown, self._count(losses.numel(), step))
        return each, my_rows(large), largest


class LLCt(LLR):
    """Large-loss correction for the time being: they count as present."""

    def _of_large(self, logits: Tensor, each: Tensor) -> Tensor:
        return F.softplus(-logits.to(each.dtype))


class LLCp(LLCt):
    """Large-loss correction for good: as many in every epoch, and all but the smallest of them stay present."""

    def init_state(self, weak: ObservedLabels, seed: int, dtype: torch.dtype) -> None:
        # written to: checkpoints have to keep it
        self.register_buffer("observed", self.observed)

    def _count(self, cells: int, step: Step) -> int:
        return math.ceil(cells * self.options.large_share) if step.epoch else 0

    def update(self, logits: Tensor, index: Tensor, step: Step) -> None:
        _, _, largest = self._large(logits, index, step)
        self.observed[index] = torch.where(largest, 1, self.observed[index]).to(self.observed.dtype)

    def finish_epoch(self, step: Step, logits: Tensor | None = None) -> dict[str, float]:
        return {"present": float((self.observed > 0).sum(dim=1).double().mean())}


class ROLE(MultiMethod):
    """Regularised online label estimation (Cole et al., CVPR 2021): a table of labels is learned beside the network.

    The optimiser moves `estimate`, the logits of the table, `estimate_speed` times as fast as the network; those of images
    outside of a batch too, by its memory of past gradients, as in the authors' code.
    """

    def init_state(self, weak: ObservedLabels, seed: int, dtype: torch.dtype) -> None:
        n, n_labels = weak.table.shape
        uniform = keyed_uniform((seed, "role"), torch.arange(n), n_labels)
        self.estimate = nn.Parameter(initial_estimate(uniform.to(dtype), self.observed))

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        rows, n = my_rows(index), len(index)
        observed, table = self.observed[rows], self.estimate[rows]
        seen = count = agreement = 0.0
        for own, other in ((logits, table), (table, logits)):
            p, target = probabilities(own)[0], probabilities(other)[0].detach()
            seen = seen + ignore_unknown(own, observed).sum() / (2 * n * own.shape[1])
            agreement = agreement + soft_loss(own, target).sum() / (2 * n * own.shape[1])
            count = count + count_share(p, self.options.expected_positives, n) / 2
        return {"loss": seen + agreement + count, "observed": seen, "agreement": agreement, "count": count}

    def finish_epoch(self, step: Step, logits: Tensor | None = None) -> dict[str, float]:
        return {"estimated_labels": float(torch.sigmoid(self.estimate.detach()).sum(dim=1).double().mean())}


def initial_estimate(uniform: Tensor, observed: Tensor) -> Tensor:
    """Logits of ROLE's table at the beginning: of p = 0.995 present, 0.005 absent, and between 0.4 and 0.6 unknown.

    Args:
        uniform: (N, L) numbers in [0, 1). observed: int8 (N, L).
    """
    bound, sure = (math.log(p / (1 - p)) for p in (0.6, 0.995))
    return torch.where(observed == 0, bound * (2 * uniform - 1), sure * observed.to(uniform.dtype))


def evidence_of(weak: ObservedLabels, options: MultiOptions) -> np.ndarray:
    """What the annotator says of each label, float64 (N, L).

    Raises:
        UserError: there is no annotator.
    """
    if weak.evidence is None:
        raise UserError(f"--method {options.method} needs an annotator's evidence for each label, and there is none")
    return weak.evidence


class VLPL(MultiMethod):
    """Vision-language pseudo-labels (Xing et al., CVPR workshops 2024): EM where the annotator suggests nothing."""

    def init_state(self, weak: ObservedLabels, seed: int, dtype: torch.dtype) -> None:
        options = self.options
        table = suggestions(evidence_of(weak, options), options.suggestion_threshold, options.absent_share)
        self.register_buffer("suggested", torch.from_numpy(table), persistent=False)  # from the evidence in every start

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        rows, options = my_rows(index), self.options
        observed, suggested = self.observed[rows], self.suggested[rows]
        if options.focal:
            cells = suggested_labels_focal(logits, observed, suggested)
        else:
            weights = (options.entropy_weight, options.suggestion_weight, options.absent_weight)
            cells = suggested_labels(logits, observed, suggested, *weights, options.smoothing)
        return {"loss": cells.sum() / (len(index) * logits.shape[1])}


class Soft(MultiMethod):
    """The annotator's evidence is the target of unknown labels, as CCD trains its student (CVPR 2025); no label is needed.

    Evidence that shares 1 among the labels of an image is debiased as CCD's is, so that several can be present.
    """

    def init_state(self, weak: ObservedLabels, seed: int, dtype: torch.dtype) -> None:
        targets = probable_labels(evidence_of(weak, self.options), self.options.evidence)
        self.register_buffer("targets", torch.from_numpy(targets).to(dtype), persistent=False)  # from the evidence likewise

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        rows = my_rows(index)
        observed = self.observed[rows]
        cells = torch.where(observed == 0, soft_loss(logits, self.targets[rows]), assume_negative(logits, observed))
        return {"loss": cells.sum() / (len(index) * logits.shape[1])}
