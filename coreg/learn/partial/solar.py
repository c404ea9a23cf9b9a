"""SoLar: soft labels that obey an estimated class prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coreg.learn.collective import gather_rows, my_rows, my_slice
from coreg.learn.losses import log_probabilities, soft_cross_entropy
from coreg.learn.partial.method import Mixed, Outputs, PartialBatch, Passes, uniform
from coreg.learn.partial.mixing import draw_partners, mixed_view, smallest
from coreg.learn.partial.plain import PRODEN
from coreg.learn.pseudo import mix
from coreg.learn.schedules import Step, ramp


def transport_plan(scores: Tensor, prior: Tensor, power: float = 3.0, iterations: int = 50) -> Tensor:
    """Soft labels near `scores` ** `power` whose mean is the prior, by Sinkhorn's iterations (SoLar).

    Where a class or an image has no score at all, the zeros of all scores count 1e-5 on the way; rows of the result do not
    sum to 1 then. In float32 or wider.

    Args:
        scores: (n, C), zero outside the candidate sets. prior: (C,), sums to 1.

    Returns:
        (n, C), zero where `scores` is; rows sum to 1, and columns nearly to n times the prior.
    """
    plan = _iterated(scores, prior, power, iterations)
    # to ask which one is wanted costs a CPU nothing, but would make a GPU wait: that computes both
    if plan.device.type == "cpu" and plan.isfinite().all():
        return plan
    filled = _iterated(torch.where(scores == 0, 1e-5, scores), prior, power, iterations) * (scores != 0)
    return torch.where(plan.isfinite().all(), plan, filled)


def _iterated(scores: Tensor, prior: Tensor, power: float, iterations: int) -> Tensor:
    raised, n = scores**power, len(scores)
    of_image = scores.new_full((n,), 1 / n)
    for _ in range(iterations):
        of_class = prior / (raised.T @ of_image)
        of_image = 1 / n / (raised @ of_class)
    return n * of_image[:, None] * raised * of_class


@dataclass
class PlannedOutputs(Outputs):
    """Outputs beside the transport plan that they gave."""

    plan: Tensor | None = None  # (n, C), of the global batch
    selected: Tensor | None = None  # bool (n,), whose rows of the plan are trained on


class SoLar(PRODEN):
    """Sinkhorn label refinery (Wang et al., NeurIPS 2022): soft labels as a transport plan that obeys the class prior.

    The plan is made for f on the candidate sets of this batch and of those before it. Trained on it are, of each class,
    the images that fit it best, of two views and mixed among themselves; the others, and all of a stage's first epoch, on
    PRODEN's confidence. The prior starts uniform and moves after every epoch towards how often each class is the candidate
    of largest f. It is estimated in a first stage of the epochs, after which network and confidence begin anew.
    """

    surveys = True

    def init_state(self, candidates: Tensor, dtype: torch.dtype) -> None:
        super().init_state(candidates, dtype)
        n_classes = candidates.shape[1]
        self.register_buffer("prior", torch.full((n_classes,), 1 / n_classes, dtype=dtype))
        # scores of earlier batches, the newest first; the plan takes them in once the last row is written
        self.register_buffer("queue", torch.zeros(self.options.plan_queue, n_classes, dtype=dtype))
        # rows ever written: a tensor for checkpoints, and an int, because to ask the tensor in a step would make a GPU wait
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))
        self._queued = 0

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._queued = int(self.queued)

    def _first_stage(self, epochs: int) -> int:
        """Epochs of the first stage."""
        return min(round(self.options.estimation * epochs), epochs - 1)

    def stage(self, step: Step) -> Step:
        first = self._first_stage(step.epochs)
        return Step(step.epoch - (first if step.epoch >= first else 0), step.epochs - first, step.step, step.steps)

    def restart(self) -> None:
        self.confidence.copy_(uniform(self.candidates, self.confidence.dtype))
        self.queue.zero_()
        self._count_queued(0)

    def _count_queued(self, rows: int) -> None:
        self._queued = rows
        self.queued.fill_(rows)

    def passes(self, step: Step) -> Passes:
        return Passes(views=("weak", "strong") if self.stage(step).epoch else ("weak",))

    def _ramp(self, step: Step) -> float:
        stage = self.stage(step)
        return ramp(stage.epoch, self.options.selection_ramp * stage.epochs)

    def _outputs(self, batch: PartialBatch) -> PlannedOutputs:
        outputs = PlannedOutputs(**vars(super()._outputs(batch)))
        with torch.no_grad():
            outputs.plan, outputs.selected = self._planned(outputs.logits[0], batch.index, batch.step)
        if self.stage(batch.step).epoch:
            kept, partner = draw_partners(batch, self.options.mixup_alpha, "plan", outputs.selected)
            logits, _ = self.outputs_on(mixed_view(batch.views[0], batch.size, partner, kept))
            outputs.mixed = Mixed(logits, partner, kept)
        return outputs

    def _planned(self, logits: Tensor, index: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The plan (n, C), and who is trained on it, bool (n,)."""
        n, here, log_p = len(index), my_slice(len(index)), log_probabilities(logits)
        scores = gather_rows(log_p.exp() * self.candidates[index[here]], n)
        earlier = self.queue.to(scores.dtype) if self._queued >= len(self.queue) else scores[:0]
        plan = transport_plan(torch.cat([earlier, scores]), self.prior.to(scores.dtype))[-n:]
        losses = gather_rows(-(plan[here] * log_p).sum(dim=1), n)
        agreement = gather_rows((plan[here] * log_p.exp()).sum(dim=1), n)
        first, last = self.options.selected
        quota = n * self.prior * (first + (last - first) * self._ramp(step))
        return plan, smallest(losses, plan.argmax(dim=1), quota) | (agreement > self.options.sure)

    def loss(self, outputs: PlannedOutputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        n, here, mixed = len(index), my_slice(len(index)), outputs.mixed
        each = soft_cross_entropy(outputs.logits[0], self.confidence[index[here]])
        if mixed is None:
            return {"loss": each.sum() / n}
        plan, chosen, count = outputs.plan, outputs.selected[here], outputs.selected.sum()
        mixed_plan = mix(plan[here], plan[mixed.partner[here]], mixed.share_kept)
        on_plan = sum(soft_cross_entropy(logits, plan[here]) for logits in outputs.logits)
        on_plan = ((on_plan + soft_cross_entropy(mixed.logits, mixed_plan)) * chosen).sum() / count
        others = (each * ~chosen).sum() / (n - count).clamp_min(1)
        weight = self.options.plan_weight * self._ramp(step)
        return {"loss": weight * on_plan + (1 - weight) * others, "plan": on_plan, "others": others}

    def update(self, outputs: PlannedOutputs, index: Tensor, step: Step) -> None:
        super().update(outputs, index, step)
        p = log_probabilities(outputs.logits[0]).exp() * self.candidates[my_rows(index)]
        newest = gather_rows(p, len(index)).to(self.queue.dtype)
        self.queue.copy_(torch.cat([newest, self.queue])[: len(self.queue)])
        self._count_queued(self._queued + len(index))

    def survey(self, logits: Tensor, step: Step) -> None:
        best = logits.masked_fill(~self.candidates, -torch.inf).argmax(dim=1)
        counted = torch.bincount(best, minlength=len(self.prior)).to(self.prior.dtype) / len(best)
        rate = self.options.prior_rate[step.epoch >= self._first_stage(step.epochs)]
        self.prior.mul_(1 - rate).add_(counted, alpha=rate)

    def finish_epoch(self, step: Step) -> dict[str, float]:
        return {"largest_prior": float(self.prior.max()), "smallest_prior": float(self.prior.min())}
