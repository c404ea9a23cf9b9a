"""What a checkpoint has to hold before a training goes on from it: everything, of the right kind, size and range."""

from __future__ import annotations

from typing import Any

import torch

from coreg.learn.two_nets import Divisions
from coreg.plaintext import one_line
from coreg.records import Each, Maybe, Number, RecordError, check_record
from coreg.run.training import Training

_NUMBER = Number(whole=False)
_TIME = Number(0, whole=False)


def take_state(training: Training, state: Any) -> None:
    """Let `training` go on from `state`, checked.

    Args:
        training: as it begins, with networks and optimisers of its own. state: what a checkpoint held.

    Raises:
        RecordError: it is not what a training like this one saves; `training` may hold parts of it then.
    """
    _check(state, training)
    own = [[{**group} for group in optimizer.param_groups] for optimizer in training.optimizers]
    try:
        training.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise RecordError(one_line(error)) from None
    for number, (optimizer, groups) in enumerate(zip(training.optimizers, own)):
        _check_optimizer(optimizer, groups, f"optimizers[{number}]")


def _check(state: Any, training: Training) -> None:
    learners = len(training.learners)
    kind = {
        "learners": [Each(torch.Tensor)],
        "optimizers": [dict],
        "sums": Each(torch.Tensor),
        "epoch": Number(0),
        "number": Number(0, learners),
        "step": Number(0),
        "means": Each((float, int)),
        "curves": [Each(_NUMBER)],
        "seconds": _TIME,
        "making_seconds": _TIME,
        "images_seen": Number(0),
        "updates": Number(0),
    }
    check_record(state, kind)
    _check_count(state["learners"], learners, "learners")
    _check_count(state["optimizers"], learners, "optimizers")
    _check_count(state["curves"], state["epoch"], "curves")
    for number, (saved, learner) in enumerate(zip(state["learners"], training.learners)):
        _check_like(saved, learner.state_dict(), f"learners[{number}]")
    if training.divisions is not None:
        check_record(state, {"divisions": dict})
        _check_divisions(state["divisions"], training.divisions)


def _check_divisions(state: dict[str, Any], divisions: Divisions) -> None:
    verdict = dict.fromkeys(("weight", "targets", "trusted"), torch.Tensor)
    verdict |= dict.fromkeys(("guess", "features"), Maybe(torch.Tensor))
    kind = {
        "losses": [Maybe(torch.Tensor)],
        "verdicts": [verdict],
        "health": Each((float, int)),
        "weights": [torch.Tensor],
        "chosen": Maybe({"epoch": Number(0), "score": _NUMBER, "nets": [Each(torch.Tensor)]}),
    }
    check_record(state, kind, "divisions")
    if state.get("chosen") is not None:
        _check_count(state["chosen"]["nets"], len(divisions.nets), "chosen.nets")
        for number, (saved, net) in enumerate(zip(state["chosen"]["nets"], divisions.nets)):
            _check_like(saved, net.state_dict(), f"chosen.nets[{number}]")
    for number, history in enumerate(state["losses"]):
        if history is not None:
            _check_rows(history, divisions.count, f"losses[{number}]", dimension=1)
    for number, weight in enumerate(state["weights"]):
        _check_rows(weight, divisions.count, f"weights[{number}]")
    for number, saved in enumerate(state["verdicts"]):
        for name in verdict:
            if saved.get(name) is not None:
                _check_rows(saved[name], divisions.count, f"verdicts[{number}].{name}")


def _check_count(values: list[Any], count: int, where: str) -> None:
    if len(values) != count:
        raise RecordError(f"{where} has {len(values)} entries, expected {count}")


def _check_like(saved: dict[str, torch.Tensor], own: dict[str, torch.Tensor], where: str) -> None:
    """Names, shapes and types of the tensors of one module."""
    if saved.keys() != own.keys():
        raise RecordError(f"{where} has other tensors, such as {min(saved.keys() ^ own.keys())}")
    for name, value in own.items():
        if (saved[name].shape, saved[name].dtype) != (value.shape, value.dtype):
            raise RecordError(
                f"{where}.{name} is {saved[name].dtype} {tuple(saved[name].shape)}, expected {value.dtype} "
                f"{tuple(value.shape)}"
            )


def _check_rows(value: torch.Tensor, images: int, where: str, dimension: int = 0) -> None:
    if value.ndim <= dimension or value.shape[dimension] != images:
        raise RecordError(f"{where} has the shape {tuple(value.shape)}, expected {images} images")


def _check_optimizer(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]], where: str) -> None:
    """Settings are this job's, but for the learning rate, which every epoch sets, and `fused`: the same but for rounding;
    averages have their weights' shapes.
    """
    for group, own_group in zip(optimizer.param_groups, own):
        for name in (group.keys() & own_group.keys()) - {"params", "lr", "initial_lr", "fused"}:
            if group[name] != own_group[name]:
                raise RecordError(f"{where}.{name} is {str(group[name])[:40]}, expected {own_group[name]}")
        for weight in group["params"]:
            averages = optimizer.state.get(weight, {})
            check_record(averages, dict, f"{where}.state")
            for name, value in averages.items():
                if isinstance(value, torch.Tensor) and value.shape not in (weight.shape, torch.Size([])):
                    raise RecordError(f"{where}: {name} has the shape {tuple(value.shape)}, expected {tuple(weight.shape)}")
