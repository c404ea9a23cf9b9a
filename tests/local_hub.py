"""A model hub on loopback, as far as huggingface_hub's client asks for it: `python tests/local_hub.py FOLDER PORT`.

Everything that is uploaded lies under FOLDER/models/USER/NAME (or datasets/…), in one revision; anybody may read it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    root: Path
    private: dict[str, bool]

    def answer(self, content: object = None, status: int = 200, head: bool = False, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
            kind = f"{asked.get('type') or 'model'}s"
            (self.root / kind / name).mkdir(parents=True, exist_ok=True)
            self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        kind, name, action = re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)/(preupload|commit)/main.*", self.path).groups()
        if action == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": file["path"]} | how for file in json.loads(body)["files"]]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                target = self.root / kind / name / line["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
        address = f"http://{self.headers['Host']}/{name}"
        return self.answer({"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def do_GET(self, head: bool = False) -> None:
        if self.path in ("/", "/api/whoami-v2"):
            return self.answer({"name": "someone", "type": "user", "orgs": []}, head=head)
        if found := re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?(\?.*)?", self.path):
            kind, name = found[1], found[2]
            folder = self.root / kind / name
            files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            if "/tree/" in self.path:
                sized = [{"type": "file", "path": file, "size": (folder / file).stat().st_size} for file in files]
                return self.answer([one | {"oid": COMMIT} for one in sized], head=head)
            about = {"id": name, "sha": COMMIT, "private": self.private.get(name)}
            return self.answer(about | {"siblings": [{"rfilename": file} for file in files]}, head=head)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", self.path):
            file = self.root / "models" / found[1] / found[2]
            if file.is_file():
                content = file.read_bytes()
                return self.answer(content, head=head, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        return self.answer({"error": "nothing here"}, 404, head)

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def local_hub(root: Path, port: int = 0) -> Iterator[str]:
    """The address of a hub that keeps its files in `root`."""
    handler = type("LocalHub", (Hub,), {"root": Path(root), "private": {}})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


if __name__ == "__main__":
    with local_hub(Path(sys.argv[1]), int(sys.argv[2])) as address:
        print(address, flush=True)
        threading.Event().wait()
