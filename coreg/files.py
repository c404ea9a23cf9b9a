"""Files and folders that are there whole or not at all, and names from outside that lead nowhere else."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import posixpath
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from coreg.errors import UserError
from coreg.plaintext import csv_rows

# ---- writing --------------------------------------------------------------------------------------------------------


def reason_of(error: BaseException) -> str | None:
    """Why a file could not be written, in a few words, or None for an error that is not the file system's.

    Libraries wrap the system's message: torch in a RuntimeError, safetensors in one of its own.
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
    given = Path(path)
    with _whole_or_nothing(given, remedy) as made:
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
        made.append(temporary)
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        with temporary.open("rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(target)


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


@contextlib.contextmanager
def _whole_or_nothing(given: Path, remedy: str) -> Iterator[list[Path]]:
    """What is put into the list is removed where an error comes, and the error's one line is about `given`."""
    made: list[Path] = []
    try:
        yield made
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if isinstance(error, UserError):
            text = str(error)
            for path in made:
                text = text.replace(str(path), str(given))
            raise UserError(text, error.silent) from None
        reason = reason_of(error) if isinstance(error, Exception) else None
        if reason is None:
            raise
        raise UserError(f"cannot write {given} ({reason}); {remedy}") from None


def write_atomically(
    path: str | Path, content: str | bytes, remedy: str = "free some space or choose another place"
) -> None:
    """Write a whole file or nothing; text as UTF-8, with file names that are no UTF-8 kept as they are.

    Raises:
        UserError: it cannot be written; what was there is untouched.
    """
    with replacing(path, remedy) as temporary:
        temporary.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_csv(path: str | Path, safe: bool = False) -> Iterator[Callable[[Iterable[Any]], Any]]:
    """A function that writes a row of cells to a CSV file, which is there whole or not at all (see `csv_rows`).

    Raises:
        UserError: it cannot be written; what was there is untouched.
    """
    # file names that are no UTF-8 are kept as they are
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield csv_rows(file, safe)


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
def making_folder(
    path: str | Path, remedy: str = "free some space or choose another place", replace: bool = False
) -> Iterator[Path]:
    """A new hidden folder beside `path` to fill, which becomes `path`, all at once and flushed to the disk, when the block
    ends well.

    A symbolic link is written through. Files get the permissions that the umask gives, whatever permissions the library
    that writes them prefers. What programs that were killed have left beside `path` is removed.

    Args:
        path: the folder to make, with its parents; an empty one may be there.
        remedy: as for `replacing`.
        replace: take the place of a folder with all that is in it; one program at a time may do so. Otherwise one of
            several processes that make the same folder has it and the others get the error.

    Raises:
        UserError: it cannot be made or filled, or is there already; nothing is left behind and what was there is untouched.
    """
    given = Path(path)
    with _whole_or_nothing(given, remedy) as made:
        target = Path(os.path.realpath(given))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target, alone=replace)
        temporary = _hidden(target)
        made.append(temporary)
        temporary.mkdir()
        yield temporary
        _settle(temporary)
        if replace and target.is_dir():
            old = _hidden(target)
            target.rename(old)  # aside and not removed: for as short a time as can be, there is none
            temporary.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(target)


def _hidden(target: Path) -> Path:
    """A name beside `target` that cannot be foreseen and says which process made it."""
    return target.with_name(f".tmp.{this_machine()}.{os.getpid()}.{secrets.token_hex(8)}.{target.name[-100:]}")


def _settle(folder: Path) -> None:
    """Give the files in a new folder the umask's permissions and flush them to the disk; what links lead to is not ours."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())


def _remove_abandoned(target: Path, alone: bool) -> None:
    """Remove what processes that were killed left beside `target`.

    Args:
        alone: no other process makes it at this time, on whatever machine; so all that is there was left.
    """
    pattern = re.compile(rf"\.tmp\.(.+)\.(\d+)\.[0-9a-f]{{16}}\.{re.escape(target.name[-100:])}")
    for entry in os.scandir(target.parent):
        owner = pattern.fullmatch(entry.name)
        if owner is None:
            continue
        with contextlib.suppress(OSError):  # removed by another process at this moment
            ended = alone or (owner[1] == this_machine() and not is_running(int(owner[2])))
            if ended or time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)


# ---- names from outside ---------------------------------------------------------------------------------------------

# files of these names are devices of Windows
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\..*)?", re.IGNORECASE)


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


# ---- checksums ------------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
