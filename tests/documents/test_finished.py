"""What happens to a document that has finished: who is told of it, and for how long it is kept."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import eventually
from tests.documents.conftest import Served
from tests.documents.fake_ocr import FakeOcr
from tests.documents.test_service import ended, pdf_of
from tests.documents.web import OPEN, Answer, Host, good, head, header, serving

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
DAY_SECONDS = 86_400


def in_database(served: Served, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(served.folder / "documents.db", timeout=10)) as connection, connection:
        return list(connection.execute(statement, values))


def sent(served: Served, pages: int = 1, **fields: str) -> str:
    with served.client() as client:
        answer = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(pages))}, data=fields)
        task_id: str = answer.raise_for_status().json()["task_id"]
        return task_id


class TestWebhook:
    @pytest.fixture
    def telling(self, fresh: Served) -> Served:
        """Its webhooks may lead to OPEN."""
        fresh.configure(allowed_networks=[f"{OPEN}/32"])
        fresh.start()
        return fresh

    def test_is_signed_and_comes_again_until_it_is_taken(self, telling: Served) -> None:
        statuses = ["500 Oh", "200 OK"]
        host = Host(0)

        async def answer(request: bytes) -> AsyncIterator[bytes]:
            yield head(statuses[len(host.requests) - 1], "content-length: 0")

        async def story() -> str:
            nonlocal host
            async with serving(answer) as host:
                url = f"http://{OPEN}:{host.port}/hook?a=b"
                task_id = await asyncio.to_thread(sent, telling, pages=2, webhook_url=url, webhook_secret=SECRET)
                await asyncio.to_thread(eventually, lambda: attempts(task_id) == (1, True))
                assert len(host.requests) == 1
                in_database(telling, "UPDATE documents SET webhook_at = 0")  # as if its pause were over
                await asyncio.to_thread(eventually, lambda: attempts(task_id) == (2, False))
                return task_id

        def attempts(task_id: str) -> tuple[int, bool]:
            """And whether another one follows."""
            ((count, at),) = in_database(
                telling, "SELECT webhook_attempts, webhook_at FROM documents WHERE id = ?", task_id
            )
            return count, at is not None

        task_id = asyncio.run(story())
        assert len(host.requests) == 2
        for request in host.requests:
            start, body = request.partition(b"\r\n")[0], request.partition(b"\r\n\r\n")[2]
            assert start == b"POST /hook?a=b HTTP/1.1"
            assert json.loads(body) == {
                "type": "document.succeeded",
                "task_id": task_id,
                "status": "succeeded",
                "filename": "a.pdf",
                "pages": 2,
                "pages_failed": 0,
                "error_message": None,
            }
            at = header(request, "webhook-timestamp") or ""
            assert header(request, "webhook-id") == task_id
            assert abs(int(at) - time.time()) < 60
            mac = hmac.new(KEY, f"{task_id}.{at}.".encode() + body, hashlib.sha256).digest()
            assert header(request, "webhook-signature") == "v1," + base64.b64encode(mac).decode()

    def test_tells_of_a_task_that_was_cancelled(self, telling: Served, ocr: FakeOcr) -> None:
        ocr.behave(model="deepseek-ocr", cue="hang")

        async def story(answer: Answer) -> Host:
            async with serving(answer) as host:
                task_id = await asyncio.to_thread(sent, telling, webhook_url=f"http://{OPEN}:{host.port}/")
                with telling.client() as client:
                    client.post(f"/api/tasks/{task_id}/cancel").raise_for_status()
                await asyncio.to_thread(eventually, lambda: host.requests)
                return host

        async def thanks(request: bytes) -> AsyncIterator[bytes]:
            yield good(b"")

        host = asyncio.run(story(thanks))
        told = json.loads(host.requests[0].partition(b"\r\n\r\n")[2])
        assert (told["type"], told["status"]) == ("document.cancelled", "cancelled")
        assert header(host.requests[0], "webhook-signature") is None

    @pytest.mark.parametrize(
        ("url", "status", "code"),
        [
            ("http://127.0.0.1:8001/", 403, "webhook_not_allowed"),
            ("http://[::1]:8001/", 403, "webhook_not_allowed"),
            ("http://[::ffff:127.0.0.1]/", 403, "webhook_not_allowed"),
            ("http://169.254.169.254/latest/meta-data/", 403, "webhook_not_allowed"),
            ("file:///etc/passwd", 400, "webhook_invalid"),
        ],
    )
    def test_to_this_machine_is_refused(self, served: Served, url: str, status: int, code: str) -> None:
        with served.client() as client:
            before = client.get("/api/tasks").json()["counts"]
            answer = client.post("/api/ocr/pdf", files={"pdf": ("a.pdf", pdf_of(1))}, data={"webhook_url": url})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert client.get("/api/tasks").json()["counts"] == before
        assert list((served.folder / "incoming").iterdir()) == []


class TestRetention:
    @pytest.fixture
    def finished(self, fresh: Served) -> list[str]:
        """Three tasks of a service that was stopped, the oldest first."""
        fresh.start()
        tasks = []
        with fresh.client() as client:
            for _ in range(3):
                tasks.append(sent(fresh))
                assert ended(client, tasks[-1])["status"] == "succeeded"
        fresh.kill(signal.SIGTERM)
        return tasks

    def kept(self, served: Served, tasks: list[str]) -> list[str]:
        """Those that are there once the others have gone, with all their files."""
        with served.client() as client:
            kept = [task for task in tasks if client.get(f"/api/tasks/{task}").status_code == 200]
            for task in kept:
                assert client.get(f"/api/tasks/{task}/download/result.md").status_code == 200
        assert {path.name for path in served.folder.iterdir() if path.is_dir()} == {"incoming", *kept}
        return kept

    def test_by_age(self, fresh: Served, finished: list[str]) -> None:
        old, newer, newest = finished
        aged = "UPDATE documents SET finished_at = finished_at - ? WHERE id = ?"
        in_database(fresh, aged, 3.1 * DAY_SECONDS, old)
        in_database(fresh, aged, 2.9 * DAY_SECONDS, newer)
        fresh.configure(keep_days=3)
        fresh.start()
        eventually(lambda: not (fresh.folder / old).exists())
        assert self.kept(fresh, finished) == [newer, newest]
        assert f"document {old}: kept for its time, deleted" in fresh.log.read_text()

    def test_by_size(self, fresh: Served, finished: list[str]) -> None:
        old, *newer = finished
        sizes = dict(in_database(fresh, "SELECT id, size FROM documents"))
        for task in finished:
            files = [path for path in (fresh.folder / task).rglob("*") if path.is_file()]
            assert sizes[task] == sum(path.stat().st_size for path in files)
        fresh.configure(keep_gib=sum(sizes[task] for task in newer) / (1 << 30))
        fresh.start()
        eventually(lambda: not (fresh.folder / old).exists())
        assert self.kept(fresh, finished) == newer
