"""A local server that speaks what the Hugging Face and ModelScope clients ask for, and a proxy.

Endpoints and headers are those that the installed clients use (huggingface_hub 2.4,
modelscope-hub 0.5). Everything listens on 127.0.0.1 only.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import re
import socket
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

MIB = 2**20
NAME = "acme/tiny-1.5b"
LFS_MIN_BYTES = MIB
BLOCK_BYTES = 2**16


@dataclass
class Repository:
    """A model on the server, and how it misbehaves."""

    files: dict[str, bytes]
    commit: str = "c0ffee" * 6 + "c0ff"
    branches: tuple[str, ...] = ("main", "master")
    token: str | None = None
    gated: bool = False


@dataclass
class Trouble:
    """What happens to answers: statuses instead, connections cut or stalled within a file."""

    status: int | None = None
    silent: bool = False
    cut_at: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    stall_at: dict[str, int] = field(default_factory=dict)


class Server:
    """Base of both: a threading HTTP server that stops with its context."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        class Bound(handler):  # type: ignore[misc, valid-type]
            owner = self

        self.released = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.http.handle_error = lambda *_: None
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(10)


class HubServer(Server):
    """Repositories, served to both clients."""

    def __init__(self) -> None:
        super().__init__(_HubHandler)
        self.repositories: dict[str, Repository] = {}
        self.trouble = Trouble()
        self.requests: list[str] = []
        self.bytes_sent: dict[str, int] = defaultdict(int)
        self.ranges: dict[str, list[str | None]] = defaultdict(list)
        self.tokens_at_storage: set[str | None] = set()
        self.stalled = threading.Event()

    def add(self, name: str, files: dict[str, bytes], **options) -> Repository:
        self.repositories[name] = Repository(files, **options)
        return self.repositories[name]

    @property
    def fetched(self) -> set[str]:
        return set(self.bytes_sent)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def reply(self, status, headers=(), body=b"", content_length=None):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header(
            "Content-Length", str(len(body) if content_length is None else content_length)
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value, status=200, headers=()):
        self.reply(
            status,
            {"Content-Type": "application/json", **dict(headers)},
            json.dumps(value).encode(),
        )


