"""The process group: one function builds the Accelerator of every script, the others say who does what."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list

from coreg.errors import UserError

T = TypeVar("T")


def build_accelerator(
    mixed_precision: str | None = None,
    log_with: str | None = None,
    project_dir: str | None = None,
    timeout_minutes: float = 10,
) -> Accelerator:
    """The Accelerator that every script uses.

    Without a GPU it asks for the CPU outright: otherwise accelerate lets processes that a launcher started run side by
    side, each believing that it is alone and writing into the same folder.

    Raises:
        UserError: the launcher started a number of processes that this one does not see.
    """
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=mixed_precision,
            log_with=None if log_with in (None, "none") else log_with,
            project_dir=project_dir,
            # losses are scaled by hand and learning rates set by hand: accelerate steps nothing on our behalf
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                # the projector gets no gradient before the contrastive gate opens
                DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
            ],
        )
    except ValueError as error:
        raise UserError(f"the processes cannot start: {' '.join(str(error).split())}") from None
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes but this one sees {accelerator.num_processes}; start it with "
            f"accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes {launched}, or with torchrun"
        )
    return accelerator


def main_process_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Run `decide` on the main process alone and give every process its result, or its `UserError`.

    Processes may see different files on a shared disk; one looks, all believe it.
    """
    answer: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1], told=not accelerator.is_main_process)
    return answer[0]
