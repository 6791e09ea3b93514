"""Keys at work: who is let in, what stops them and for how long, and a file that changes under the router."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.conftest import Project
from vllm_unified.errors import ConfigError
from vllm_unified.router.keys import Key, KeyRing
from vllm_unified.router.problems import RequestError
from vllm_unified.router.usage import Usage
from vllm_unified.settings.keys import FILE, KeyEntry, add_key, hash_of, remove_key

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)
NOW = 1000.0


def entry(**fields: Any) -> KeyEntry:
    return KeyEntry(**{"name": "alice", "hash": hash_of("sk-alice"), **fields})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    def set_to(moment: datetime) -> None:
        monkeypatch.setattr(time, "time", moment.timestamp)

    set_to(NOON)
    return set_to


def refusal(key: Key, now: float) -> RequestError:
    with pytest.raises(RequestError) as caught:
        key.enter(now)
    return caught.value


def asks(key: Key, tokens: int, now: float) -> None:
    key.enter(now)
    key.leave(tokens, now)


MINUTE, DAY, MONTH = 60, 12 * 3600, 36 * 3600


@pytest.mark.parametrize(
    ("fields", "message", "wait"),
    [
        ({"requests_per_minute": 2}, "may send 2 requests a minute (requests_per_minute)", MINUTE),
        ({"tokens_per_minute": 20}, "may use 20 tokens a minute (tokens_per_minute)", MINUTE),
        ({"tokens_per_day": 20}, "may use 20 tokens a day (tokens_per_day)", DAY),
        ({"tokens_per_month": 20}, "may use 20 tokens a month (tokens_per_month)", MONTH),
    ],
)
def test_a_limit_stops_the_third_request(
    clock: Callable[[datetime], None], fields: dict[str, int], message: str, wait: int
) -> None:
    key = Key(entry(**fields))
    asks(key, 19, NOW)
    asks(key, 1, NOW + 5)  # let in below the limit; what it uses is booked afterwards
    error = refusal(key, NOW + 5)
    expected = wait - 5 if wait == MINUTE else wait
    assert (error.status, error.code, error.headers) == (429, "rate_limit_exceeded", {"retry-after": str(expected)})
    assert f'the key "alice" {message}; ' in str(error)
    assert f"try again in {expected} s, or ask for a higher limit" in str(error)
    assert key.in_flight == 0
    clock(NOON + timedelta(seconds=expected))
    asks(key, 1, NOW + 5 + expected)


def test_a_document_counts_as_a_request_and_takes_no_place(clock: Callable[[datetime], None]) -> None:
    key = Key(entry(requests_per_minute=3, max_concurrent=1))
    key.enter(NOW)
    for _ in range(2):
        key.submit(NOW)
    assert key.in_flight == 1
    with pytest.raises(RequestError, match="requests_per_minute"):
        key.submit(NOW)


def test_a_refused_request_counts_nowhere(clock: Callable[[datetime], None]) -> None:
    key = Key(entry(requests_per_minute=1))
    asks(key, 5, NOW)
    for _ in range(100):
        refusal(key, NOW + 30)
    asks(key, 5, NOW + 60)


def test_concurrency() -> None:
    key = Key(entry(max_concurrent=2))
    key.enter(NOW)
    key.enter(NOW)
    error = refusal(key, NOW)
    assert (error.status, error.headers) == (429, {"retry-after": "1"})
    assert "may have 2 requests at the same time (max_concurrent); wait until one of them ends" in str(error)
    key.leave(0, NOW)
    key.enter(NOW)
    assert key.in_flight == 2


@pytest.mark.parametrize(
    ("seconds_left", "header"), [(0.2, "1"), (1.0, "1"), (1.2, "2")], ids=["a moment", "a second", "rounded up"]
)
def test_retry_after_is_a_whole_number(clock: Callable[[datetime], None], seconds_left: float, header: str) -> None:
    key = Key(entry(tokens_per_day=1))
    asks(key, 1, NOW)
    midnight = datetime(2026, 11, 30, tzinfo=UTC)
    clock(midnight - timedelta(seconds=seconds_left))
    assert refusal(key, NOW).headers == {"retry-after": header}


def test_days_and_months_begin_anew(clock: Callable[[datetime], None]) -> None:
    key = Key(entry(tokens_per_day=10, tokens_per_month=25))
    asks(key, 10, NOW)
    assert "tokens_per_day" in str(refusal(key, NOW))
    clock(datetime(2026, 11, 30, 0, 0, 1, tzinfo=UTC))
    asks(key, 15, NOW)
    assert "tokens_per_day" in str(refusal(key, NOW))
    clock(datetime(2026, 12, 1, 0, 0, 1, tzinfo=UTC))
    asks(key, 25, NOW)
    clock(datetime(2026, 12, 31, 23, tzinfo=UTC))
    error = refusal(key, NOW)
    assert "tokens_per_month" in str(error)
    assert error.headers == {"retry-after": "3600"}
    clock(datetime(2027, 1, 1, 0, 0, 1, tzinfo=UTC))
    asks(key, 1, NOW)


def test_tokens_belong_to_the_day_on_which_the_request_ends(clock: Callable[[datetime], None]) -> None:
    key = Key(entry(tokens_per_day=10))
    asks(key, 9, NOW)
    key.enter(NOW)
    clock(NOON + timedelta(days=1))
    key.leave(9, NOW)
    asks(key, 1, NOW)
    assert "tokens_per_day" in str(refusal(key, NOW))


def test_a_key_expires_while_it_is_used(clock: Callable[[datetime], None]) -> None:
    key = Key(entry(expires="2026-11-29"))
    key.enter(NOW)
    clock(datetime(2026, 11, 30, 0, 0, 1, tzinfo=UTC))
    error = refusal(key, NOW)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert str(error).startswith("API key expired on 2026-11-29; ")
    key.leave(10, NOW)
    assert key.in_flight == 0


def test_models() -> None:
    assert Key(entry()).may_use(["anything"])
    key = Key(entry(models=["chat", "gpt-4"]))
    assert key.may_use(("other", "gpt-4"))
    assert not key.may_use(("other", "gpt-5"))


# KeyRing


@pytest.fixture
def usage(project: Project) -> Usage:
    return Usage(project.home / "data" / "usage.db")


def ring_of(project: Project, usage: Usage) -> KeyRing:
    return KeyRing("sk-deployment", project.home, usage)


def write(project: Project, *keys: str) -> None:
    (project.home / FILE).write_text("keys:\n" + "".join(f"- {key}\n" for key in keys))


def empty(project: Project) -> None:
    (project.home / FILE).write_text("")


def line(name: str, more: str = "") -> str:
    return f"{{name: {name}, hash: '{hash_of(f'sk-{name}')}'{more}}}"


def said_to(ring: KeyRing, value: bytes | None) -> str:
    with pytest.raises(RequestError) as caught:
        ring.authenticate(value)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    return str(caught.value)


def test_the_deployments_key_works_without_a_file(project: Project, usage: Usage) -> None:
    ring = ring_of(project, usage)
    key = ring.authenticate(b"sk-deployment")
    assert (key.name, key.admin, key.entry.models, ring.keys) == ("deployment", True, None, (key,))


def test_who_is_let_in(project: Project, usage: Usage) -> None:
    write(project, line("alice"), line("bob", ", expires: 2020-01-31, priority: 7"), line("dep", ", admin: true"))
    ring = ring_of(project, usage)
    assert [key.name for key in ring.keys] == ["deployment", "alice", "bob", "dep"]
    assert ring.authenticate(b"sk-alice").name == "alice"
    assert not ring.authenticate(b"sk-alice").admin
    assert ring.authenticate(b"sk-dep").admin
    for nothing in (None, b""):
        assert said_to(ring, nothing) == "no API key; send `Authorization: Bearer KEY`"
    for wrong in (b"sk-ALICE", b"sk-alice ", hash_of("sk-alice").encode(), b"\xff\0"):
        assert said_to(ring, wrong) == "wrong API key; send `Authorization: Bearer KEY`"
    assert said_to(ring, b"sk-bob").startswith("API key expired on 2020-01-31; ")
    assert ring.keys[2].priority == 7


def test_the_deployments_key_wins_over_an_entry_with_its_hash(project: Project, usage: Usage) -> None:
    write(project, f"{{name: thief, hash: '{hash_of('sk-deployment')}', expires: 2020-01-01}}")
    assert ring_of(project, usage).authenticate(b"sk-deployment").name == "deployment"


FIELDS: dict[str, tuple[str, Callable[[KeyRing, Key], Any]]] = {
    "name": ("carol", lambda _, key: key.name),
    "hash": (hash_of("sk-other"), lambda ring, key: ring.authenticate(b"sk-other") is key),
    "models": ("[embedding]", lambda _, key: key.may_use(["chat"])),
    "requests_per_minute": ("1", lambda _, key: third_request(key)),
    "tokens_per_minute": ("1", lambda _, key: third_request(key)),
    "max_concurrent": ("2", lambda _, key: third_request(key)),
    "tokens_per_day": ("1", lambda _, key: third_request(key)),
    "tokens_per_month": ("1", lambda _, key: third_request(key)),
    "expires": ("2020-01-01", lambda ring, _: ring.authenticate(b"sk-alice")),
    "priority": ("5", lambda _, key: key.priority),
    "admin": ("true", lambda _, key: key.admin),
}


def third_request(key: Key) -> None:
    for _ in range(2):
        key.enter(NOW)
    key.leave(5, NOW)
    key.enter(NOW)
    key.enter(NOW)


def effect(ring: KeyRing, look: Callable[[KeyRing, Key], Any]) -> Any:
    try:
        return look(ring, ring.keys[1])
    except RequestError as error:
        return str(error)


def test_every_field_is_tried() -> None:
    assert {*FIELDS, "created"} == set(KeyEntry.model_fields)  # created: tests/settings/test_keys.py


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_changes_something(project: Project, usage: Usage, field: str) -> None:
    value, look = FIELDS[field]
    fields = {"name": "alice", "hash": hash_of("sk-alice")}
    before = written(project, fields)
    after_fields = written(project, {**fields, field: value})
    write(project, before)
    first = effect(ring_of(project, usage), look)
    write(project, after_fields)
    assert effect(ring_of(project, usage), look) != first


def written(project: Project, fields: dict[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"


def test_what_was_counted_stays_over_a_reload(project: Project, usage: Usage) -> None:
    write(project, line("alice", ", requests_per_minute: 2, tokens_per_day: 100"))
    ring = ring_of(project, usage)
    key = ring.authenticate(b"sk-alice")
    key.enter(NOW)
    key.enter(NOW)
    key.leave(60, NOW)

    write(project, f"{{name: alice, hash: '{hash_of('sk-new')}', requests_per_minute: 2, tokens_per_day: 60}}")
    ring.reload()
    assert ring.authenticate(b"sk-new") is key
    assert said_to(ring, b"sk-alice").startswith("wrong API key")
    assert key.in_flight == 1
    assert "requests_per_minute" in str(refusal(key, NOW))
    assert "tokens_per_day" in str(refusal(key, NOW + 61))


def test_a_revoked_keys_requests_end(project: Project, usage: Usage) -> None:
    write(project, line("alice", ", max_concurrent: 1"))
    ring = ring_of(project, usage)
    key = ring.authenticate(b"sk-alice")
    key.enter(NOW)
    (project.home / FILE).unlink()
    ring.reload()
    assert said_to(ring, b"sk-alice").startswith("wrong API key")
    key.leave(10, NOW)
    assert key.in_flight == 0


def test_days_and_months_go_on_after_a_restart(project: Project, usage: Usage) -> None:
    write(project, line("alice", ", tokens_per_day: 100"), line("bob", ", tokens_per_month: 100"), line("carol"))
    for name in ("alice", "bob", "carol"):
        usage.note(name, "chat", error=False, prompt_tokens=90, completion_tokens=10, seconds=1.0)
    usage.flush()
    ring = ring_of(project, Usage(project.home / "data" / "usage.db"))
    assert "tokens_per_day" in str(refusal(ring.authenticate(b"sk-alice"), NOW))
    assert "tokens_per_month" in str(refusal(ring.authenticate(b"sk-bob"), NOW))
    carol = ring.authenticate(b"sk-carol")
    carol.enter(NOW)
    write(project, line("carol", ", tokens_per_day: 100"))  # a limit that is new counts what was used before it
    ring.reload()
    assert "tokens_per_day" in str(refusal(carol, NOW))


def test_a_broken_file_at_the_start(project: Project, usage: Usage, caplog: pytest.LogCaptureFixture) -> None:
    write(project, "{name: alice}")
    ring = ring_of(project, usage)
    assert ring.authenticate(b"sk-deployment").admin
    assert ring.problem == 'config/keys.yaml: keys.0: "hash" is missing'
    assert ring.problem in caplog.text
    with pytest.raises(ConfigError):
        ring.reload()


@contextlib.asynccontextmanager
async def watched(ring: KeyRing) -> AsyncIterator[Callable[[Callable[[], Any]], Any]]:
    async def soon(condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(ring.watch())
    yield soon
    watching.cancel()


def knows(ring: KeyRing, *names: str) -> Callable[[], bool]:
    return lambda: [key.name for key in ring.keys[1:]] == list(names)


def test_the_file_is_watched(project: Project, usage: Usage, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        ring = ring_of(project, usage)
        async with watched(ring) as soon:
            add_key(project.home, {"name": "alice", "hash": hash_of("sk-alice")})
            await soon(knows(ring, "alice"))
            add_key(project.home, {"name": "bob", "hash": hash_of("sk-bob")})
            await soon(knows(ring, "alice", "bob"))
            alice = ring.authenticate(b"sk-alice")

            with (project.home / FILE).open("a") as file:
                file.write("- {name: carol}\n")
            await soon(lambda: ring.problem)
            assert ring.problem == 'config/keys.yaml: keys.2: "hash" is missing'
            assert ring.authenticate(b"sk-alice") is alice
            await asyncio.sleep(1)
            assert caplog.text.count("keys.2") == 1

            write(project, line("alice"), line("carol"))
            await soon(knows(ring, "alice", "carol"))
            assert ring.problem is None
            assert ring.authenticate(b"sk-alice") is alice
            remove_key(project.home, "alice")
            await soon(knows(ring, "carol"))
            (project.home / FILE).unlink()
            await soon(knows(ring))

    caplog.set_level(logging.ERROR)
    asyncio.run(story())


def test_a_file_in_the_middle_of_being_written_is_not_read(project: Project, usage: Usage) -> None:
    """An editor empties it, writes a part, and then the rest."""

    async def story() -> None:
        write(project, line("alice"))
        ring = ring_of(project, usage)
        seen = set()
        async with watched(ring) as soon:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                empty(project)
                await asyncio.sleep(0.13)
                write(project, line("alice"), f"# {time.monotonic()}")
                await asyncio.sleep(0.04)
                seen.add(tuple(key.name for key in ring.keys))
            write(project, line("alice"), line("bob"))
            await soon(knows(ring, "alice", "bob"))
        assert seen == {("deployment", "alice")}

    asyncio.run(story())


def test_enter_and_leave_are_cheap() -> None:
    """An order of magnitude above what they cost, so that a busy machine does not matter."""
    limits = ("requests_per_minute", "tokens_per_minute", "max_concurrent", "tokens_per_day", "tokens_per_month")
    key = Key(entry(**dict.fromkeys(limits, 10**12), expires="9999-12-31"))
    fastest = math.inf
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(1000):
            asks(key, 100, NOW)
        fastest = min(fastest, time.perf_counter() - begin)
    assert fastest / 1000 < 15e-6
