"""A hub on this machine, as Hugging Face and as ModelScope, that can do what hubs and networks do on a bad day."""

import contextlib
import hashlib
import itertools
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass(frozen=True)
class Fault:
    """What is done to one answer. `after`: bytes of the body that are sent before it drops or stalls."""

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    drop: int | None = None
    stall: int | None = None
    damage: bool = False
    no_ranges: bool = False
    length: int | None = None
    redirect: str | None = None


@dataclass(frozen=True)
class Request:
    path: str
    host: str
    range: str | None
    authorization: str | None


def always(fault: Fault) -> Iterator[Fault]:
    return itertools.repeat(fault)


@dataclass
class Hub:
    """`files`: repository → revision → path → bytes. `listed`: what the list says of a path that is not so.

    `faults`: of a file's bytes, by its path; of a list, by "huggingface" or "modelscope".
    """

    address: str = "127.0.0.1"
    port: int = 0
    files: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: dict[str, Iterator[Fault]] = field(default_factory=dict)
    token: str | None = None
    requests: list[Request] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def put(self, repo: str, files: dict[str, bytes], revision: str = COMMIT) -> None:
        self.files.setdefault(repo, {})[revision] = files

    def fail(self, what: str, *faults: Fault) -> None:
        self.faults[what] = iter(faults)

    def fetched(self, path: str) -> list[str | None]:
        """The ranges that were asked of the file's bytes."""
        return [each.range for each in self.requests if each.path == path]

    def of_revision(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revisions = self.files.get(repo, {})
        if revision in ("main", "master") and revisions:
            revision = next(reversed(revisions))
        return (revision, revisions[revision]) if revision in revisions else None

    def next_fault(self, what: str) -> Fault:
        return next(self.faults.get(what, iter(())), Fault())


@contextlib.contextmanager
def hub(address: str = "127.0.0.1") -> Iterator[Hub]:
    served = Hub(address)

    class Handler(_Handler):
        hub = served

    server = _Server((address, 0), Handler)
    served.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield served
    finally:
        served.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(405)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        words = [unquote(word) for word in parts.path.strip("/").split("/")]
        match words:
            case ["api", "models", owner, name]:
                self._list_huggingface(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self._list_huggingface(f"{owner}/{name}", revision)
            case ["api", "v1", "models", owner, name, "repo", "files"]:
                self._list_modelscope(f"{owner}/{name}", query["Revision"])
            case ["api", "v1", "models", owner, name, "repo"]:
                self._send_file(f"{owner}/{name}", query["Revision"], query["FilePath"])
            case [owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case ["cdn", owner, name, revision, *path]:
                self._send_file(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._answer(404)

    def _list_huggingface(self, repo: str, revision: str) -> None:
        if not self._may("huggingface"):
            return
        found = self.hub.of_revision(repo, revision)
        if found is None:
            code = "RevisionNotFound" if repo in self.hub.files else "RepoNotFound"
            self._answer(404, headers=(("X-Error-Code", code),))
            return
        commit, files = found
        siblings = []
        for path, content in files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content)}
            if _is_large(path):
                sha256 = hashlib.sha256(content).hexdigest()
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256, "size": len(content), "pointerSize": 134}}
            else:
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            lie = self.hub.listed.get(path, {})
            if "size" in lie and "lfs" in entry:
                entry["lfs"]["size"] = lie["size"]
            siblings.append({**entry, **lie})
        self._answer(200, {"id": repo, "sha": commit, "siblings": siblings})

    def _list_modelscope(self, repo: str, revision: str) -> None:
        if not self._may("modelscope"):
            return
        found = self.hub.of_revision(repo, revision)
        if found is None:
            self._answer(404, {"Code": 10010205001, "Message": "not found", "Success": False})
            return
        entries = [
            {
                "Path": path,
                "Name": path.rpartition("/")[2],
                "Type": "blob",
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
                **self.hub.listed.get(path, {}),
            }
            for path, content in found[1].items()
        ]
        folders = [{"Path": "assets", "Name": "assets", "Type": "tree", "Size": 0, "Sha256": ""}]
        self._answer(200, {"Code": 200, "Data": {"Files": [*folders, *entries]}, "Success": True})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        """As there: large files are on another host, small ones here."""
        if not _is_large(path):
            self._send_file(repo, revision, path)
            return
        self._note(f"resolve {path}")
        if self._is_known():
            elsewhere = f"http://localhost:{self.hub.port}/cdn/{repo}/{revision}/{path}"
            self._answer(302, headers=(("Location", elsewhere),))

    def _send_file(self, repo: str, revision: str, path: str) -> None:
        self._note(path)
        fault = self.hub.next_fault(path)
        found = self.hub.of_revision(repo, revision)
        if fault.redirect:
            self._answer(302, headers=(("Location", fault.redirect),))
        elif fault.status:
            self._answer(fault.status, headers=fault.headers)
        elif found is None or path not in found[1]:
            self._answer(404)
        else:
            self._send(found[1][path], fault)

    def _send(self, content: bytes, fault: Fault) -> None:
        if fault.damage:
            content = bytes([content[0] ^ 1]) + content[1:]
        start = 0
        asked = self.headers.get("Range")
        if asked and not fault.no_ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self._answer(416)
                return
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body) if fault.length is None else fault.length))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if fault.drop is not None:
            self.wfile.write(body[: fault.drop])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault.stall is not None:
            self.wfile.write(body[: fault.stall])
            self.hub.reached.set()
            self.hub.closing.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _may(self, what: str) -> bool:
        """Whether a list is given out; where not, it has been answered."""
        self._note(what)
        fault = self.hub.next_fault(what)
        if fault.stall is not None:
            self.hub.reached.set()
            self.hub.closing.wait(60)
        if fault.status:
            self._answer(fault.status, headers=fault.headers)
            return False
        return self._is_known()

    def _is_known(self) -> bool:
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._answer(401, headers=(("X-Error-Code", "GatedRepo"),))
            return False
        return True

    def _note(self, path: str) -> None:
        headers = self.headers
        host = headers["Host"].partition(":")[0]
        self.hub.requests.append(Request(path, host, headers.get("Range"), headers.get("Authorization")))

    def _answer(self, status: int, document: Any = None, headers: Iterable[tuple[str, str]] = ()) -> None:
        body = json.dumps(document or {}).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt"))
