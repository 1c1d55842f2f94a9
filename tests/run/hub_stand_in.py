"""A server on this machine that answers huggingface_hub as the hub does: create, commit, list and download.

It asks for every file in the commit itself (the hub's ``regular`` upload mode), as the hub does for small ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories by name, and their commits by number, the newest last."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[Files]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.tags: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit_of(self, name: str, revision: str) -> tuple[str, Files] | None:
        """Hash and files of a revision: ``main``, a tag, or a hash."""
        commits = self.repositories.get(name, [])
        for number, files in reversed(list(enumerate(commits))):
            sha = hashlib.sha1(f"{name}/{number}".encode()).hexdigest()
            if revision in ("main", sha) or self.tags.get(revision) == number:
                return sha, files
        return None


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None: ...

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what: str) -> None:
        self.answer({"error": f"{what} not found"}, 404, X_Error_Code=what, X_Error_Message=f"{what} not found")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+)|/tree/([^/]+))?", path):
            name, revision = match[1], match[2] or match[3] or "main"
            if name not in self.server.repositories:
                return self.missing("RepoNotFound")
            found = self.server.commit_of(name, revision)
            if found is None:
                return self.missing("RevisionNotFound")
            sha, files = found
            if match[3]:
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
                return self.answer(tree)
            siblings = [{"rfilename": file} for file in files]
            return self.answer({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self.server.commit_of(match[1], match[2])
            if found is None or match[3] not in found[1]:
                return self.missing("EntryNotFound")
            sha, data = found[0], found[1][match[3]]
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(data, ETag=tag, X_Repo_Commit=sha)
        return self.missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_stand_in":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories.setdefault(name, [])
            self.server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self.answer({"url": f"{self.server.address}/{name}", "id": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            return self.answer({"files": modes})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            name, commits = match[1], self.server.repositories[match[1]]
            files = dict(commits[-1]) if commits else {}
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "header":
                    self.server.messages.append(item["value"]["summary"])
                elif item["key"] == "file":
                    files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            commits.append(files)
            found = self.server.commit_of(name, "main")
            assert found is not None
            url = f"{self.server.address}/{name}/commit/{found[0]}"
            return self.answer({"success": True, "commitOid": found[0], "commitUrl": url})
        return self.missing("RepoNotFound")
