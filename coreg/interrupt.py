"""Ctrl-C ends a program of this package with one line, at any moment, and leaves nothing half-written.

While a program imports its libraries there is nothing to tidy up: the line, and the end. Once its work has begun, the first
Ctrl-C raises `KeyboardInterrupt`, so that files and folders in the making are removed on the way out; a second one ends it
at once. Who uses the package from Python keeps Python's own behaviour. So does a program while Python itself starts, which
is before anything of this package runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

LINE = "Stopped by Ctrl-C; the same command goes on."
# a launcher passes on what the terminal has sent already: signals so close together are one press of the keys
SAME_PRESS_SECONDS = 1.0

_PACKAGE = Path(__file__).resolve().parent
_program: int | None = None  # process number of the program that is answered for
_works = 0  # functions within each other that tidy up when they are interrupted
_pressed: float | None = None


def answer_for_program() -> None:
    """Answer Ctrl-C from now on, where the program that runs is one of this package's and its caller did not ignore it.

    `coreg/__init__.py` calls it, because importing the libraries takes seconds.
    """
    if _is_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        answer()


def answer() -> None:
    """Answer Ctrl-C from now on, for this process alone."""
    global _program
    _program = os.getpid()
    signal.signal(signal.SIGINT, _answer)
    # an exception within a destructor is shown and forgotten by Python: the program would run on
    show = sys.unraisablehook
    sys.unraisablehook = lambda args: _press_again() if args.exc_type is KeyboardInterrupt else show(args)


def _is_ours() -> bool:
    """Whether a script beside this package runs, `python -m coreg...`, or a command that comes with the package."""
    if sys.argv[:1] == ["-m"]:
        words = sys.orig_argv
        return "-m" in words[:-1] and words[words.index("-m") + 1].partition(".")[0] == "coreg"
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "-")
    if script.name.startswith("coreg-"):
        return True
    # in a checkout coreg/baselines is a link to the folder beside the package
    baselines, beside = (_PACKAGE / "baselines").resolve(), ("train_coreg.py", "annotate_vlm.py")
    return script.resolve().parent == baselines or script.resolve() in [_PACKAGE.parent / name for name in beside]


def _answer(number: int, frame: FrameType | None) -> None:
    global _pressed
    if os.getpid() != _program:
        return  # a process that decodes images: the program that forked it ends it
    if _pressed is None and _works:
        _pressed = time.monotonic()
        raise KeyboardInterrupt
    if _pressed is None or time.monotonic() - _pressed > SAME_PRESS_SECONDS:
        leave()


def _press_again() -> None:
    """Send the signal once more in a moment, when the destructor that swallowed the exception has ended."""
    global _pressed
    _pressed = None
    main = threading.main_thread().ident
    if main is not None:
        threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()


@contextlib.contextmanager
def tidying_up() -> Iterator[None]:
    """Within, the first Ctrl-C is a `KeyboardInterrupt`; whatever becomes of that on its way out ends as one line."""
    global _works
    _works += 1
    try:
        yield
    except BaseException:
        if _pressed is not None and _works == 1:
            leave()
        raise
    finally:
        _works -= 1


def leave() -> NoReturn:
    """Say the line, once for a job of several processes, and end as a program does that Ctrl-C ends: shells see 130."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"\n{LINE}\n".encode())  # a progress bar may have left its line unfinished
    processes: Any = sys.modules.get("multiprocessing")
    for child in processes.active_children() if processes else ():
        child.terminate()
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(130)
