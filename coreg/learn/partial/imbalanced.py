"""RECORDS and HTC: predictions that are rebalanced by the class prior that was learned."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coreg.learn.collective import gather_rows, my_rows, my_slice, write_rows
from coreg.learn.losses import divergence, log_probabilities, soft_cross_entropy
from coreg.learn.partial.method import Mixed, Outputs, PartialBatch, Passes, within
from coreg.learn.partial.mixing import draw_partners, mixed_view, smallest
from coreg.learn.partial.plain import PRODEN
from coreg.learn.pseudo import mix
from coreg.learn.schedules import Step, ramp
from coreg.nets.heads import GatedHeads, put_head
from coreg.nets.model import Model


@dataclass
class MixedPairOutputs(Outputs):
    """Outputs beside those on both views mixed."""

    pair: tuple[Mixed, ...] = ()  # of the weak and of the strong view, with the same partners


class RECORDS(PRODEN):
    """Dynamic rebalancing (Hong et al., ICLR 2023) of the two views of CORR, a consistency regularisation, with MixUp.

    beta, the classifier's prediction for the moving average of all features, is the class prior that the network has
    learned. The confidence follows the two views without it: the geometric mean of softmax(z - log beta) of both, on the
    candidate set. The method's prediction is z - log beta, too. Before `update_start` the confidence stays, and mixed
    views are not trained on.

    The authors' code adds 1e-9 to both of its normalisers; here a row of the confidence sums to 1 whatever it is.
    """

    linear_head = True
    prediction = (
        "the classifier's bias is that of training minus the logarithm of the class prior that the network had learned "
        "(RECORDS): its logits are those for equally frequent classes"
    )
    eps = 1e-9

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        super().init_state(candidates, dtype)
        self.register_buffer("feature_mean", torch.zeros(self.net.backbone.head_hidden_size, dtype=dtype))

    def passes(self, step: Step) -> Passes:
        return Passes(views=("weak", "strong"))

    def outputs_on(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (l, C) and pooled features (l, d)."""
        h = self.net.pooled(images)
        return self.net.backbone.get_classifier()(h), h

    def log_prior(self) -> Tensor:
        """log(beta + 1e-9), (C,)."""
        classifier = self.net.backbone.get_classifier()
        beta = torch.softmax(classifier(self.feature_mean.to(classifier.weight.dtype)), dim=0)
        return torch.log(beta + self.eps)

    def judged(self) -> Model:
        # it shares all weights and statistics, so that its classifier can be changed alone at no cost
        net = copy.deepcopy(self.net, {id(tensor): tensor for tensor in (*self.net.parameters(), *self.net.buffers())})
        classifier, corrected = net.backbone.get_classifier(), -self.log_prior().detach()
        if classifier.bias is not None:
            corrected = classifier.bias.detach() + corrected
        # a weight of a linear layer, a buffer of a `Head`
        classifier.bias = nn.Parameter(corrected) if isinstance(classifier, nn.Linear) else corrected
        return net

    def _outputs(self, batch: PartialBatch) -> MixedPairOutputs:
        outputs = MixedPairOutputs(**vars(super()._outputs(batch)))
        if batch.step.epoch >= self.options.update_start:
            kept, partner = draw_partners(batch, self.options.mixup_alpha, "pair")
            mixed = [mixed_view(view, batch.size, partner, kept) for view in batch.views]
            outputs.pair = tuple(Mixed(self.outputs_on(view)[0], partner, kept) for view in mixed)
        return outputs

    def loss(self, outputs: MixedPairOutputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        n, targets = len(index), self.confidence[my_rows(index)]
        loss = consistency = self._consistency(outputs.logits, targets).sum() / n
        if not outputs.pair:
            return {"loss": loss, "consistency": consistency}
        mixed = outputs.pair[0]
        partners = self.confidence[index[mixed.partner[my_slice(n)]]]
        each = self._consistency([pair.logits for pair in outputs.pair], mix(targets, partners, mixed.share_kept))
        mixup = each.sum() / n
        return {"loss": loss + self.options.mixup_weight * mixup, "consistency": consistency, "mixup": mixup}

    def _consistency(self, views: list[Tensor] | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """(l,), the sum over views of KL(t || f) and of -log(1 - f_j) over the classes j that t excludes."""
        log_ps = [log_probabilities(logits) for logits in views]
        excluded = sum(-torch.log(1 - log_p.exp() + self.eps) for log_p in log_ps) * (targets == 0)
        return excluded.sum(dim=1) + sum(divergence(targets, log_p) for log_p in log_ps)

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        n, (weak, strong) = len(index), outputs.features
        mean = gather_rows((weak + strong) / 2, n).mean(dim=0).to(self.feature_mean.dtype)
        momentum = self.options.feature_momentum
        self.feature_mean.mul_(momentum).add_(mean, alpha=1 - momentum)
        if step.epoch >= self.options.update_start:
            log_ps = [log_probabilities(logits - self.log_prior()) for logits in outputs.logits]
            write_rows(self.confidence, index, within(sum(log_ps) / 2, self.candidates[my_rows(index)]))


@dataclass
class TwoHeadedOutputs(Outputs):
    """Outputs beside those of the head and of the tail classifier on images that were selected for each."""

    targets: tuple[Tensor, ...] = ()  # (l, C) for each
    selected: tuple[Tensor, ...] = ()  # bool (n,) likewise
    mixed_by: tuple[Mixed, ...] = ()  # likewise, (l, 2 C) logits of both
    mixed_targets: tuple[Tensor, ...] = ()  # (l, C) likewise


class HTC(PRODEN):
    """Head and tail classifier cooperation (Jia et al., AAAI 2024).

    Two linear classifiers on one backbone: the head one learns from the confidence D, whose classes are as frequent as they
    are; the tail one from softmax(z - 2 log pi), z the logits of the head one and pi the class prior, the mean of D at the
    start of the epoch. Each trains, beside the cross-entropy to D, on the strong views of the images that fit its targets
    best, and on those mixed. D moves towards the tail one's prediction on the set. A gate learns how much of each makes the
    prediction (`coreg.nets.heads.GatedHeads`); at last the prior is that of D as it has become.

    A class that is nobody's candidate gets no mass from the tail's targets, where -2 log 0 would give it all.
    """

    linear_head = True
    prediction = (
        "the logits are the predictions of two classifiers, one for frequent and one for rare classes, weighed by a gate "
        "(HTC); timm alone loads the first one, coreg.export.folder.load_export, coreg-predict and programs all of it"
    )

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        super().init_state(candidates, dtype)
        put_head(self.net.backbone, GatedHeads(self.net.backbone.get_classifier()))
        self.register_buffer("prior", self._current_prior())

    def _current_prior(self) -> Tensor:
        return self.confidence.sum(dim=0) / self.confidence.sum()

    def passes(self, step: Step) -> Passes:
        return Passes(views=("weak", "strong") if step.epoch else ("weak",))

    def outputs_on(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (l, 2 C), those of the head classifier before those of the tail one, and pooled features (l, d)."""
        h, heads = self.net.pooled(images), self.net.backbone.get_classifier()
        return torch.cat([heads.head(h), heads.tail(h)], dim=1), h

    def judged(self) -> Model:
        self.net.backbone.get_classifier().prior.copy_(self._current_prior())
        return self.net

    def _supervised(self, images: Tensor, classes: Tensor) -> Tensor:
        """The mean of both classifiers'."""
        each = (log_probabilities(logits) for logits in self.outputs_on(images)[0].chunk(2, dim=1))
        return sum(nn.functional.nll_loss(log_p, classes, reduction="sum") for log_p in each) / 2

    def _ramp(self, step: Step) -> float:
        return ramp(step.epoch, self.options.selection_ramp * step.epochs)

    def _outputs(self, batch: PartialBatch) -> TwoHeadedOutputs:
        outputs = TwoHeadedOutputs(**vars(super()._outputs(batch)))
        if not batch.step.epoch:
            return outputs
        n, here = batch.size, my_slice(batch.size)
        head, tail = outputs.logits[0].detach().chunk(2, dim=1)
        log_prior = self.prior.to(head.dtype).log()
        adjusted = head - self.options.logit_adjustment * log_prior.masked_fill(self.prior == 0, torch.inf)
        outputs.targets = (self.confidence[batch.index[here]], log_probabilities(adjusted).exp())
        priors = (self.prior, torch.full_like(self.prior, 1 / len(self.prior)))
        first, last = self.options.selected
        rate = first + (last - first) * self._ramp(batch.step)
        for name, logits, targets, prior in zip(("head", "tail"), (head, tail), outputs.targets, priors):
            every = gather_rows(targets, n)
            losses = gather_rows(soft_cross_entropy(logits, targets), n)
            selected = smallest(losses, every.argmax(dim=1), n * prior * rate)
            kept, partner = draw_partners(batch, self.options.mixup_alpha, name, selected)
            mixed, _ = self.outputs_on(mixed_view(batch.views[0], n, partner, kept))
            outputs.selected += (selected,)
            outputs.mixed_by += (Mixed(mixed, partner, kept),)
            outputs.mixed_targets += (mix(targets, every[partner[here]], kept),)
        return outputs

    def loss(self, outputs: TwoHeadedOutputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        n, here, confidence = len(index), my_slice(len(index)), self.confidence[my_rows(index)]
        weak = outputs.logits[0].chunk(2, dim=1)
        each = [soft_cross_entropy(logits, confidence).sum() / n for logits in weak]
        for k, selected in enumerate(outputs.selected):
            strong, mixed = (logits.chunk(2, dim=1)[k] for logits in (outputs.logits[1], outputs.mixed_by[k].logits))
            on_targets = soft_cross_entropy(strong, outputs.targets[k])
            on_targets = on_targets + soft_cross_entropy(mixed, outputs.mixed_targets[k])
            weight = self.options.strong_weight * self._ramp(step)
            each[k] = each[k] + weight * (on_targets * selected[here]).sum() / selected.sum()
        fused = self.net.backbone.get_classifier().fused(*(logits.detach() for logits in weak), self.prior)
        fusion = -(confidence * torch.log(torch.softmax(fused, dim=1) + 1e-8)).sum() / n
        weight = self.options.fusion_weight * ramp(step.epoch, step.epochs)
        return {"loss": sum(each) + weight * fusion, "head": each[0], "tail": each[1], "fusion": fusion}

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        rows, rate = my_rows(index), self.options.confidence_rate
        tail = log_probabilities(outputs.logits[0].chunk(2, dim=1)[1])
        write_rows(self.confidence, index, (1 - rate) * self.confidence[rows] + rate * within(tail, self.candidates[rows]))

    def finish_epoch(self, step: Step) -> dict[str, float]:
        self.prior.copy_(self._current_prior())
        return {"largest_prior": float(self.prior.max()), "smallest_prior": float(self.prior.min())}
