"""Methods that weigh the candidates alike, or drop some for good: ABS-MAE, ABS-GCE, CAVL and POP."""

from __future__ import annotations

import torch
from torch import Tensor

from coreg.learn.collective import my_rows, write_rows
from coreg.learn.losses import log_probabilities
from coreg.learn.partial.method import Outputs, PartialMethod, uniform, within
from coreg.learn.partial.plain import PRODEN
from coreg.learn.schedules import Step


class AverageLoss(PartialMethod):
    """The mean of a bounded loss over the candidates (Lv et al., IEEE TPAMI 2024)."""

    def _class_losses(self, log_p: Tensor) -> Tensor:
        """(n, C) log probabilities -> (n, C), the loss of each class as if it were the label."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        log_p = log_probabilities(outputs.logits[0])
        weights = uniform(self.candidates[my_rows(index)], log_p.dtype)
        return {"loss": (weights * self._class_losses(log_p)).sum() / len(index)}


class ABSMAE(AverageLoss):
    """With the mean absolute error, |f - e_j|_1 = 2 - 2 f_j."""

    def _class_losses(self, log_p: Tensor) -> Tensor:
        return 2 - 2 * log_p.exp()


class ABSGCE(AverageLoss):
    """With the generalised cross-entropy, (1 - f_j^q) / q."""

    def _class_losses(self, log_p: Tensor) -> Tensor:
        q = self.options.gce_exponent
        return -torch.expm1(q * log_p) / q


class CAVL(PRODEN):
    """Class activation value learning (Zhang et al., ICLR 2022): only the candidate of largest z_j |1 - z_j| counts.

    z are logits of the network as it is after the step; before its first one all candidates count alike. The authors' code
    lets a class outside the set win where all of these values are negative; here it cannot.
    """

    reads_again = True

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        z, members = outputs.logits[0], self.candidates[my_rows(index)]
        best = (z * (1 - z).abs()).masked_fill(~members, -torch.inf).argmax(dim=1)
        write_rows(self.confidence, index, torch.nn.functional.one_hot(best, members.shape[1]))


class POP(PRODEN):
    """Progressive purification (Xu et al., ICML 2023): PRODEN, whose candidate sets lose unlikely classes for good.

    At the end of every W-th epoch from `purify_after` on, the mean a of the confidences of the last W epochs decides:
    classes with a_j < theta max_k a_k leave the set. theta grows by the factor 1 + `threshold_growth` while it is below 0.4
    and fewer than 1e-4 of all N C entries leave. Labels of a person are sets of one class and stay.
    """

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        super().init_state(candidates, dtype)
        window = self.options.purify_window
        self.register_buffer("kept", candidates.clone())
        self.register_buffer("history", torch.zeros(window, *candidates.shape, dtype=dtype))
        self.register_buffer("threshold", torch.tensor(self.options.purify_threshold, dtype=torch.float64))

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        rows = my_rows(index)
        log_p = log_probabilities(outputs.logits[0])
        write_rows(self.confidence, index, within(log_p, self.confidence[rows] > 0))

    def finish_epoch(self, step: Step) -> dict[str, float]:
        window = self.options.purify_window
        self.history[step.epoch % window] = self.confidence
        if step.epoch >= self.options.purify_after and step.epoch % window == 0:
            mean = self.history.mean(dim=0)
            kept = self.kept & (mean >= self.threshold * mean.amax(dim=1, keepdim=True))
            left = int((self.kept & ~kept).sum())
            self.kept.copy_(kept)
            self.confidence.copy_(mean * kept / (mean * kept).sum(dim=1, keepdim=True))
            if self.threshold < 0.4 and left < 1e-4 * kept.numel():
                self.threshold *= 1 + self.options.threshold_growth
        return {"candidates": float(self.kept.sum(dim=1).double().mean()), "threshold": float(self.threshold)}
