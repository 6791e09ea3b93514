"""Who may do what: the keys of config/keys.yaml at work, with what each has used of its limits."""

import asyncio
import hashlib
import hmac
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vllm_unified.errors import ConfigError
from vllm_unified.router.limits import Window
from vllm_unified.router.problems import RequestError
from vllm_unified.router.usage import Usage, today
from vllm_unified.settings.keys import DEPLOYMENT, FILE, KeyEntry, hash_of, metrics_key, read_keys

# A file is read when two looks found the same: an editor may be in the middle of writing it.
LOOK_SECONDS = 0.4
LONGEST_ECHO = 64  # as long as a key's name may be
LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "max_concurrent",
    "tokens_per_day",
    "tokens_per_month",
    "expires",
)

log = logging.getLogger(__name__)


class Key:
    """One key and what it has used. Every request is between an `enter` that did not raise and a `leave`.

    `now` is time.monotonic(). Limits on tokens are post-paid: a request is let in while fewer were used.
    """

    __slots__ = (
        "_day_tokens",
        "_expires",
        "_is_limited",
        "_midnight",
        "_models",
        "_month",
        "_month_tokens",
        "_requests",
        "_tokens",
        "admin",
        "digest",
        "entry",
        "in_flight",
        "name",
        "priority",
    )

    def __init__(self, entry: KeyEntry) -> None:
        self.in_flight = 0
        self._requests = Window()
        self._tokens = Window()
        self._day_tokens = 0
        self._month_tokens = 0
        self._month = (0, 0)
        self._begin_day(time.time())
        self.change(entry)

    def change(self, entry: KeyEntry) -> None:
        """Take over what the file says now; what was counted stays."""
        self.entry = entry
        self.name = entry.name
        self.priority = entry.priority
        self.admin = entry.admin
        self.digest = entry.digest
        self._models = None if entry.models is None else frozenset(entry.models)
        self._expires = math.inf if entry.expires is None else entry.expires.timestamp()
        self._is_limited = any(getattr(entry, field) is not None for field in LIMITS)

    def seed(self, day_tokens: int, month_tokens: int) -> None:
        """What the usage database knows of today and this month: from before a restart, or before there was a limit."""
        self._day_tokens = max(self._day_tokens, day_tokens)
        self._month_tokens = max(self._month_tokens, month_tokens)

    def may_use(self, model_names: Collection[str]) -> bool:
        """`model_names`: the model's key, name and aliases."""
        return self._models is None or not self._models.isdisjoint(model_names)

    def require_valid(self, wall: float) -> None:
        """`wall`: time.time(). Raises RequestError 401 when the key expired before."""
        if wall > self._expires:
            remedy = "ask whoever runs this deployment for a new one"
            raise _not_let_in(f"API key expired on {self.entry.expires:%Y-%m-%d}; {remedy}")

    def enter(self, now: float) -> None:
        """Raises RequestError: 401 when the key has expired, 429 at a limit. Who is refused counts nowhere."""
        if self._is_limited:
            self._require_room(now, time.time(), self.in_flight)
            self._requests.add(1, now)
        self.in_flight += 1

    def submit(self, now: float) -> None:
        """Count a document that is handed in as one request. Raises RequestError as `enter` does, but takes no place
        of `max_concurrent`: its pages are asked for in this key's name, and would wait for that place.
        """
        if self._is_limited:
            self._require_room(now, time.time(), in_flight=0)
            self._requests.add(1, now)

    def leave(self, tokens: int, now: float) -> None:
        """`tokens`: all that the request used, of its prompt and of its answer."""
        self.in_flight -= 1
        if self._is_limited and tokens:
            wall = time.time()
            if wall >= self._midnight:
                self._begin_day(wall)
            self._tokens.add(tokens, now)
            self._day_tokens += tokens
            self._month_tokens += tokens

    def used_ratios(self, now: float, wall: float) -> Iterator[tuple[str, float]]:
        """Of each limit that is set, the share that is used. From any thread: nothing is changed by it."""
        entry = self.entry
        is_today = wall < self._midnight
        if entry.requests_per_minute is not None:
            yield "requests_per_minute", self._requests.peek(now) / entry.requests_per_minute
        if entry.tokens_per_minute is not None:
            yield "tokens_per_minute", self._tokens.peek(now) / entry.tokens_per_minute
        if entry.max_concurrent is not None:
            yield "max_concurrent", self.in_flight / entry.max_concurrent
        if entry.tokens_per_day is not None:
            yield "tokens_per_day", self._day_tokens / entry.tokens_per_day if is_today else 0.0
        if entry.tokens_per_month is not None:
            is_this_month = is_today or self._month == _month_of(wall)
            yield "tokens_per_month", self._month_tokens / entry.tokens_per_month if is_this_month else 0.0

    def _require_room(self, now: float, wall: float, in_flight: int) -> None:
        entry = self.entry
        if wall > self._expires:
            self.require_valid(wall)
        if wall >= self._midnight:
            self._begin_day(wall)
        if entry.max_concurrent is not None and in_flight >= entry.max_concurrent:
            what = f"may have {entry.max_concurrent} requests at the same time (max_concurrent)"
            raise self._refusal(what, "wait until one of them ends", 1)
        if entry.requests_per_minute is not None and self._requests.total(now) >= entry.requests_per_minute:
            what = f"may send {entry.requests_per_minute} requests a minute (requests_per_minute)"
            seconds = self._requests.seconds_until_below(entry.requests_per_minute, now)
            raise self._refusal(what, "send them more slowly", seconds)
        if entry.tokens_per_minute is not None and self._tokens.total(now) >= entry.tokens_per_minute:
            what = f"may use {entry.tokens_per_minute} tokens a minute (tokens_per_minute)"
            seconds = self._tokens.seconds_until_below(entry.tokens_per_minute, now)
            raise self._refusal(what, "send shorter requests, or more slowly", seconds)
        if entry.tokens_per_day is not None and self._day_tokens >= entry.tokens_per_day:
            what = f"may use {entry.tokens_per_day} tokens a day (tokens_per_day)"
            raise self._refusal(what, "go on after midnight UTC", self._midnight - wall)
        if entry.tokens_per_month is not None and self._month_tokens >= entry.tokens_per_month:
            what = f"may use {entry.tokens_per_month} tokens a month (tokens_per_month)"
            raise self._refusal(what, "go on when the next month begins, UTC", _next_month(wall) - wall)

    def _refusal(self, what: str, remedy: str, seconds: float) -> RequestError:
        wait = max(1, math.ceil(seconds))
        message = f'the key "{self.name}" {what}; {remedy}: try again in {wait} s, or ask for a higher limit'
        return RequestError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(wait)})

    def _begin_day(self, wall: float) -> None:
        day = datetime.fromtimestamp(wall, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self._midnight = (day + timedelta(days=1)).timestamp()
        self._day_tokens = 0
        if (day.year, day.month) != self._month:
            self._month = (day.year, day.month)
            self._month_tokens = 0


class KeyRing:
    """The deployment's own key, which always works, those of config/keys.yaml, and `scraper`: the key that Prometheus
    has, which `authenticate` does not know.
    """

    def __init__(self, deployment_key: str, home: Path, usage: Usage) -> None:
        """A file that is wrong is logged and stands in `problem`; the deployment's key works without it."""
        self.deployment = Key(KeyEntry.model_construct(name=DEPLOYMENT, hash=hash_of(deployment_key), admin=True))
        self.scraper = Key(KeyEntry.model_construct(name="metrics", hash=hash_of(metrics_key(deployment_key))))
        self._home = home
        self._usage = usage
        self._keys: dict[str, Key] = {}
        self._by_digest = {self.deployment.digest: self.deployment}
        self._by_value: dict[bytes, Key] = {}  # of those that were sent and are valid
        self.problem: str | None = None
        self._read_as = self._look()
        try:
            self.reload()
        except ConfigError as error:
            self._keep_old(error)

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.deployment, *self._keys.values())

    def authenticate(self, value: bytes | None) -> Key:
        """`value`: what the client sent behind `Bearer`. Raises RequestError 401."""
        if not value:
            raise _not_let_in("no API key; send `Authorization: Bearer KEY`")
        # Found by its value when it was right before. How long that takes tells nothing: a dict compares two values
        # only when their hashes, which are keyed anew in each process, are the same.
        key = self._by_value.get(value) or self._by_hash(value)
        key.require_valid(time.time())
        return key

    def authenticate_scraper(self, value: bytes | None) -> Key:
        """`scraper`, or any other key. Raises RequestError 401."""
        digest = hashlib.sha256(value or b"").digest()
        return self.scraper if hmac.compare_digest(self.scraper.digest, digest) else self.authenticate(value)

    def on_behalf_of(self, name: str) -> Key:
        """The key that a request of the deployment's own is charged to. Raises RequestError 401."""
        key = self.deployment if name == DEPLOYMENT else self._keys.get(name)
        if key is None:
            raise _not_let_in(f'x-on-behalf-of: there is no key "{name[:LONGEST_ECHO]}", or not any more ({FILE})')
        key.require_valid(time.time())
        return key

    def _by_hash(self, value: bytes) -> Key:
        digest = hashlib.sha256(value).digest()
        key = self._by_digest.get(digest)
        if key is None or not hmac.compare_digest(key.digest, digest):
            raise _not_let_in("wrong API key; send `Authorization: Bearer KEY`")
        self._by_value[value] = key
        return key

    async def watch(self) -> None:
        """Take up each change of the file within a second."""
        before = self._read_as
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            found = self._look()
            if found == before and found != self._read_as:
                self._read_as = found
                try:
                    self._take(*await asyncio.to_thread(self._read))
                except ConfigError as error:
                    self._keep_old(error)
                except Exception:  # an end of the watch would leave revoked keys valid
                    log.exception("%s: reading it failed, the keys stay as they were", FILE)
            before = found

    def reload(self) -> None:
        """Raises ConfigError, and keeps the keys that there were."""
        self._take(*self._read())

    def _look(self) -> tuple[int, int, int] | None:
        """Differs after each change of the file, a chmod that makes it readable among them; None without one."""
        try:
            found = (self._home / FILE).stat()
        except OSError:
            return None
        return found.st_ctime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[tuple[KeyEntry, ...], Mapping[str, int], Mapping[str, int]]:
        """The entries, and by name the tokens of today and of this month."""
        day = today()
        return read_keys(self._home), self._usage.tokens_since(day), self._usage.tokens_since(day.replace(day=1))

    def _take(self, entries: Sequence[KeyEntry], of_day: Mapping[str, int], of_month: Mapping[str, int]) -> None:
        taken: dict[str, Key] = {}
        for entry in entries:
            key = self._keys.get(entry.name) or Key(entry)
            key.change(entry)
            key.seed(of_day.get(key.name, 0), of_month.get(key.name, 0))
            taken[key.name] = key
        self._keys = taken  # at once: metrics are told by another thread
        self._by_digest = {key.digest: key for key in (*self._keys.values(), self.deployment)}
        self._by_value = {}
        self.problem = None

    def _keep_old(self, error: ConfigError) -> None:
        self.problem = str(error)
        log.error("%s\n%s is not taken up, the keys stay as they were", error, FILE)


def _not_let_in(message: str) -> RequestError:
    return RequestError(401, message, code="invalid_api_key")


def _month_of(wall: float) -> tuple[int, int]:
    day = datetime.fromtimestamp(wall, UTC)
    return day.year, day.month


def _next_month(wall: float) -> float:
    day = datetime.fromtimestamp(wall, UTC)
    year, month = divmod(day.year * 12 + day.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()
