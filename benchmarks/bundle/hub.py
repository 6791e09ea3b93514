"""A hub that serves one folder with its manifest, as fast as the kernel sends files. A process of its own."""

import argparse
import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vllm_unified.hub import manifest

REPO = "benchmark/weights"
COMMIT = "c0ffee" + "0" * 34


class Handler(BaseHTTPRequestHandler):
    """The two paths of Hugging Face's protocol that a download asks for."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the head goes out at once, and nothing waits for its receipt

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        resolved = f"/{REPO}/resolve/{COMMIT}/"
        if self.path.startswith(f"/api/models/{REPO}"):
            self._list()
        elif self.path.startswith(resolved):
            self._send(self.path.removeprefix(resolved))
        else:
            self.send_error(404)

    def _list(self) -> None:
        recorded = manifest.read(self.folder)
        files = recorded.files if recorded else ()
        siblings = [
            {
                "rfilename": file.path,
                "size": file.size,
                "blobId": "0" * 40,
                "lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134},
            }
            for file in files
        ]
        body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        self._head(len(body))
        self.wfile.write(body)

    def _send(self, path: str) -> None:
        recorded = manifest.read(self.folder)
        if path not in {file.path for file in recorded.files} if recorded else ():
            self.send_error(404)
            return
        with (self.folder / path).open("rb") as file:
            self._head((self.folder / path).stat().st_size)
            self.connection.sendfile(file)

    def _head(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    ThreadingHTTPServer(("127.0.0.1", options.port), partial(Handler, options.folder)).serve_forever()


if __name__ == "__main__":
    main()
