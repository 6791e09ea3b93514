"""A stand-in for vLLM's server: takes its flags, answers its paths, and misbehaves on request.

Nothing of vLLM or of this project is imported. FAKE_ENGINE, a JSON object in the environment, says how it
behaves; every field may be left out:

    ready_after: seconds before /health answers        children: processes it starts in its own group
    children_in_sessions: processes that leave it
    fail: message to print before it exits with 1      fail_after: seconds after it is ready
    ignore_sigterm: true                               chunk_seconds: pause between the chunks of a stream
    hang: true, so that POST requests are never answered; SIGUSR1 does the same later on
    busy_seconds: what a POST takes, during which no counter moves
    refuse: status of every answer to a POST           refuse_times: of that many only
    no_metrics: true, so that there are no counters
    metrics: a file of samples, told beside the counters; what counts in it grows with each request
    unhealthy_after_refusal: true                      hang_up: true, so that a POST's connection is cut
    break_stream: chunks after which a stream's connection is cut; hang_stream: after which it is silent
    retry_after: said with every refusal               models: status of /v1/models (default 404)
    key: what a client has to send in place of VLLM_API_KEY; "" is nothing
    tls: [certificate, its key], files                 pad: bytes of white space in each chunk of a stream
    answer: what every POST is answered with
    says: true, so that it writes a line a request as vLLM's server does, with what stands behind the "?"
    golden: it answers embeddings, rankings and chats by the words that texts share; "right", or what is wrong

POST /behave changes the behaviour of one that runs, and forgets what it saw.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BEHAVIOUR: dict[str, Any] = json.loads(os.environ.get("FAKE_ENGINE", "{}"))
WORDS = ["One ", "word ", "after ", "the ", "other."]
# What the engine saw, for tests to ask: GET /seen
SEEN: dict[str, Any] = {"cancelled": 0, "requests": [], "looks": {}}
COUNTERS = {"vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0, "vllm:iteration_tokens_total_count": 0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/seen":
            SEEN["looks"][self.path] = dict(self.headers)
        if self.path.endswith("/v1/models"):
            self.answer(BEHAVIOUR.get("models", 404), {})
        elif self.path == "/health":
            self.answer(503 if BEHAVIOUR.get("unhealthy") else 200, {})
        elif self.path == "/seen":
            self.answer(200, SEEN)
        elif self.path == "/metrics" and not BEHAVIOUR.get("no_metrics"):
            counters = "".join(f'{name}{{engine="0",model_name="x"}} {value}.0\n' for name, value in COUNTERS.items())
            self.answer(200, counters + samples())
        else:
            self.answer(404, {"error": {"message": "fake engine: no such path"}})

    def do_POST(self) -> None:
        if BEHAVIOUR.get("says"):
            print(
                f'(APIServer pid={os.getpid()}) INFO:     127.0.0.1:1 - "POST {self.path} HTTP/1.1" 200 OK', flush=True
            )
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        if self.path == "/behave":
            BEHAVIOUR.clear()
            BEHAVIOUR.update(json.loads(body))
            SEEN.update(cancelled=0, requests=[], looks={})
            self.answer(200, {})
            return
        SEEN["requests"].append(
            {"path": self.path, "headers": dict(self.headers), "bytes": len(body), "at": time.monotonic()}
        )
        key = BEHAVIOUR.get("key", os.environ.get("VLLM_API_KEY"))
        if key and self.headers.get("authorization") != f"Bearer {key}":
            self.answer(401, {"error": {"message": "fake engine: wrong key"}})
            return
        COUNTERS["vllm:num_requests_running"] += 1
        try:
            self.work(document_in(body))
        finally:
            COUNTERS["vllm:num_requests_running"] -= 1

    def work(self, request: Any) -> None:
        if BEHAVIOUR.get("hang"):
            self.wait_for_client_to_leave()
            return
        time.sleep(BEHAVIOUR.get("busy_seconds", 0))
        COUNTERS["vllm:iteration_tokens_total_count"] += 1
        if BEHAVIOUR.get("hang_up"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif "golden" in BEHAVIOUR and not request.get("stream"):
            self.answer(200, golden_answer(self.path, request))
        elif "answer" in BEHAVIOUR:
            self.answer(200, BEHAVIOUR["answer"])
        elif "refuse" in BEHAVIOUR and len(SEEN["requests"]) <= BEHAVIOUR.get("refuse_times", 1 << 30):
            BEHAVIOUR["unhealthy"] = BEHAVIOUR.get("unhealthy_after_refusal", False)
            self.answer(BEHAVIOUR["refuse"], {"error": {"message": "fake engine: refused"}})
        elif request.get("stream"):
            self.stream()
        else:
            self.answer(200, {"path": self.path, "model": request.get("model"), "echo": request})

    def answer(self, status: int, document: Any) -> None:
        body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if status >= 400 and "retry_after" in BEHAVIOUR:
            self.send_header("retry-after", BEHAVIOUR["retry_after"])
        self.end_headers()
        self.wfile.write(body)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for number, word in enumerate(WORDS):
                if number == BEHAVIOUR.get("break_stream"):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                if number == BEHAVIOUR.get("hang_stream"):
                    self.wait_for_client_to_leave()
                    return
                event = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": word}}]}
                self.chunk(f"data: {json.dumps(event)}{' ' * BEHAVIOUR.get('pad', 0)}\n\n".encode())
                COUNTERS["vllm:iteration_tokens_total_count"] += 1
                time.sleep(BEHAVIOUR.get("chunk_seconds", 0.01))
            if "golden" in BEHAVIOUR and BEHAVIOUR["golden"] != "silent":
                self.chunk(b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 5}}\n\n')
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")
        except OSError:
            SEEN["cancelled"] += 1
            self.close_connection = True

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def wait_for_client_to_leave(self) -> None:
        try:
            while self.connection.recv(1):
                pass
        except OSError:
            pass
        SEEN["cancelled"] += 1
        self.close_connection = True


def samples() -> str:
    if "metrics" not in BEHAVIOUR:
        return ""
    times = len(SEEN["requests"])
    with open(BEHAVIOUR["metrics"], encoding="utf-8") as file:
        return re.sub(
            r"^(\S+_(?:total|count|sum|bucket)\{.*\}) (\S+)$",
            lambda found: f"{found[1]} {float(found[2]) * times}",
            file.read(),
            flags=re.MULTILINE,
        )


def document_in(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:  # a form, an integer with thousands of digits
        return {}


def golden_answer(path: str, request: Any) -> Any:
    wrong = BEHAVIOUR["golden"]
    if path.endswith("rerank"):
        query, documents = request["query"], request["documents"]
        scores = [likeness(vector(query), vector(document)) for document in documents]
        if wrong == "reversed" or (wrong == "one shape" and path == "/v2/rerank"):
            scores = [-score for score in scores]
        if wrong == "flat":
            scores = [0.5 + score / 1000 for score in scores]
        if wrong == "no Chinese" and not query.isascii():
            scores = [-score for score in scores]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.get("top_n") or None]
        return {"results": [{"index": index, "relevance_score": scores[index]} for index in order]}
    if path == "/v1/embeddings":
        texts = [request["input"]] if isinstance(request["input"], str) else request["input"]
        vectors = [vector(text) for text in texts]
        if wrong == "random":
            vectors = [vector(hashlib.md5(text.encode()).hexdigest()) for text in texts]
        if wrong == "batches" and len(vectors) > 1:
            vectors = vectors[::-1]
        if wrong == "drifts":
            vectors = [[value + random.random() / 20 for value in each] for each in vectors]
        if wrong == "nothing":
            vectors = [[0.0] * len(each) for each in vectors]
        if request.get("encoding_format") == "base64":
            told: list[Any] = [base64_of(each[::-1] if wrong == "base64" else each) for each in vectors]
        else:
            told = list(vectors)
        return {"data": [{"index": index, "embedding": each} for index, each in enumerate(told)]}
    usage = {"prompt_tokens": 5, "completion_tokens": 0 if wrong == "silent" else 2}
    choice = {"index": 0, "message": {"content": "hotel" if wrong == "right" else ""}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {**usage, "total_tokens": sum(usage.values())}}


def base64_of(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def vector(text: str) -> list[float]:
    """A bag of words; of Chinese, of characters."""
    words = re.findall(r"[a-z]+|[^\x00-\x7f]", text.lower())
    found = [0.0] * 512
    for word in words:
        found[zlib.crc32(word.encode()) % 512] += 1.0
    return found


def likeness(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b) or 1.0)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments, others = parser.parse_known_args()
    print("fake engine:", json.dumps(others), flush=True)
    for _ in range(BEHAVIOUR.get("children", 0)):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    for _ in range(BEHAVIOUR.get("children_in_sessions", 0)):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    if BEHAVIOUR.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: BEHAVIOUR.update(hang=True))
    time.sleep(BEHAVIOUR.get("ready_after", 0))
    if "fail" in BEHAVIOUR and "fail_after" not in BEHAVIOUR:
        sys.exit(BEHAVIOUR["fail"])
    if "fail_after" in BEHAVIOUR:
        threading.Timer(BEHAVIOUR["fail_after"], fail).start()
    server = Server((arguments.host, arguments.port), Handler)
    if "tls" in BEHAVIOUR:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*BEHAVIOUR["tls"])
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.serve_forever()


def fail() -> None:
    print(BEHAVIOUR.get("fail", "RuntimeError: as asked"), flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
