"""The one exception that is meant for the person at the keyboard."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

from coreg.interrupt import tidying_up
from coreg.plaintext import printable, without_credentials


class UserError(Exception):
    """Bad input: the message says what was given, what was expected and what to type next, in one line.

    `silent` is set where another process has the same error to tell, so that a job of many processes says it once.
    """

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class NothingToDo(SystemExit):
    """What was asked for is done, and the person has been answered: a script's `main` returns."""


def exits_with_one_line(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Let a script's `main` end with `error: ...` on stderr and exit code 2 when it raises `UserError`.

    Ctrl-C ends it with one line too (`coreg.interrupt`).
    """

    @wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int | None:
        try:
            with tidying_up():
                return main(*args, **kwargs)
        except NothingToDo:
            return None
        except UserError as error:
            if not error.silent:
                print(f"error: {printable(without_credentials(str(error)))}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped
