"""Methods that learn from one image at a time: CC, RC, PRODEN, LWS, LWC and CR-DPLL.

All of it in log space: a product of small probabilities may not become zero before it is normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coreg.learn.collective import my_rows, write_rows
from coreg.learn.losses import divergence, log_probabilities, partial_cross_entropy, soft_cross_entropy, wide
from coreg.learn.partial.method import Outputs, PartialMethod, Passes, uniform, within
from coreg.learn.schedules import Step, ramp

_EPS = 1e-8  # keeps log(1 - f) finite, as in the LW authors' definition


class CC(PartialMethod):
    """Classifier-consistent: -log of the mass on the candidate set (Feng et al., NeurIPS 2020).

    On sets of one class each it is the supervised cross-entropy.
    """

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        each = partial_cross_entropy(outputs.logits[0], self.candidates[my_rows(index)])
        return {"loss": each.sum() / len(index)}


class PRODEN(PartialMethod):
    """Cross-entropy against a confidence c that follows the network (Lv et al., ICML 2020).

    c starts uniform on the candidate set; after each step c_j is proportional to y_j f_j, with f as it was before the step.
    """

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        self.register_buffer("confidence", uniform(candidates, dtype))

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        each = soft_cross_entropy(outputs.logits[0], self.confidence[my_rows(index)])
        return {"loss": each.sum() / len(index)}

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        log_p = log_probabilities(outputs.logits[0])
        write_rows(self.confidence, index, within(log_p, self.candidates[my_rows(index)]))


class RC(PRODEN):
    """Risk-consistent (Feng et al., NeurIPS 2020): as PRODEN, with f of the network after the step."""

    reads_again = True


class LWC(PartialMethod):
    """Leveraged weighted loss on cross-entropies (Wen et al., ICML 2021).

    Sum over candidates of u_j (-log f_j), plus beta times the sum over the others of u_j (-log(1 - f_j)). Weights u start
    at 1/C; after each step they are the network's softmax within the candidate set and within its complement.
    """

    reads_again = True

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        self.register_buffer("weights", torch.full(candidates.shape, 1 / candidates.shape[1], dtype=dtype))

    @staticmethod
    def _class_losses(logits: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C) losses of each class as a candidate, and as none."""
        log_p = log_probabilities(logits)
        return -log_p, -torch.log(1 - log_p.exp() + _EPS)

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        rows = my_rows(index)
        inside, outside = self._class_losses(outputs.logits[0])
        each = torch.where(self.candidates[rows], inside, self.options.leverage * outside)
        return {"loss": (self.weights[rows] * each).sum() / len(index)}

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        log_p, members = log_probabilities(outputs.logits[0]), self.candidates[my_rows(index)]
        write_rows(self.weights, index, within(log_p, members) + within(log_p, ~members))


class LWS(LWC):
    """Leveraged weighted loss on sigmoids of the logits z: sigma(-z) for candidates, sigma(z) for the others."""

    @staticmethod
    def _class_losses(logits: Tensor) -> tuple[Tensor, Tensor]:
        z = wide(logits)
        return torch.sigmoid(-z), torch.sigmoid(z)


class CRDPLL(PRODEN):
    """Consistency regularisation for deep partial-label learning (Wu, Wang and Zhang, ICML 2022).

    Three views: the divergence of a shared confidence t from the prediction of each, ramped up, and -log(1 - f_j) of the
    weak view for classes outside the candidate set. After each step t is the product of the three predictions to the power
    1/3, restricted to the candidate set and renormalised. A truth outside its candidate set is never found again.
    """

    def passes(self, step: Step) -> Passes:
        return Passes(views=("weak", "strong", "strong"))

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        rows, n = my_rows(index), len(index)
        log_ps = [log_probabilities(logits) for logits in outputs.logits]
        consistency = sum(divergence(self.confidence[rows], log_p).sum() for log_p in log_ps) / n
        not_candidate = -torch.log(1 + 1e-7 - log_ps[0].exp())
        complement = (not_candidate * ~self.candidates[rows]).sum() / n
        ramped = self.options.consistency_weight * ramp(step.epoch, self.options.consistency_ramp * step.epochs)
        loss = ramped * consistency + complement
        return {"loss": loss, "consistency": consistency, "complement": complement}

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        log_mean = torch.stack([log_probabilities(logits) for logits in outputs.logits]).mean(dim=0)
        write_rows(self.confidence, index, within(log_mean, self.candidates[my_rows(index)]))