class _HubHandler(_Handler):
    owner: HubServer

    def do_GET(self):
        trouble = self.owner.trouble
        self.owner.requests.append(f"{self.command} {self.path}")
        if trouble.silent:
            self.owner.released.wait(60)
            self.close_connection = True
            return None
        if trouble.status is not None:
            return self.reply(trouble.status, body=b"trouble")
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        if match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self.owner.tokens_at_storage.add(self.headers.get("Authorization"))
            return self.send_file(self.owner.repositories[match[1]].files[match[2]], match[2], {})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.hugging_face_info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.hugging_face_file(*match.groups())
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", path):
            return self.modelscope(match[1], query, listing=match[2] is not None)
        return self.reply_json({"Code": 404, "Message": "no such page", "Success": False}, 404)

    # Hugging Face. Source: the API's answers as hf_api.py and file_download.py read them.

    def hugging_face_repository(self, name, revision):
        repository = self.owner.repositories.get(name)
        sent = self.headers.get("Authorization")
        if repository is None:
            # Without a token the hub does not tell what is missing from what is private.
            status = 404 if sent else 401
            self.reply(
                status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
        elif repository.gated:
            self.reply(
                403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            )
        elif sent and repository.token and sent != f"Bearer {repository.token}":
            message = "Invalid credentials in Authorization header"
            self.reply(401, {"X-Error-Message": message})
        elif repository.token and not sent:
            self.reply(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (*repository.branches, repository.commit):
            self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def hugging_face_info(self, name, revision):
        repository = self.hugging_face_repository(name, revision)
        if repository is not None:
            siblings = []
            for path, content in repository.files.items():
                entry = {"rfilename": path, "size": len(content), "blobId": _git_id(content)}
                if len(content) >= LFS_MIN_BYTES:
                    entry["lfs"] = {
                        "sha256": _sha256(content),
                        "size": len(content),
                        "pointerSize": 135,
                    }
                siblings.append(entry)
            self.reply_json(
                {"id": name, "sha": repository.commit, "siblings": siblings, "tags": []}
            )

    def hugging_face_file(self, name, revision, path):
        repository = self.hugging_face_repository(name, revision)
        if repository is None:
            return
        content = repository.files[path]
        headers = {"X-Repo-Commit": repository.commit}
        if len(content) < LFS_MIN_BYTES:
            self.send_file(content, path, {**headers, "ETag": f'"{_git_id(content)}"'})
        else:
            # Large files lie on another host, which must not see the token.
            headers["Location"] = f"http://localhost:{self.owner.port}/storage/{name}/{path}?sig=1"
            headers["X-Linked-Size"] = str(len(content))
            headers["X-Linked-ETag"] = f'"{_sha256(content)}"'
            self.reply(302, headers)

    # ModelScope. Source: _legacy_api.py and _download.py.

    def modelscope(self, name, query, *, listing):
        repository = self.owner.repositories.get(name)
        sent = self.headers.get("Authorization")
        if repository is None or query.get("Revision") not in (
            *repository.branches,
            repository.commit,
        ):
            return self.reply_json({"Code": 10010205001, "Message": "record not found"}, 404)
        if repository.token and sent != f"Bearer {repository.token}":
            return self.reply_json({"Code": 401, "Message": "unauthorized"}, 401)
        if not listing:
            return self.send_file(repository.files[query["FilePath"]], query["FilePath"], {})
        folders = {path.rpartition("/")[0] for path in repository.files} - {""}
        entries = [{"Path": path, "Type": "tree", "Size": 0} for path in folders]
        entries += [
            {"Path": path, "Type": "blob", "Size": len(content), "Sha256": _sha256(content)}
            for path, content in repository.files.items()
        ]
        return self.reply_json({"Code": 200, "Data": {"Files": entries}, "Success": True})

    def send_file(self, content, path, headers):
        trouble, asked = self.owner.trouble, self.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-\d*", asked)[1]) if asked else 0
        headers = {**headers, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "HEAD":
            return self.reply(200, headers, content_length=len(content))
        self.owner.ranges[path].append(asked)
        cut = trouble.cut_at[path].pop(0) if trouble.cut_at[path] else len(content)
        stall = trouble.stall_at.get(path, len(content))
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = min(cut, stall)
        for offset in range(start, end, BLOCK_BYTES):
            block = content[offset : min(offset + BLOCK_BYTES, end)]
            self.wfile.write(block)
            self.owner.bytes_sent[path] += len(block)
        if end == stall < len(content):
            self.owner.stalled.set()
            self.owner.released.wait(60)
        if end < len(content):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)
        return None


class ProxyServer(Server):
    """A forward proxy for plain HTTP; ``refuse`` is the status that it answers instead."""

    def __init__(self) -> None:
        super().__init__(_ProxyHandler)
        self.refuse: int | None = None
        self.forwarded: list[str] = []


class _ProxyHandler(_Handler):
    owner: ProxyServer

    def do_CONNECT(self):
        self.reply(self.owner.refuse or 501)
        self.close_connection = True

    def do_GET(self):
        if self.owner.refuse is not None:
            return self.reply(self.owner.refuse)
        url = urlsplit(self.path)
        self.owner.forwarded.append(url.path)
        onward = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
        try:
            target = url._replace(scheme="", netloc="").geturl()
            kept = {k: v for k, v in self.headers.items() if k.lower() != "proxy-connection"}
            onward.request(self.command, target, headers=kept)
            answer = onward.getresponse()
            body = answer.read()
            headers = {
                k: v
                for k, v in answer.getheaders()
                if k.lower() not in ("content-length", "date", "server")
            }
            length = answer.getheader("Content-Length")
            return self.reply(answer.status, headers, body, int(length) if length else None)
        finally:
            onward.close()


def content(size_bytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
