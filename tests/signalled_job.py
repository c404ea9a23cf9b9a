"""train_coreg.py with a signal at an exactly chosen event; the tests of interrupted jobs start it, it holds no test.

    python signalled_job.py PLAN ARGUMENTS...     PLAN is JSON, see `follow`; a launcher may start several of these

Events are counted from 1: `warm-up` and `training` after every step, `division` after every division, `save` when the
file of a checkpoint is written but not yet in place, `saved` when it is.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import coreg.interrupt
import train_coreg
from coreg.learn.coreg import WarmUpBatch
from coreg.run import checkpoint
from coreg.run.training import Training


def follow(plan: dict[str, Any]) -> None:
    """Count events, and send a signal at one of them.

    Args:
        plan: `signal`, its name; `at`, number of the event; `rank`, the process that counts (0); `to`: `self` (default) or
            `launcher`; `events`: file that gets the name of every event; `once`: file that is made at the event, and
            while it exists there is no signal. Instead of `at`: `before`, the name of a function as `module:name`, whose
            call is what the signal comes before; Ctrl-C is then answered as in the script itself.
    """
    if "before" in plan:
        coreg.interrupt.answer()
        module, name = plan["before"].split(":")
        holder = importlib.import_module(module)
        called = getattr(holder, name)

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), getattr(signal, plan["signal"]))
            return called(*args, **kwargs)

        setattr(holder, name, interrupted)
        return
    if int(os.environ.get("RANK", "0")) != plan.get("rank", 0):
        return
    seen = 0

    def event(name: str) -> None:
        nonlocal seen
        seen += 1
        if "events" in plan:
            with open(plan["events"], "a") as file:
                file.write(name + "\n")
        if seen != plan.get("at"):
            return
        if "once" in plan:
            if Path(plan["once"]).exists():
                return
            Path(plan["once"]).touch()
        launcher = plan.get("to") == "launcher"
        os.kill(os.getppid() if launcher else os.getpid(), getattr(signal, plan["signal"]))
        if launcher:
            time.sleep(2)  # it passes the signal on

    def then(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            answer = function(*args, **kwargs)
            event(name(*args))
            return answer

        return wrapped

    Training.learn = then(
        Training.learn, lambda _, batch, *more: "warm-up" if isinstance(batch, WarmUpBatch) else "training"
    )
    train_coreg.divide_by = then(train_coreg.divide_by, lambda *_: "division")
    checkpoint.save = then(checkpoint.save, lambda *_: "saved")
    torch.save = then(torch.save, lambda *_: "save")


if __name__ == "__main__":
    follow(json.loads(sys.argv[1]))
    train_coreg.main(sys.argv[2:])
