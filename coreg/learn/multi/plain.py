"""Methods without a memory: each is one loss of the logits and the observed labels."""

from __future__ import annotations

from torch import Tensor

from coreg.learn.collective import rank_and_world
from coreg.learn.multi.losses import (
    assume_negative,
    asymmetric,
    focal,
    ignore_unknown,
    pairwise_rank,
    probabilities,
    smoothed,
    with_entropy,
)
from coreg.learn.multi.method import MultiMethod, count_share
from coreg.learn.schedules import Step


class AN(MultiMethod):
    """Assume negative: what is not observed to be present is absent; on true labels the binary cross-entropy."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        return assume_negative(logits, observed)


class WAN(MultiMethod):
    """AN whose unknown labels weigh 1 / (L-1), as much together as one present label (Mac Aodha et al., ICCV 2019)."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        # of one label alone there is none to share the weight
        return assume_negative(logits, observed, 1 / max(logits.shape[1] - 1, 1))


class LSAN(MultiMethod):
    """AN with label smoothing (Cole et al., CVPR 2021); on true labels the smoothed binary cross-entropy."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        return smoothed(logits, observed, self.options.smoothing)


class NLS(MultiMethod):
    """AN with label smoothing of the unknown labels alone."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        return smoothed(logits, observed, self.options.smoothing, unknown_alone=True)


class IU(MultiMethod):
    """Ignore what is unknown: only observed labels count."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        return ignore_unknown(logits, observed)


class L1R(AN):
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


class PR(MultiMethod):
    """Pairwise rank: an observed label's p is to lie 1 above that of each other one."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        return pairwise_rank(logits, observed)


class EPR(IU):
    """Expected positive regularisation: observed labels, and the number of labels an image (Cole et al., CVPR 2021)."""

    def loss(self, logits: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        observed = super().loss(logits, index, step)["loss"]
        count = count_share(probabilities(logits)[0], self.options.expected_positives, len(index))
        return {"loss": observed + count, "observed": observed, "count": count}


class EntMin(MultiMethod):
    """Observed labels, and predictions of unknown ones that are drawn to be sure; degenerate, a warning."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        return with_entropy(logits, observed, self.options.entropy_weight)


class EM(MultiMethod):
    """Entropy maximisation: unknown labels are acknowledged to be unknown (Zhou et al., ECCV 2022)."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        return with_entropy(logits, observed, -self.options.entropy_weight)


class Focal(MultiMethod):
    """AN with the focal loss (Lin et al., ICCV 2017)."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        return focal(logits, observed, self.options.focus, self.options.balance)


class ASL(MultiMethod):
    """AN with the asymmetric loss (Ridnik et al., ICCV 2021), a mean over cells where libraries sum over the labels."""

    def cells(self, logits: Tensor, observed: Tensor) -> Tensor:
        options = self.options
        return asymmetric(logits, observed, options.focus_absent, options.focus_present, options.margin)
