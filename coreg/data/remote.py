"""Files at URLs, read by range: `s3://`, `gs://`, `hf://`, `https://`, `memory://` and what else the library fsspec knows.

How a store is reached, and with which credentials, is for the library that speaks with it: its environment variables, its
files, or what a person wrote into the URL. Nothing of the latter is ever written down (`without_credentials`).
"""

from __future__ import annotations

import functools
import hashlib
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from coreg.data.decode import UnreadableImage
from coreg.data.ranges import LastFew
from coreg.errors import UserError
from coreg.plaintext import one_line, printable, without_credentials

T = TypeVar("T")
BLOCK_BYTES = 4 << 20  # read at a time: less, and a process would wait for answers rather than for bytes
BLOCKS_KEPT = 16  # by a process
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between tries
SILENT_SECONDS = 60  # after which a web server that sends nothing has failed
# the libraries' words for what changes with the content of a file, the surest first
_VERSIONS = (
    "etag", "content-md5", "md5hash", "digest", "blob_id", "oid", "generation", "crc32c", "last-modified", "lastmodified",
    "last_modified", "updated", "modified", "mtime", "created",
)  # fmt: skip
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_blocks = LastFew(BLOCKS_KEPT)
_lost: dict[str, str] = {}  # URL -> why it cannot be read, as this process has seen


class SourceError(Exception):
    """A file at a URL cannot be read, however often one tries; the message is the reason, without credentials."""


def is_url(spec: str) -> bool:
    """Whether `spec` begins like `s3://`."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", spec) is not None


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, as it was when it was listed."""

    url: str  # with the credentials that a person may have put into it
    size: int  # bytes
    version: str  # what its store says of its content
    beside: Sequence[str] = field(default=(), repr=False, compare=False)  # URLs that tell whether the store still answers

    @property
    def place(self) -> str:
        """Where it is, without credentials."""
        return place_of(self.url)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; the file is compared with what it was when it was listed.

        Raises:
            UnreadableImage: they cannot be read, and other files of the list can.
            UserError: nothing can be read any more, or the file has changed.
        """
        if self.url in _lost:
            raise UnreadableImage(_lost[self.url])
        try:
            if length > BLOCK_BYTES:
                return self._fetch(offset, offset + length)
            content, first = b"", offset // BLOCK_BYTES
            for number in range(first, -(-(offset + length) // BLOCK_BYTES)):
                start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self.size)
                fetch = functools.partial(self._fetch, start, stop)
                content += _blocks.get((self.url, self.version, start), fetch)
            return content[offset - first * BLOCK_BYTES :][:length]
        except SourceError as error:
            # of one file that is lost among others its images are lost; of a store that is lost, no image is
            if not any(_answers(url) for url in self.beside if url != self.url and url not in _lost):
                raise UserError(
                    f"cannot read {self.place}: {error}; when it can be read again, run the same command again"
                ) from None
            _lost[self.url] = f"{posixpath.basename(self.place)}: {error}"
            raise UnreadableImage(_lost[self.url]) from None

    def _fetch(self, start: int, stop: int) -> bytes:
        def once() -> bytes:
            system, path = _opened(self.url)
            content, failed = b"", None
            try:
                content = system.cat_file(path, start=start, end=stop)
            except Exception as error:  # perhaps because there is nothing any more where something was
                failed = error
            self._refuse_changed()  # afterwards, so that what was read is what was listed
            if failed is not None:
                raise failed
            if len(content) > stop - start:
                raise UserError(f"{self.place} is served whole, not by range; copy it to a disk, or to another server")
            if len(content) < stop - start:
                raise ConnectionError(f"the connection ended after {len(content)} of {stop - start} bytes")
            return content

        return tried(once, self.url)

    def _refuse_changed(self) -> None:
        now = _version(_about(self.url))
        if now != (self.size, self.version):
            what = "another version of it" if now[0] == self.size else f"{now[0]} bytes instead of {self.size}"
            raise UserError(
                f"{self.place} was changed since it was listed ({what}): put back what it was, or annotate anew into "
                f"another --output_dir"
            )


def place_of(url: str) -> str:
    """A URL without user, password and what comes after `?`."""
    return without_credentials(url.partition("?")[0])


def remote_file(url: str) -> RemoteFile:
    """The file at a URL.

    Raises:
        SourceError: it is not there, or cannot be read.
        UserError: what speaks with its store is not installed.
    """

    def once() -> RemoteFile:
        about = _about(url)
        size, version = _version(about)
        if about.get("type", "file") != "file" or size is None:
            raise FileNotFoundError("it is no file" if size is not None else "the server does not tell its size")
        return RemoteFile(url, size, version)

    return tried(once, url)


def listed(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """URLs of the files below a folder whose names end in one of `suffixes`, hidden ones apart, sorted.

    Raises:
        SourceError: it cannot be listed.
        UserError: what speaks with its store is not installed.
    """

    def once() -> list[str]:
        system, path = _opened(url)
        files = [name for name in system.find(path) if name.lower().endswith(suffixes)]
        return sorted(system.unstrip_protocol(name) for name in files if not posixpath.basename(name).startswith("."))

    return tried(once, url)


def tried(action: Callable[[], T], url: str) -> T:
    """What `action` gives, which is tried again where that may help.

    Raises:
        SourceError: it failed as often as it was tried. UserError: as it did.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except (UserError, UnreadableImage):
            raise
        except Exception as error:  # every library has errors of its own
            if wait is None or not _may_pass(error):
                raise SourceError(_reason(error, url)) from None
            time.sleep(wait)
    raise AssertionError


