"""A server on loopback that answers huggingface_hub as the Hub does, and fails as it is told."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "someone/khala"
SHA = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """One repository, `files` by name; `sent` counts the bytes of each that went out.

    Faults: `status` by file name or "api" gives an HTTP status; `cut_after` by file name breaks
    the connection after so many bytes, once for each number; `wrong_sum` names files whose
    checksum is given wrongly; `damaged` by file name says how many answers have a flipped byte.
    """

    def __init__(self, files: dict[str, bytes], licence: str = "cc-by-nc-4.0") -> None:
        self.files, self.licence = files, licence
        self.status: dict[str, int] = {}
        self.cut_after: dict[str, list[int]] = {}
        self.wrong_sum: set[str] = set()
        self.damaged: Counter[str] = Counter()
        self.unlisted: set[str] = set()
        self.no_ranges = False
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.url = ""

    def sha256(self, name: str) -> str:
        return "0" * 64 if name in self.wrong_sum else hashlib.sha256(self.files[name]).hexdigest()

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            lfs = {"sha256": self.sha256(name), "size": len(data), "pointerSize": 1}
            about: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            siblings.append(about if name.endswith((".json", ".txt")) else {**about, "lfs": lfs})
        tags = [f"license:{self.licence}"]
        return {"id": REPO, "sha": SHA, "siblings": siblings, "tags": tags, "private": False}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if path.startswith(f"/api/models/{REPO}"):
                if hub.status.get("api"):
                    code = "RepoNotFound" if hub.status["api"] == 404 else ""
                    self.fail(hub.status["api"], code)
                else:
                    self.reply(200, json.dumps(hub.info()).encode(), {})
                return
            found = re.fullmatch(rf"/{REPO}/resolve/[^/]+/(.+)", path)
            name = found[1] if found else ""
            if name not in hub.files or name in hub.unlisted:
                self.fail(404, "EntryNotFound")
            elif hub.status.get(name):
                self.fail(hub.status[name])
            else:
                self.file(name, body)

        def file(self, name: str, body: bool) -> None:
            data = hub.files[name]
            headers = {
                "ETag": f'"{hub.sha256(name)}"',
                "X-Repo-Commit": SHA,
                "Accept-Ranges": "bytes",
            }
            status, start, stop = 200, 0, len(data)
            if body and (asked := self.headers.get("range")) and not hub.no_ranges:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()  # type: ignore[union-attr]
                start, stop = int(first), int(last) + 1 if last else len(data)
                status = 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            part = data[start:stop]
            if body and hub.damaged[name] > 0:
                hub.damaged[name] -= 1
                middle = len(part) // 2
                part = part[:middle] + bytes([part[middle] ^ 1]) + part[middle + 1 :]
            self.reply(status, part, headers, name, body)

        def reply(
            self,
            status: int,
            data: bytes,
            headers: dict[str, str],
            name: str = "",
            body: bool = True,
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if not body:
                return
            if hub.cut_after.get(name):
                data = data[: hub.cut_after[name].pop(0)]
                self.close_connection = True
            self.wfile.write(data)
            hub.sent[name] += len(data)

        def fail(self, status: int, code: str = "") -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve on a free port of loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
