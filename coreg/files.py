"""Files that are there whole or not at all, and records from disk that are checked before anything believes them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import posixpath
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreg.errors import UserError

# ---- writing --------------------------------------------------------------------------------------------------------


def reason_of(error: BaseException) -> str | None:
    """Why a file could not be written, in a few words, or None for an error that is not the file system's.

    Libraries wrap what the system said: torch in a RuntimeError, safetensors in one of its own.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO):
        if f"os error {number}" in text or os.strerror(number) in text:
            return os.strerror(number)
    cause = error.__cause__ or error.__context__
    return reason_of(cause) if cause is not None else None


@contextlib.contextmanager
def replacing(path: str | Path, remedy: str = "free some space or choose another place") -> Iterator[Path]:
    """A new file beside `path` to write to, which takes its place, flushed to the disk, when the block ends well.

    A symbolic link is written through, a device or pipe directly. The file gets the permissions that the umask gives,
    whatever permissions the library that fills it prefers. Its name cannot be foreseen, so nothing can be laid in its way.

    Args:
        path: the file to make or to replace.
        remedy: what the person can do when it cannot be written; the end of the error's one line.

    Raises:
        UserError: it cannot be written; nothing is left behind and what was at `path` is untouched.
    """
    given, temporary = Path(path), None
    try:
        # as given, and not where a link leads: /dev/stdout leads to a name that is no place
        if given.exists() and not given.is_file():
            if given.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with _kept_open(given) if given.is_fifo() else contextlib.nullcontext():
                yield given
            return
        target = Path(os.path.realpath(given))
        # its own name is kept at the end: libraries go by the suffix
        temporary = target.with_name(f".tmp.{secrets.token_hex(8)}.{target.name[-100:]}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        with temporary.open("rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(target)
    except UserError:
        _remove(temporary)
        raise
    except Exception as error:
        _remove(temporary)
        reason = reason_of(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {given} ({reason}); {remedy}") from None
    except BaseException:
        _remove(temporary)
        raise


@contextlib.contextmanager
def _kept_open(pipe: Path) -> Iterator[None]:
    """Hold a pipe that somebody reads: to open one that nobody reads would mean to wait, perhaps for ever."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        raise OSError(
            error.errno, "it is a pipe that nobody reads" if error.errno == errno.ENXIO else error.strerror
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _remove(temporary: Path | None) -> None:
    if temporary is not None:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: str | Path, remedy: str = "free some space or choose another place") -> Iterator[Path]:
    """A new folder beside `folder` to fill, which takes its place, flushed to the disk, when the block ends well.

    What programs that were killed have left beside `folder` is removed; so one program at a time may write it. Files get
    the permissions that the umask gives, whatever permissions the library that writes them prefers.

    Args:
        folder: to make, with its parents, or to replace with all that is in it.
        remedy: what the person can do when it cannot be written; the end of the error's one line.

    Raises:
        UserError: it cannot be written; nothing is left behind and what was at `folder` is untouched.
    """
    final = Path(folder)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fchmod(file.fileno(), mode)
                    os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = reason_of(error) if isinstance(error, Exception) and not isinstance(error, UserError) else None
        if reason is None:
            raise
        raise UserError(f"cannot write {final} ({reason}); {remedy}") from None


def write_atomically(
    path: str | Path, content: str | bytes, remedy: str = "free some space or choose another place"
) -> None:
    """Write a whole file or nothing; text as UTF-8, with file names that are no UTF-8 kept as they are.

    Raises:
        UserError: it cannot be written; what was there is untouched.
    """
    with replacing(path, remedy) as temporary:
        temporary.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def check_writable(path: str | Path, option: str) -> None:
    """Make sure, before long work, that `path` can be written as a file.

    Args:
        path: the file that is to be written later; what it holds is not touched.
        option: its name on the command line.

    Raises:
        UserError: it is a folder, or lies where nothing can be written.
    """
    given = Path(path)
    # where a link leads; /dev/stdout leads to a name that is no place
    target = Path(os.path.realpath(given)) if given.is_file() or not given.exists() else given
    if target.is_dir():
        raise UserError(f"{option} {given} is a folder; give the name of a file, such as {given / 'output.csv'}")
    if not target.parent.is_dir():
        raise UserError(f"{option} {given}: there is no folder {target.parent}; make it, or choose another place")
    # a file is replaced by a new one in its folder, what is no file is written into
    places = [target] if target.exists() else []
    if target.is_file() or not places:
        places.append(target.parent)
    if not all(os.access(place, os.W_OK) for place in places):
        raise UserError(f"{option} {given} cannot be written (permission denied); choose another place")


# ---- folders --------------------------------------------------------------------------------------------------------

ABANDONED_SECONDS = 86_400.0  # a hidden folder of another machine that nobody has written into for so long


def this_machine() -> str:
    """A name for the set of processes that see each other: the host, and the container where there is one."""
    try:
        namespace = f"-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        namespace = ""
    return f"{platform.node()}{namespace}".replace("/", "_")


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


@contextlib.contextmanager
def making_folder(path: str | Path, remedy: str = "free some space or choose another place") -> Iterator[Path]:
    """A new hidden folder beside `path` to fill, which becomes `path`, all at once, when the block ends well.

    Of several processes that make the same folder at the same time, one has it and the others get the error.

    Args:
        path: the folder to make; an empty one may be there.
        remedy: as for `replacing`.

    Raises:
        UserError: it cannot be made or filled, or is there already; nothing is left behind.
    """
    given, temporary = Path(path), None
    try:
        target = Path(os.path.realpath(given))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        owner = f"{this_machine()}.{os.getpid()}.{secrets.token_hex(8)}"
        temporary = target.with_name(f".tmp.{owner}.{target.name[-100:]}")
        temporary.mkdir()
        yield temporary
        temporary.rename(target)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, UserError):
            raise UserError(str(error).replace(str(temporary), str(given))) from None
        reason = reason_of(error) if isinstance(error, Exception) else None
        if reason is None:
            raise
        raise UserError(f"cannot write {given} ({reason}); {remedy}") from None


def _remove_abandoned(target: Path) -> None:
    """Remove what processes that were killed left beside `target`, and nothing of those that live."""
    pattern = re.compile(rf"\.tmp\.(.+)\.(\d+)\.[0-9a-f]{{16}}\.{re.escape(target.name[-100:])}")
    for entry in os.scandir(target.parent):
        owner = pattern.fullmatch(entry.name)
        if owner is None:
            continue
        with contextlib.suppress(OSError):  # removed by another process at this moment
            ended = owner[1] == this_machine() and not is_running(int(owner[2]))
            if ended or time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)


# ---- names from outside ---------------------------------------------------------------------------------------------

_DEVICES = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", re.IGNORECASE
)  # files of these names are devices of Windows


def inside(name: str) -> str:
    """A posix path from an archive or a list as it lies in whatever folder it is put: `..` leads nowhere above that."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def file_name(text: str) -> str:
    """`text` as the name of one file or folder: no separator of any system, no NUL, no `..`, no device."""
    name = re.sub(r"[/\\\0]", "_", text)
    return f"_{name}" if not name.strip(" .") or _DEVICES.fullmatch(name) else name


def place_below(root: Path, name: str) -> Path:
    """The file `name` below the folder `root`, whatever a stranger wrote for a name; its folders are made.

    Raises:
        UserError: something is there already, or a link or a file is in the place of one of its folders.
    """
    *folders, last = [file_name(part) for part in inside(name).split("/")]
    place = root
    for folder in folders:
        place = place / folder
        with contextlib.suppress(FileExistsError):
            place.mkdir()
        if place.is_symlink() or not place.is_dir():
            raise UserError(f"{name!r} cannot be written: {place} is no folder; choose another output")
    place = place / last
    if os.path.lexists(place):
        raise UserError(f"{name!r} cannot be written: {place} is there already; choose another output")
    return place


# ---- reading --------------------------------------------------------------------------------------------------------


class RecordError(Exception):
    """A record is not what its writer wrote; the message says what is wrong with it, and where."""


@dataclass(frozen=True)
class Number:
    """A finite number within bounds, a whole one unless `whole` is false."""

    low: float = float("-inf")
    high: float = float("inf")
    whole: bool = True


@dataclass(frozen=True)
class Maybe:
    """A value that may be missing or null, and has to be of `kind` otherwise."""

    kind: Any


@dataclass(frozen=True)
class Each:
    """An object with any names, whose values all have to be of `kind`."""

    kind: Any


def check_record(value: Any, kind: Any, where: str = "") -> None:
    """Compare a value read from JSON with what it has to be.

    Args:
        value: what was read.
        kind: a type (`str`, `bool`, `dict`, `list`); a `Number`; a dict of required entries, more of which may be there;
            an `Each`; a list of one kind, for a list of any length of it; a `Maybe`; or a tuple of kinds, of which one has
            to fit.
        where: the name of the value, for the message.

    Raises:
        RecordError: it is something else.
    """
    name = where or "its content"
    if isinstance(kind, Maybe):
        if value is not None:
            check_record(value, kind.kind, where)
    elif isinstance(kind, tuple):
        problems = []
        for one in kind:
            try:
                return check_record(value, one, where)
            except RecordError as error:
                problems.append(str(error))
        raise RecordError(problems[0])
    elif isinstance(kind, Number):
        fits = isinstance(value, int if kind.whole else (int, float)) and not isinstance(value, bool)
        if not (fits and kind.low <= value <= kind.high and abs(value) != float("inf")):
            raise RecordError(
                f"{name} is {_short(value)}, expected a {'whole ' if kind.whole else ''}number{_bounds(kind)}"
            )
    elif isinstance(kind, dict):
        check_record(value, dict, where)
        for key, inner in kind.items():
            if key not in value and not isinstance(inner, Maybe):
                raise RecordError(f"{f'{where} has no' if where else 'there is no'} {key!r}")
            check_record(value.get(key), inner, f"{where}.{key}" if where else key)
    elif isinstance(kind, Each):
        check_record(value, dict, where)
        for key, item in value.items():
            check_record(item, kind.kind, f"{where}.{key}" if where else key)
    elif isinstance(kind, list):
        check_record(value, list, where)
        for index, item in enumerate(value):
            check_record(item, kind[0], f"{name}[{index}]")
    elif not isinstance(value, kind):
        raise RecordError(f"{name} is {_short(value)}, expected {NAMES.get(kind) or f'a {kind.__name__}'}")


NAMES = {str: "a text", bool: "true or false", dict: "an object", list: "a list"}


def _bounds(kind: Number) -> str:
    low, high = kind.low != float("-inf"), kind.high != float("inf")
    if low and high:
        return f" from {kind.low:g} to {kind.high:g}"
    return f" of at least {kind.low:g}" if low else f" of at most {kind.high:g}" if high else ""


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def parse_record(text: str | bytes, kind: Any = dict) -> Any:
    """The value that a JSON text holds, compared with `kind` (see `check_record`).

    Raises:
        RecordError: it is no JSON, is nested without end, or holds something else.
    """
    # as `write_atomically` writes it: file names that are no UTF-8 are kept as they are
    text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"it is no JSON ({' '.join(str(error).split())})") from None
    check_record(value, kind)
    return value


def read_file(path: Path, largest: int | None = None) -> bytes:
    """What a regular file holds; pipes and devices, at which a reader would wait, are refused.

    Raises:
        RecordError: it is missing, no file, cannot be read, or has more than `largest` bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RecordError("it is no file")
        if largest is not None and status.st_size > largest:
            raise RecordError(f"it has {status.st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise RecordError(error.strerror or str(error)) from None


def read_record(path: Path, kind: Any = dict, largest: int = 1 << 28) -> Any:
    """A JSON file, compared with `kind` (see `check_record`).

    Args:
        largest: bytes; a larger file is refused without being read.

    Raises:
        RecordError: it is missing, cannot be read, is no JSON, or holds something else. The caller, who knows what the
            file is for, says so to the person.
    """
    return parse_record(read_file(path, largest), kind)
