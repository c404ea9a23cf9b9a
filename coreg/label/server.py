"""A server for one page and one person: it listens to this machine alone and writes one file of one run folder.

Whoever asks has to know the token in the address, which is new at every start. Another site that a browser shows at the
same time does not know it, and cannot pass for this one: the names of host and origin are compared.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from coreg.errors import UserError
from coreg.label.answers import merge_answers, read_answers
from coreg.label.page import LABEL_NEXT, LabelPage, page
from coreg.plaintext import printable
from coreg.records import Each, Maybe, Number, RecordError, parse_record

LARGEST = 1 << 20  # bytes of a request
SECONDS = 30  # that a request may take
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


class LabelServer(ThreadingHTTPServer):
    """Serves the page of a run folder on 127.0.0.1 until its person is done.

    Attributes:
        address: to be opened in a browser.
        done: set when the page was closed by its button.
    """

    daemon_threads = True

    def __init__(self, folder: Path, shown: LabelPage, port: int = 0) -> None:
        """Check label_next.csv and take the port, or a free one for 0.

        Raises:
            UserError: the port is taken, or label_next.csv cannot be read.
        """
        self.folder, self.shown, self.file = folder, shown, folder / LABEL_NEXT
        self.token, self.lock, self.done = secrets.token_urlsafe(24), threading.Lock(), threading.Event()
        read_answers(self.file, shown)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UserError(f"port {port} cannot be used ({error.strerror}); name another with --port") from None
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.address = f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def server_bind(self) -> None:
        """Take the port; the server's name is not asked for, as it would be of a name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def page(self) -> str:
        """The page as it is now."""
        with self.lock:
            return page(self.shown, self.folder, read_answers(self.file, self.shown))

    def take(self, body: bytes) -> None:
        """Write the answers of a request.

        Raises:
            RecordError: it holds no answers to what is asked. UserError: they cannot be written.
        """
        record = parse_record(body, {"answers": Each(Maybe([Number(0, len(self.shown.class_names) - 1)]))})
        changed: dict[int, list[int] | None] = {}
        for name, answer in record["answers"].items():
            if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < len(self.shown.images)):
                raise RecordError(f"there is no image {printable(name[:20])}")
            if answer is not None and len(answer) > 1 and not self.shown.several:
                raise RecordError("an image has one label here")
            changed[int(name)] = None if answer is None else sorted(set(answer))
        with self.lock:
            merge_answers(self.file, self.shown, changed)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    server_version, sys_version, timeout = "coreg", "", SECONDS

    def do_GET(self) -> None:
        if self._asks_here() == "":
            try:
                self._reply(HTTPStatus.OK, self.server.page(), "text/html; charset=utf-8")
            except UserError as error:  # label_next.csv was changed by hand since
                self._reply(HTTPStatus.CONFLICT, f"{error}\n", "text/plain; charset=utf-8")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        what = self._asks_here()
        if what not in ("answers", "done"):
            return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            return self._refuse(HTTPStatus.FORBIDDEN, "the request is from elsewhere")
        if self.headers.get("Content-Type") != "application/json":
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the request is no JSON")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return self._refuse(HTTPStatus.LENGTH_REQUIRED, "the request has no length")
        if len(length) > 10 or int(length) > LARGEST:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too long")
        body = self.rfile.read(int(length))
        if what == "done":
            self._reply(HTTPStatus.OK, "{}")
            return self.server.done.set()
        try:
            self.server.take(body)
        except RecordError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except UserError as error:
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        self._reply(HTTPStatus.OK, "{}")

    def _asks_here(self) -> str | None:
        """What is asked for, after the token; None for whoever does not know it or came by another name of the host."""
        if self.headers.get("Host") not in self.server.hosts:
            return None
        token, slash, what = self.path.removeprefix("/").partition("/")
        return what if slash and hmac.compare_digest(token.encode(), self.server.token.encode()) else None

    def _refuse(self, status: HTTPStatus, trouble: str) -> None:
        self._reply(status, json.dumps({"trouble": printable(trouble)}))

    def _reply(self, status: HTTPStatus, content: str, kind: str = "application/json") -> None:
        data = content.encode()
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged: the address holds the token."""
