"""A proof at start-up that what should train does, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coreg.errors import UserError


def audit(model: nn.Module, images: Tensor) -> None:
    """Pass a few images back and forth once: the weights in `model.trained()` get a gradient, and no others.

    A module that no forward pass reads would train nothing and say nothing. The network is left as it was; it is in
    evaluation mode meanwhile, so that no statistics change.

    Args:
        model: images (n, c, H, W) to tensors (logits and features), with `trained()`, weights and statistics by name.

    Raises:
        UserError: a weight that should train gets no gradient, or another does.
    """
    wanted = {name for name, tensor in model.trained().items() if isinstance(tensor, nn.Parameter)}
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad():
            total = sum(output.float().sum() for output in model.eval()(images))
            gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    finally:
        for module, mode in modes.items():
            module.training = mode
    reached = {name for name, gradient in zip(weights, gradients) if gradient is not None}
    for names, problem in [
        (wanted - reached, "would get no gradient and never be trained"),
        (reached - wanted, "would be trained and should stay as they are"),
    ]:
        if names:
            raise UserError(f"{len(names)} weights, such as {min(names)}, {problem}; choose another --tuner or --backbone")
