"""Damages files at random, as disks, people and attackers do, and says what became of the command that reads them."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120  # a command that takes longer hangs


# ---- damages --------------------------------------------------------------------------------------------------------


def flip(content, rng):
    """One bit is another."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def truncate(content, rng):
    """The end is missing, as after a full disk."""
    return content[: rng.randrange(len(content))]


def blank(content, rng):
    """A block of zeros, as after a power cut."""
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice([1, 16, 4096]))
    return content[:start] + bytes(stop - start) + content[stop:]


def scramble(content, rng):
    """Some bytes are random."""
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice([1, 8, 64]))
    return content[:start] + rng.randbytes(stop - start) + content[stop:]


def append(content, rng):
    """Something stands after the end."""
    return content + rng.choice([b"\0" * 512, b"}", b"\xff\xfe", b"\n\n"])


VALUES = (None, True, -1, 0, 10**12, 1e400, float("nan"), "", "../../x", "\0", [], {}, [[]], {"a": 1}, ["a", 1], "9" * 5000)


def replace_value(content, rng):
    """A value somewhere in a JSON file is of another kind or out of range."""
    whole = json.loads(content)
    places, pending = [], [whole]
    while pending:
        one = pending.pop()
        for key in range(len(one)) if isinstance(one, list) else one:
            places.append((one, key))
            if isinstance(one[key], (dict, list)):
                pending.append(one[key])
    where, key = rng.choice(places)
    if isinstance(where, dict) and rng.random() < 0.3:
        del where[key]
    else:
        where[key] = rng.choice(VALUES)
    return json.dumps(whole).encode()


def nest(content, rng):
    """Brackets without end."""
    return b"[" * 100_000


def empty(content, rng):
    """Nothing is left."""
    return b""


CONTENT = (flip, flip, truncate, blank, scramble, append, nest, empty)


def remove(path, rng):
    path.unlink()


def become_folder(path, rng):
    path.unlink()
    path.mkdir()


def become_fifo(path, rng):
    """Whoever opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


PLACES = (remove, become_folder, become_fifo)


def damage(path, rng, pipes):
    """Damage a file; gives a few words on how. It becomes no pipe where `pipes` is false."""
    content, places = path.read_bytes(), PLACES if pipes else PLACES[:-1]
    kinds = [*CONTENT, *places] if content else [append, *places]
    if path.suffix == ".json":
        kinds += [replace_value] * 6
    kind = rng.choice(kinds)
    if kind in PLACES:
        kind(path, rng)
    else:
        path.write_bytes(kind(content, rng))
    return kind.__name__


# ---- outcomes -------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """Files that a command reads.

    folder: a whole example of them, which stays as it is. files: which of them are damaged, given the folder's copy.
    command: the command, given the copy; what it gives stands for its result. checked: whether the result has to be the
    same as with whole files if the command ends well, which cannot be asked where a person writes the files.
    """

    name: str
    folder: Path
    files: Callable
    command: Callable
    checked: bool = True


class HangsError(BaseException):
    pass


@contextlib.contextmanager
def limited(seconds, folder):
    """Raise HangsError inside after so many seconds; whoever waits for a pipe in the folder is let go first."""

    def stop(number, frame):
        raise HangsError

    def let_go():
        for path in folder.rglob("*"):
            if path.is_fifo():
                with contextlib.suppress(OSError):  # nobody waits for it
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    # libraries open files in a way that no signal interrupts
    timer = threading.Timer(seconds, let_go)
    timer.daemon = True
    timer.start()

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        timer.cancel()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(subject, copy):
    """`result`, the command's result; `line`, its one line; or `fault` with what a person should never see."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with limited(SECONDS, copy), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return "result", subject.command(copy)
    except SystemExit as stopped:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
        if stopped.code == 2 and len(lines) == 1 and "Traceback" not in err.getvalue():
            return "line", lines[0]
        return "fault", f"exit code {stopped.code} and {len(lines)} error lines: {err.getvalue()[-1500:]}"
    except HangsError:
        return "fault", "it hangs"
    except Exception:
        return "fault", traceback.format_exc()[-2500:]


def attack(subjects, rounds, seed, folder):
    """Damage one file of one subject after another.

    Returns:
        One line for every round in which the command neither did as with whole files nor ended with one line, and how
        often it ended in which way.
    """
    rng, faults, counts = random.Random(seed), [], {"as before": 0, "one line": 0, "fault": 0}
    expected = {}
    for number in range(rounds):
        subject = subjects[number % len(subjects)]
        copy = folder / str(number)
        if subject.name not in expected:
            shutil.copytree(subject.folder, copy)
            expected[subject.name] = outcome(subject, copy)
            assert expected[subject.name][0] == "result", expected[subject.name][1]
            shutil.rmtree(copy)
        shutil.copytree(subject.folder, copy)
        path = rng.choice(sorted(subject.files(copy)))
        # a list that a person names may be a pipe, and is waited for as by any program
        how = damage(path, rng, pipes=subject.checked or path.parent != copy)
        ended, what = outcome(subject, copy)
        if ended == "line":
            counts["one line"] += 1
        elif ended == "result" and (not subject.checked or what == expected[subject.name][1]):
            counts["as before"] += 1
        else:
            counts["fault"] += 1
            what = what if ended == "fault" else "it ends well with another result"
            faults.append(f"round {number}, {subject.name}: {path.relative_to(copy)}, {how}: {what}")
        shutil.rmtree(copy)
    return faults, counts
