"""Servers that tests start on this machine, and that fail as they ask them to; it holds no test."""

import contextlib
import hashlib
import http.client
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs


class _Server:
    """A server of this machine; its handlers know it as their `owner`."""

    def __init__(self, handler):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"owner": self}))
        self.server.daemon_threads = True
        self.place = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.place}"
        threading.Thread(target=self.server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


class WebServer(_Server):
    """Serves `files` by range.

    Attributes:
        files: name -> content.
        faults: name -> what becomes of the GETs that come next: a status, "cut" (half of what was announced), "slow" (a
            pause in the middle) or "whole" (the range is ignored).
        broken: names that are answered with 500.
        down: nothing is answered at all.
        key: what has to stand after `?` or before `@`, where it is not None.
        asked: (method, name, range) of every request.
    """

    def __init__(self, files):
        self.files, self.faults, self.broken, self.asked = dict(files), {}, set(), []
        self.down, self.key = False, None
        super().__init__(Handler)


class Handler(_Quiet):
    def do_HEAD(self):
        self.answer(None)

    def do_GET(self):
        name = self.path.partition("?")[0].lstrip("/")
        faults = self.owner.faults.get(name)
        self.answer(faults.pop(0) if faults else "none")

    def refuse(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, fault):
        """Answer a HEAD, where `fault` is None, or a GET."""
        name, _, query = self.path.lstrip("/").partition("?")
        span = self.headers.get("Range")
        self.owner.asked.append((self.command, name, span))
        if self.owner.down:
            self.close_connection = True
            return
        allowed = self.owner.key is None or query == self.owner.key or "Authorization" in self.headers
        there = allowed and name in self.owner.files and name not in self.owner.broken
        if not there:
            self.refuse(403 if not allowed else 500 if name in self.owner.broken else 404)
            return
        content = whole = self.owner.files[name]
        if span and fault != "whole":
            first, last = span.removeprefix("bytes=").split("-")
            content = whole[int(first) : int(last) + 1]
            fault = fault if content else 416
        if isinstance(fault, int):
            self.refuse(fault)
            return
        self.send_response(206 if span and fault != "whole" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.md5(whole).hexdigest()}"')
        self.end_headers()
        if fault is None:
            return
        with contextlib.suppress(ConnectionError):
            half = len(content) // 2 if fault in ("cut", "slow") else 0
            self.wfile.write(content[:half])
            self.wfile.flush()
            if fault == "cut":
                self.close_connection = True
                return
            time.sleep(0.3 if fault == "slow" else 0)
            self.wfile.write(content[half:])


class Hub(_Server):
    """What a model hub answers about the data set `me/set` with these `files`, name -> content."""

    def __init__(self, files):
        self.files = dict(files)
        super().__init__(_OfHub)


class _OfHub(_Quiet):
    def send(self, content, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def about(self, names):
        files, paths = self.owner.files, [name for name in names if name in self.owner.files]
        records = [
            {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}
            for name in paths
        ]
        self.send(json.dumps(records).encode())

    def do_POST(self):
        self.about(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"])

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/datasets/me/set/resolve/main/"):
            content = self.owner.files[path.removeprefix("/datasets/me/set/resolve/main/")]
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self.send(content[int(first) : int(last) + 1], 206)
        elif path.startswith("/api/datasets/me/set/tree/main"):
            self.about(self.owner.files)
        elif path.startswith("/api/datasets/me/set"):
            self.send(json.dumps({"id": "me/set", "_id": "1", "sha": "a" * 40, "private": False}).encode())
        else:
            self.send(b"{}", 404)


class FaultyProxy:
    """Hands requests on to another server on this machine, and spoils the answers to some: 500, cut, or late.

    Attributes:
        spoiled: what became of each answer that was spoiled, in order.
    """

    def __init__(self, place, share, seed=0):
        """Spoil this `share` of the answers of the server at `place`, which is HOST:PORT."""
        self.place, self.share, self.random, self.spoiled = place, share, random.Random(seed), []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Between,), {"owner": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Between(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.hand_on()

    def do_GET(self):
        self.hand_on()

    def hand_on(self):
        connection = http.client.HTTPConnection(self.owner.place)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        content, status = answer.read(), answer.status
        fault = self.owner.random.choice([500, "cut", "late"]) if self.owner.random.random() < self.owner.share else None
        if fault is not None:
            self.owner.spoiled.append(fault)
        time.sleep(0.5 if fault == "late" else 0)
        if fault == 500:
            content, status = b"", 500
        self.send_response(status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding") and not (fault == 500 and name == "Content-Length"):
                self.send_header(name, value)
        if fault == 500:
            self.send_header("Content-Length", "0")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = self.close_connection or fault == "cut"
        connection.close()
