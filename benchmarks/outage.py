"""What an operator sees of an outage: the demonstration under mixed requests through Nginx, with one engine killed.

Clients may see nothing but answers and clear errors, and Prometheus has to fire ModelDown and to take it back;
otherwise it exits with 1. Which charts stayed empty is said: on a machine without a GPU those of GPUs do.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo import CHECKOUT, KEYS, Demo, free_port, running_demo
from benchmarks.soak import HANGS_AFTER_SECONDS, Soak
from vllm_unified.monitoring.history import History, history
from vllm_unified.monitoring.prometheus import Prometheus, Span
from vllm_unified.monitoring.report import page, picture

VICTIM = "chat"
ALERT = "ModelDown"
PAGE = CHECKOUT / "demo" / "ocr" / "page.png"
DOCUMENT_SECONDS = 30.0
LOOK_SECONDS = 2.0
# After the load, for an alert to be taken back.
PATIENCE_SECONDS = 300.0


class Watch:
    """What became of ALERT, in seconds since the kill, as Prometheus says."""

    def __init__(self, prometheus: str) -> None:
        self.times: dict[str, float] = {}
        self.others: set[str] = set()
        self._url = f"{prometheus}/api/v1/alerts"
        self._killed = 0.0

    @property
    def is_over(self) -> bool:
        return "resolved" in self.times

    def begin(self) -> None:
        self._killed = time.monotonic()

    def look(self) -> None:
        try:
            alerts: list[dict[str, Any]] = httpx.get(self._url, timeout=30).json()["data"]["alerts"]
        except httpx.HTTPError:  # it is asked again
            return
        state = None
        for alert in alerts:
            labels = alert["labels"]
            if labels["alertname"] == ALERT and labels.get("model") == VICTIM:
                state = alert["state"]
            elif alert["state"] == "firing":
                self.others.add(" ".join([labels["alertname"], labels.get("model", "")]).strip())
        if state is None and "firing" in self.times:
            state = "resolved"
        if state and self._killed:
            self.times.setdefault(state, round(time.monotonic() - self._killed, 1))


@contextmanager
def repeatedly(work: Callable[[], None], seconds: float) -> Iterator[None]:
    """In a thread, until the block is left."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read_document(demo: Demo, url: str, soak: Soak) -> None:
    try:
        with PAGE.open("rb") as image:
            answer = httpx.post(
                f"{url}/api/ocr/image", files={"image": image}, headers=demo.headers, timeout=HANGS_AFTER_SECONDS
            )
        outcome = "document read" if answer.status_code == 200 else f"document refused with {answer.status_code}"
        if answer.status_code not in (200, 503):
            soak.bad.append(f"document: {answer.status_code} {answer.text[:300]}")
    except httpx.HTTPError as error:
        outcome = "document broken"
        soak.bad.append(f"document: {error!r}")
    soak.outcomes[outcome] += 1


def kill(demo: Demo) -> None:
    state = demo.state(VICTIM)
    if state.engine and state.engine.is_alive():
        os.kill(state.engine.pid, signal.SIGKILL)


def go_through(demo: Demo, url: str, soak: Soak, watch: Watch, minutes: float, rate: float) -> None:
    """Load for all of the time; the kill after a third of it."""
    with (
        ThreadPoolExecutor(max_workers=1) as pool,
        repeatedly(watch.look, LOOK_SECONDS),
        repeatedly(lambda: read_document(demo, url, soak), DOCUMENT_SECONDS),
    ):
        load = pool.submit(soak.run, minutes, rate, float("inf"))
        time.sleep(minutes * 60 / 3)
        watch.begin()
        kill(demo)
        load.result()
        until = time.monotonic() + PATIENCE_SECONDS
        while not watch.is_over and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)


def empty_charts(seen: History) -> list[str]:
    """Of the dashboards, each once; those of GPUs are empty on a machine without one."""
    return sorted(
        {
            f"{section.dashboard.title}: {each.chart.title}"
            for section in seen.sections
            for part in section.parts
            for each in part.seen
            if each.is_empty
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: .venv/bin/python -m benchmarks.outage --minutes 10 --picture outage.png",
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second (default 1)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the report of that time, as FILE.png")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the report of that time, as FILE.html")
    options = parser.parse_args()
    nginx, prometheus = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    variables = {
        "COMPOSE_PROFILES": "nginx,monitoring",
        "VLLM_NGINX_PORT": nginx.rpartition(":")[2],
        "VLLM_PROMETHEUS_PORT": prometheus.rpartition(":")[2],
    }
    with running_demo(**variables) as demo:
        began = time.time()
        soak, watch = Soak(demo, f"{nginx}/v1"), Watch(prometheus)
        go_through(demo, nginx, soak, watch, options.minutes, options.rate)
        seen = history(Prometheus(prometheus, Span(began, time.time())), whole=True)
        if options.page:
            options.page.write_bytes(page(seen).encode())
        if options.picture:
            options.picture.write_bytes(picture(seen))
        result = {
            "minutes": options.minutes,
            "outcomes": dict(soak.outcomes),
            "bad": soak.bad[:20],
            "seconds_after_the_kill": watch.times,
            "other_alerts": sorted(watch.others),
            "restarts": {key: demo.state(key).restarts for key in KEYS},
            "empty_charts": empty_charts(seen),
        }
    print(json.dumps(result, indent=2))
    sys.exit(1 if soak.bad or not watch.is_over else 0)


if __name__ == "__main__":
    main()
