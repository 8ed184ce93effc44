"""A stand-in for the Hugging Face Hub: dataset repositories in memory, and the endpoints that its client calls.

Made after the requests of huggingface_hub. What a repository holds is what was committed; contents of large files are
taken by their SHA-256, and taken once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
LARGE = 4096
"""Bytes from which a file is stored as a large one; the Hub's own bound depends on its name too."""


@dataclass(frozen=True)
class Blob:
    """Content of a file, and whether it is a large one."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0%s" % (len(self.content), self.content)).hexdigest()


@dataclass
class Repo:
    """A dataset repository: commits by hash, and where branches stand."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        sha = self.at(revision)
        assert sha is not None
        return {name: blob.content for name, blob in self.commits[sha].items()}


class StandIn:
    """The server.

    Attributes:
        repos: repositories by ``"owner/name"``.
        large: contents of large files by their SHA-256.
        uploads: SHA-256 of each large file that was received, in order.
        downloads: names of the files that were served, in order.
        uploads_left: large files that are still taken before the server fails; ``None`` for all.
        shortened: bytes that are missing from each large file that is served, though its size was promised.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.downloads: list[str] = []
        self.uploads_left: int | None = None
        self.shortened = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(_Request(self))

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - names that the library calls

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        return Handler

    def answer(self, request: _Request) -> None:
        for pattern, method in _ROUTES:
            match = re.fullmatch(pattern, request.route)
            if match is not None:
                method(self, request, *(unquote(part) if part else part for part in match.groups()))
                return
        request.refuse(404, "unknown route")

    # ---- repositories

    def create(self, request: _Request) -> None:
        if not request.authorised:
            request.refuse(401)
            return
        asked = request.json()
        name = f"{asked['organization']}/{asked['name']}"
        assert asked["type"] == "dataset"
        if name in self.repos:
            request.send(409, {"error": "exists", "url": f"{self.url}/datasets/{name}"})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", {}, "initial commit")
        request.send(200, {"url": f"{self.url}/datasets/{name}", "name": name})

    def info(self, request: _Request, name: str, revision: str | None) -> None:
        if (found := self._at(request, name, revision or "main")) is not None:
            repo, sha = found
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            request.send(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, request: _Request, name: str, revision: str) -> None:
        if (found := self._at(request, name, revision)) is not None:
            repo, sha = found
            request.send(200, [_described(path, blob) for path, blob in repo.commits[sha].items()])

    def branch(self, request: _Request, name: str, branch: str) -> None:
        if (found := self._at(request, name, "main", write=True)) is not None:
            repo, sha = found
            status = 409 if branch in repo.branches else 200
            repo.branches.setdefault(branch, sha)
            request.send(status, {})

    def _at(self, request: _Request, name: str, revision: str, *, write: bool = False) -> tuple[Repo, str] | None:
        """A repository and a commit; else the refusal was sent."""
        repo = self.repos.get(name)
        if write and not request.authorised:
            request.refuse(401)
        elif repo is None or (repo.private and not request.authorised):
            request.refuse(404 if request.authorised else 401, code="RepoNotFound")
        elif (sha := repo.at(revision)) is None:
            request.refuse(404, code="RevisionNotFound")
        else:
            return repo, sha
        return None

    # ---- what is written

    def validate(self, request: _Request) -> None:
        assert request.json()["content"].startswith("---\n")
        request.send(200, {"warnings": [], "errors": []})

    def preupload(self, request: _Request, name: str, revision: str) -> None:
        if (found := self._at(request, name, revision, write=True)) is None:
            return
        repo, sha = found
        there = repo.commits[sha]
        files = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if asked["size"] >= LARGE else "regular",
                "shouldIgnore": False,
                "oid": there[asked["path"]].oid if asked["path"] in there else None,
            }
            for asked in request.json()["files"]
        ]
        request.send(200, {"files": files})

    def batch(self, request: _Request, name: str) -> None:
        assert name in self.repos
        objects = []
        for asked in request.json()["objects"]:
            one = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.large:
                one["actions"] = {"upload": {"href": f"{self.url}/upload/{asked['oid']}"}}
            objects.append(one)
        request.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, request: _Request, oid: str) -> None:
        content = request.body
        if self.uploads_left == 0:
            request.refuse(400, "out of order")
            return
        if self.uploads_left is not None:
            self.uploads_left -= 1
        assert hashlib.sha256(content).hexdigest() == oid
        self.large[oid] = content
        self.uploads.append(oid)
        request.send(200, {})

    def commit(self, request: _Request, name: str, revision: str) -> None:
        if (found := self._at(request, name, revision, write=True)) is None:
            return
        repo, sha = found
        files = dict(repo.commits[sha])
        summary = ""
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                summary = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = Blob(self.large[value["oid"]], large=True)
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        sha = repo.commit(revision, files, summary)
        request.send(200, {"commitUrl": f"{self.url}/datasets/{name}/commit/{sha}", "commitOid": sha})

    # ---- what is read

    def resolve(self, request: _Request, name: str, revision: str, path: str) -> None:
        if (found := self._at(request, name, revision)) is None:
            return
        repo, sha = found
        blob = repo.commits[sha].get(path)
        if blob is None:
            request.refuse(404, code="EntryNotFound")
            return
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        content, status = blob.content, 200
        if request.method == "GET":
            self.downloads.append(path)
            content = content[: len(content) - self.shortened] if blob.large else content
            if (range_ := request.headers.get("Range")) is not None:
                start = int(range_.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content, status = content[start:], 206
        request.send(status, content, headers)


class _Request:
    """One request, and how it is answered."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._handler = handler
        self.method = handler.command
        self.headers = handler.headers
        self.route = f"{'GET' if self.method == 'HEAD' else self.method} {urlsplit(handler.path).path}"
        self.body = self._read()

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self._handler.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self._handler.rfile.readline(), 16):
            parts.append(self._handler.rfile.read(size))
            self._handler.rfile.readline()
        self._handler.rfile.readline()
        return b"".join(parts)

    @property
    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def json(self) -> Any:
        return json.loads(self.body)

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._handler.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self._handler.send_header(name, value)
        self._handler.end_headers()
        if self.method != "HEAD":
            self._handler.wfile.write(body)

    def refuse(self, status: int, message: str = "refused", code: str | None = None) -> None:
        self.send(status, {"error": message}, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))


def _described(path: str, blob: Blob) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.large:
        found["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
    return found


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"POST /api/repos/create", StandIn.create),
    (r"POST /api/validate-yaml", StandIn.validate),
    (rf"GET /api/datasets/{_NAME}(?:/revision/([^/]+))?", StandIn.info),
    (rf"GET /api/datasets/{_NAME}/tree/([^/]+)", StandIn.tree),
    (rf"POST /api/datasets/{_NAME}/branch/([^/]+)", StandIn.branch),
    (rf"POST /api/datasets/{_NAME}/preupload/([^/]+)", StandIn.preupload),
    (rf"POST /api/datasets/{_NAME}/commit/([^/]+)", StandIn.commit),
    (rf"POST /datasets/{_NAME}\.git/info/lfs/objects/batch", StandIn.batch),
    (r"PUT /upload/([0-9a-f]+)", StandIn.upload),
    (rf"GET /datasets/{_NAME}/resolve/([^/]+)/(.+)", StandIn.resolve),
)
