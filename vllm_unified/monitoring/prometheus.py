"""Asking Prometheus what a chart shows of the last hours."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template
from typing import Any

import httpx

from vllm_unified.errors import UserError
from vllm_unified.monitoring.charts import Query

POINTS = 240  # in a chart: about one for three pixels
SHORTEST_STEP = 15  # seconds
SECONDS = 30.0  # that an answer may take
LONGEST_LABEL = 60


class NoAnswerError(UserError):
    """No Prometheus at this address."""


@dataclass(frozen=True)
class Span:
    """Seconds since the epoch."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return max(SHORTEST_STEP, math.ceil(self.seconds / POINTS))

    @property
    def times(self) -> list[float]:
        return [self.end - self.step * back for back in reversed(range(int(self.seconds // self.step) + 1))]


@dataclass(frozen=True)
class Series:
    """`values`: one for each of the span's times, NaN where there is none; of an instant, a single one."""

    labels: Mapping[str, str]
    values: list[float]

    def name(self, legend: str) -> str:
        """The legend with its labels filled in."""
        return re.sub(r"\{\{(\w+)\}\}", lambda found: self.labels.get(found[1], ""), legend).strip()


class Prometheus:
    """Every method raises NoAnswerError where nothing answers, and UserError for what is no answer of Prometheus."""

    def __init__(self, url: str, span: Span) -> None:
        """Asks for this span of time, or for its end."""
        self.url = url.rstrip("/")
        self.span = span
        # A proxy that the environment names is for the world outside.
        self._client = httpx.Client(timeout=SECONDS, trust_env=False)

    def __enter__(self) -> "Prometheus":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def series(self, query: Query, model: str = "") -> list[Series]:
        """Over all of the span. `model`: what $model stands for."""
        times = self.span.times
        data = self._ask(
            "query_range",
            query=self._filled_in(query.expr, model),
            start=f"{times[0]:.3f}",
            end=f"{times[-1]:.3f}",
            step=f"{self.span.step:g}",
        )
        return [Series(_labels(each), self._on_grid(each["values"], times)) for each in data]

    def now(self, query: Query, model: str = "") -> list[Series]:
        """At the span's end."""
        data = self._ask("query", query=self._filled_in(query.expr, model), time=f"{self.span.end:.3f}")
        return [Series(_labels(each), [float(each["value"][1])]) for each in data]

    def _filled_in(self, expr: str, model: str) -> str:
        step = self.span.step
        return Template(expr).substitute(
            model=model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"),
            __rate_interval=f"{max(60, 2 * step):.0f}s",
            __range=f"{self.span.seconds:.0f}s",
            __step=f"{step:.0f}s",
        )

    def _on_grid(self, points: list[tuple[float, str]], times: list[float]) -> list[float]:
        values = [math.nan] * len(times)
        for at, value in points:
            values[round((at - times[0]) / self.span.step)] = float(value)
        return values

    def _ask(self, path: str, **parameters: str) -> list[dict[str, Any]]:
        try:
            answer = self._client.get(f"{self.url}/api/v1/{path}", params=parameters)
            document = answer.json()
            if document["status"] == "success":
                return list(document["data"]["result"])
            said = document["error"]
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise UserError(f"{self.url}: no address of a Prometheus; use http://HOST:PORT") from None
        except httpx.TransportError as error:
            raise NoAnswerError(f"{self.url}: no Prometheus answers ({error or type(error).__name__})") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.url}: answers {answer.status_code}, and not as Prometheus does") from None
        raise UserError(f"{self.url}: {said}")


def _labels(result: Mapping[str, Any]) -> dict[str, str]:
    """What stands in them came from outside: a control character, or one that turns the line around, is not shown."""
    return {name: _shown(value) for name, value in result["metric"].items() if name != "__name__"}


def _shown(value: str) -> str:
    text = "".join(letter if letter.isprintable() else "□" for letter in value)
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
