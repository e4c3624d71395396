"""A stand-in for the hub's API: repositories, branches, and commits with large files apart."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_standin"


class Hub:
    """What the stand-in has been told.

    Attributes:
        branches: files by name, by branch, by repository.
        objects: large files by their SHA-256.
        requests: method and path of every request.
    """

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.private: dict[str, bool] = {}
        self.endpoint = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(404, {"error": "not found"})

    do_GET = do_HEAD

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        self.hub.requests.append(f"PUT {self.path}")
        if hashlib.sha256(content).hexdigest() != oid:
            self._answer(400, {"error": "another hash"})
            return
        self.hub.objects[oid] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "invalid token"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/branch/" in path:
            repository, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            self._branch(repository, branch)
        elif "/preupload/" in path:
            # As the hub's own rules have it: tensors and large files are kept apart.
            self._answer(200, {"files": [self._mode(one) for one in json.loads(body)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/commit/" in path:
            repository, _, branch = path.removeprefix("/api/models/").partition("/commit/")
            self._commit(repository, branch, body)
        else:
            self._answer(404, {"error": path})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or 'somebody'}/{asked['name']}"
        known = name in self.hub.branches
        self.hub.branches.setdefault(name, {"main": {}})
        self.hub.private.setdefault(name, asked.get("visibility") == "private")
        self._answer(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}", "id": name})

    def _branch(self, repository: str, branch: str) -> None:
        branches = self.hub.branches[repository]
        known = branch in branches
        branches.setdefault(branch, {})
        self._answer(409 if known else 200, {})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".bin"))
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
        }

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                **one,
                "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{one['oid']}"}},
            }
            for one in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        files = self.hub.branches[repository][branch]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.endpoint}/{repository}/commit/{'0' * 40}"
        self._answer(200, {"commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def stand_in() -> Iterator[Hub]:
    """Run a hub on a port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
