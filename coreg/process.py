"""The process group: one function builds the Accelerator of every script, the others say who does what."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from coreg.errors import UserError
from coreg.plaintext import one_line
from coreg.scripts import configurations
from coreg.settings import JobConfig

T = TypeVar("T")


def _join_group(timeout: timedelta) -> None:
    """Set up the process group where a launcher started this process.

    A launcher that starts its processes again keeps its key-value store, with the addresses of those that died in it; so
    every attempt gets keys of its own.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ or dist.is_initialized():
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


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
        _join_group(timedelta(minutes=timeout_minutes))
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=mixed_precision,
            log_with=None if log_with in (None, "none") else log_with,
            project_dir=project_dir,
            # losses are scaled by hand and learning rates set by hand: accelerate steps nothing on our behalf
            step_scheduler_with_optimizer=False,
            # networks are compiled one by one (`build_training`), not the whole step
            dynamo_backend="no",
            kwargs_handlers=[
                # the projector gets no gradient before the contrastive gate opens
                DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
            ],
        )
    except ValueError as error:
        raise UserError(f"the processes cannot start: {one_line(error)}") from None
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes but this one sees {accelerator.num_processes}; start it with "
            f"accelerate launch --config_file {configurations()['cpu.yaml']} --num_processes {launched}, or with torchrun"
        )
    return accelerator


def follow_launcher(job: JobConfig) -> None:
    """Take precision and compilation from the launcher's configuration where the job leaves them at their defaults.

    Raises:
        UserError: the configuration asks for a precision that there is not.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise UserError(f"the launcher's configuration says mixed_precision: {precision}; write bf16 or 'no'")
    if job.mixed_precision == "no":
        job.mixed_precision = precision
    job.compile = job.compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO"


def main_process_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Run `decide` on the main process alone and give every process its result, or its `UserError`.

    Processes may see different files on a shared disk; one reads them, all believe it.
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
        raise UserError(answer[1], silent=not accelerator.is_main_process)
    return answer[0]


def of_every_process(accelerator: Accelerator, value: T) -> list[T]:
    """What each process has, in their order; all have to call it."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def all_or_none(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do `work` on every process; where it fails on one with a `UserError`, all raise it, and none waits for the others."""
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    problems = of_every_process(accelerator, problem)
    first = next((process for process, text in enumerate(problems) if text is not None), None)
    if first is not None:
        raise UserError(problems[first], silent=accelerator.process_index != first)
    return result
