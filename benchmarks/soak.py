"""The demonstration under steady requests while its processes are killed at random.

Every request has to be answered or refused with a clear 503; a stream that breaks has to say so in an event. None may
hang. Exits with 1 when one did anything else.
"""

import argparse
import collections
import contextlib
import json
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil

from benchmarks.demo import KEYS, Demo, running_demo

REQUESTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "chat": [
        ("/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}),
        ("/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "stream": True}),
    ],
    "embedding": [("/embeddings", {"input": ["What is the capital of France?"] * 8})],
    "rerank": [("/rerank", {"query": "capital", "documents": ["Paris is the capital of France.", "Bananas."]})],
    "ocr": [("/chat/completions", {"messages": [{"role": "user", "content": "Read"}], "max_tokens": 32})],
}
# Far longer than any of these requests takes on a busy machine: a request over it hangs.
HANGS_AFTER_SECONDS = 90.0
VICTIMS = ("API server", "VLLM::EngineCore", "VLLM::Worker", "keeper")


class Soak:
    def __init__(self, demo: Demo, address: str) -> None:
        """`address`: where requests go, as http://HOST:PORT/v1."""
        self.demo = demo
        self.address = address
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.bad: list[str] = []
        self.kills: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def ask(self, key: str) -> None:
        path, body = random.choice(REQUESTS[key])  # noqa: S311
        try:
            outcome = self._outcome(f"{self.address}{path}", {"model": f"demo-{key}", **body})
        except httpx.TimeoutException:
            outcome = "hung"
        except httpx.HTTPError as error:
            outcome = f"broken: {error!r}"
        with self.lock:
            self.outcomes[outcome.split(":")[0]] += 1
            if outcome not in ("answered", "refused with 503", "stream ended with an error event"):
                self.bad.append(f"{key}: {outcome}")

    def _outcome(self, url: str, body: dict[str, Any]) -> str:
        with httpx.stream(
            "POST", url, json=body, headers=self.demo.headers, timeout=httpx.Timeout(HANGS_AFTER_SECONDS)
        ) as answer:
            text = answer.read().decode()
        if answer.status_code == 503 and answer.headers.get("retry-after"):
            return "refused with 503"
        if answer.status_code != 200:
            return f"status {answer.status_code}: {text[:300]}"
        if not body.get("stream") or "data: [DONE]" in text:
            return "answered"
        return "stream ended with an error event" if '"error"' in text else f"stream cut off: {text[-100:]}"

    def kill(self) -> None:
        key, title = random.choice(KEYS), random.choice(VICTIMS)  # noqa: S311
        state = self.demo.state(key)
        if state.engine is None or state.keeper is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess, StopIteration):
            pid = {"API server": state.engine.pid, "keeper": state.keeper.pid}.get(title)
            engine = psutil.Process(state.engine.pid)
            named = (each for each in engine.children(recursive=True) if title in " ".join(each.cmdline()))
            psutil.Process(pid or next(named).pid).send_signal(signal.SIGKILL)
            self.kills[f"{title} of {key}"] += 1

    def run(self, minutes: float, rate: float, kill_every: float) -> None:
        began = time.monotonic()
        next_kill, next_report = began + kill_every, began + 60
        with ThreadPoolExecutor(max_workers=64) as pool:
            for number in range(int(minutes * 60 * rate)):
                time.sleep(max(0.0, began + number / rate - time.monotonic()))
                pool.submit(self.ask, KEYS[number % len(KEYS)])
                if time.monotonic() > next_kill:
                    next_kill += kill_every
                    self.kill()
                if time.monotonic() > next_report:
                    next_report += 60
                    self.report(time.monotonic() - began)

    def report(self, seconds: float) -> None:
        print(f"[{seconds / 60:5.1f} min] {sum(self.kills.values())} kills, {dict(self.outcomes)}", flush=True)

    def wait_until_whole(self) -> float:
        """Seconds after the last kill until every model is ready again."""
        began = time.monotonic()
        while not all(self.demo.is_ready(key) for key in KEYS):
            if time.monotonic() - began > 600:
                self.bad.append("not all models came back in ten minutes")
                break
            time.sleep(0.5)
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: .venv/bin/python -m benchmarks.soak --minutes 60",
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second (default 1)")
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds between two kills (default 60)")
    options = parser.parse_args()
    with running_demo() as demo:
        soak = Soak(demo, demo.router)
        soak.run(options.minutes, options.rate, options.kill_every)
        whole_after = soak.wait_until_whole()
        left = demo.processes_without_owner()
        result = {
            "minutes": options.minutes,
            "outcomes": dict(soak.outcomes),
            "kills": dict(soak.kills),
            "restarts": {key: demo.state(key).restarts for key in KEYS},
            "whole_again_after_seconds": round(whole_after, 1),
            "processes_left_over": left,
            "bad": soak.bad[:20],
        }
    print(json.dumps(result, indent=2))
    sys.exit(1 if soak.bad or left else 0)


if __name__ == "__main__":
    main()