# ---- what libraries give --------------------------------------------------------------------------------------------


def _opened(url: str) -> tuple[Any, str]:
    """What speaks with the store of a URL (one for each process, which fsspec keeps), and the file's name there.

    Raises:
        UserError: it is not installed, or there is none.
    """
    kind, place = url.partition("://")[0].lower(), place_of(url)
    try:
        import fsspec
    except ImportError:
        raise _not_installed(place, "fsspec") from None
    try:
        options: dict[str, Any] = {"use_listings_cache": False}  # what is asked for is what is there now
        if kind in ("http", "https") and "client_kwargs" not in fsspec.config.conf.get(kind, {}):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS)
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(kind) or getattr(error, "name", None) or _reason(error, url)
        raise _not_installed(place, package) from None
    except ValueError as error:
        raise UserError(
            f"{place} cannot be opened ({_reason(error, url)}); write a URL that begins with s3://, gs://, hf:// or https://"
        ) from None


def _not_installed(place: str, package: str) -> UserError:
    return UserError(
        f"{place} needs {package}, which is not installed: pip install {package} (all that URLs need is the extra `remote`)"
    )


def _about(url: str) -> dict[str, Any]:
    """What fsspec says of a file, asked for anew."""
    system, path = _opened(url)
    # the hub's part of fsspec gives earlier answers again, whatever its options say
    return system.info(path, **({"refresh": True} if url.lower().startswith("hf:") else {}))


def _version(about: dict[str, Any]) -> tuple[int | None, str]:
    """Size in bytes, and what the store says of the content, from fsspec's record of a file."""
    known = {key.lower(): value for key, value in about.items()}
    key = next((name for name in _VERSIONS if known.get(name) is not None), "")
    return known.get("size"), f"{key} {known.get(key)}" if key else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The number with which a server has answered."""
    for one in _chain(error):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            number = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            number = getattr(one, "status", None) or getattr(answer, "status_code", None)
        if isinstance(number, int):
            return number
    return None


def _may_pass(error: Exception) -> bool:
    """Whether another try may go better."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if any("Credentials" in type(one).__name__ for one in _chain(error)):
        return False
    # a web server that fails is one without the file to fsspec, with the failure as its cause
    return not isinstance(error, (FileNotFoundError, PermissionError, NotImplementedError)) or error.__cause__ is not None


def _reason(error: Exception, url: str) -> str:
    """Why it failed, for a person, on one line and without credentials."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) and (status or 404) == 404:
        return "no such file"
    text = one_line(error)
    # a library may have parts of the URL in its words
    user, query = re.match(r"(?:[^/]*://([^/]*)@)?[^?]*\??(.*)", url, re.DOTALL).groups()
    for secret in filter(None, (user, query)):
        text = text.replace(secret, "...")
    text = printable(without_credentials(text))[:200]
    return f"the server answered {status}" if status and str(status) not in text else text


def _answers(url: str) -> bool:
    """Whether a file is there, asked once."""
    try:
        _about(url)
        return True
    except Exception:
        return False


def fingerprint(file: RemoteFile) -> str:
    """sha256 (hex) of where a file is and of which version it is."""
    return hashlib.sha256(f"{file.place}\n{file.size}\n{file.version}".encode()).hexdigest()
