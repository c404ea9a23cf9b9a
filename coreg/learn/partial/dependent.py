"""ABLE and IDGP: candidate sets that depend on the image, since classes that resemble it get into its set."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coreg.learn.collective import gather_rows, my_rows, my_slice, write_rows
from coreg.learn.losses import divergence, log_probabilities, wide
from coreg.learn.partial.method import Outputs, PartialMethod, Passes, uniform, within
from coreg.learn.partial.plain import PRODEN
from coreg.learn.schedules import Step, ramp
from coreg.nets.tuners.frozen import moving_weights, sharing_copy


class ABLE(PRODEN):
    """Ambiguity-induced contrast (Xia et al., "Ambiguity-Induced Contrastive Learning", IJCAI 2022): PRODEN and a contrast.

    An image j of the batch stands for the class k, its candidate of largest f in the weak view. In the contrast of image i
    both views of j weigh c_ik over the number of images that stand for k, c the confidence. The authors' code takes the
    first rows of its table for those of the batch; here c is the anchor's own.
    """

    base_temperature = 0.07

    def passes(self, step: Step) -> Passes:
        return Passes(views=("weak", "strong"))

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        classification = super().loss(outputs, index, step)["loss"]
        contrast = self._contrast(outputs, index).sum() / (2 * len(index))
        loss = classification + self.options.contrast_weight * contrast
        return {"loss": loss, "classification": classification, "contrast": contrast}

    def _contrast(self, outputs: Outputs, index: Tensor) -> Tensor:
        """(2 l,), minus the weighted log softmax of an anchor's similarities to the 2 n - 1 other views of the batch."""
        n, rows, here = len(index), my_rows(index), my_slice(len(index))
        log_p = log_probabilities(outputs.logits[0].detach()).masked_fill(~self.candidates[rows], -torch.inf)
        stands_for = gather_rows(log_p.argmax(dim=1), n)
        many = F.one_hot(stands_for, self.candidates.shape[1]).sum(dim=0)
        weights = (self.confidence[rows] / many.clamp_min(1))[:, stands_for].repeat(2, 2)
        anchors, others = torch.cat(outputs.features), torch.cat([gather_rows(view, n) for view in outputs.features])
        position = torch.arange(n, device=index.device)[here]
        itself = torch.arange(2 * n, device=index.device) == torch.cat([position, n + position])[:, None]
        with torch.autocast(anchors.device.type, enabled=False):
            similarity = (anchors @ others.T) / self.options.contrast_temperature
        log_share = similarity - torch.logsumexp(similarity.masked_fill(itself, -torch.inf), dim=1, keepdim=True)
        each = -(weights.masked_fill(itself, 0) * log_share).sum(dim=1)
        return self.options.contrast_temperature / self.base_temperature * each


class IDGP(PartialMethod):
    """Decompositional generation process (Qiao, Xu and Geng, ICLR 2023): f has the class, g makes the candidates of it.

    f (softmax) learns from a confidence D, which starts uniform on the set and is then f on it; g (sigmoid) from a table B,
    which starts as the set and is then g on it. After the warm-up each learns from the other, too: f from the posterior u
    of the class, given set and g; g from f on the set; and divergences keep them near D and B, with a weight that grows.
    With c the candidate of largest D, u_j is proportional to (1 - v_j) / v_j on the set; v_j = g_j, but v_c = 1 - g_c.

    Weights, schedules in steps, and the small numbers inside logarithms are those of PLENCH's public code.
    """

    inside, above = 1e-12, 1.0000001  # what is taken in log(f + inside), log(g + inside), log(above - g)

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        self.generator = sharing_copy(self.net)
        for weight in moving_weights(self.generator, self.net)[0]:
            weight.requires_grad_(True)
        self.register_buffer("confidence", uniform(candidates, dtype))
        self.register_buffer("flips", candidates.to(dtype))

    def trained(self) -> nn.Module:
        return nn.ModuleList([self.net, self.generator])

    def outputs_on(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (l, 2 C), those of f before those of g."""
        logits, features = self.net(images)
        return torch.cat([logits, self.generator(images)[0]], dim=1), features

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        rows, n = my_rows(index), len(index)
        members, confidence, flips = self.candidates[rows], self.confidence[rows], self.flips[rows]
        log_f, z = self._split(outputs)
        each_f, each_g = self._cross_entropy(log_f, confidence), self._binary(z, flips)
        if step.taken > self.options.joint_start * step.epochs * step.steps:
            ramped = ramp(step.taken, self.options.divergence_ramp * step.epochs * step.steps)
            on_set = within(log_f.detach(), members)
            joins = -(on_set * torch.log(self.above - z.sigmoid())).sum(dim=1)
            each_f = each_f + self._cross_entropy(log_f, self._posterior(z.detach(), confidence, members))
            each_f = each_f + ramped * divergence(confidence, log_f)
            each_g = each_g + joins + self._binary(z, members.to(z.dtype)) + ramped * divergence(flips, F.logsigmoid(z))
        loss_f, loss_g = each_f.sum() / n, each_g.sum() / n
        return {"loss": loss_f + loss_g, "classifier": loss_f, "generator": loss_g}

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        members = self.candidates[my_rows(index)]
        log_f, z = self._split(outputs)
        write_rows(self.confidence, index, within(log_f, members))
        write_rows(self.flips, index, z.sigmoid() * members)

    @staticmethod
    def _split(outputs: Outputs) -> tuple[Tensor, Tensor]:
        """log f, and the logits of g, (l, C) each, in float32 or wider."""
        f, z = outputs.logits[0].chunk(2, dim=1)
        return log_probabilities(f), wide(z)

    def _cross_entropy(self, log_f: Tensor, targets: Tensor) -> Tensor:
        return -(targets * torch.log(log_f.exp() + self.inside)).sum(dim=1)

    def _binary(self, z: Tensor, targets: Tensor) -> Tensor:
        """(l,), the sum over classes of the binary cross-entropies of g."""
        g = z.sigmoid()
        return -(targets * torch.log(g + self.inside) + (1 - targets) * torch.log(self.above - g)).sum(dim=1)

    @staticmethod
    def _posterior(z: Tensor, confidence: Tensor, members: Tensor) -> Tensor:
        """u (l, C); (1 - g) / g is exp(-z)."""
        best = confidence.masked_fill(~members, -torch.inf).argmax(dim=1, keepdim=True)
        return within(-z.scatter(1, best, -z.gather(1, best)), members)
