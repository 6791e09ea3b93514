"""What a person sees: tables and live progress. Colours only where the output is a terminal."""

import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_unified import loopback, state
from vllm_unified.devices import GIB, Device
from vllm_unified.engines.memory import Need
from vllm_unified.engines.placement import Placed, Plan
from vllm_unified.engines.usage import Usage, usage_of_all
from vllm_unified.settings import Kind, Model, Settings
from vllm_unified.settings.keys import FILE as KEYS_FILE
from vllm_unified.settings.keys import KeyEntry
from vllm_unified.state import EngineState, Phase
from vllm_unified.supervision.ask import programs
from vllm_unified.supervision.companions import BY_NAME, GRAFANA, supervised, wanted
from vllm_unified.supervision.rendered import Password

STYLES = {
    Phase.READY: "green",
    Phase.STARTING: "cyan",
    Phase.WAITING: "dim",
    Phase.BACKOFF: "red",
    Phase.DRAINING: "yellow",
    Phase.STOPPING: "yellow",
    Phase.STOPPED: "dim",
}
REFRESH_SECONDS = 0.5
WATCH_SECONDS = 1.0
GUARD_SECONDS = 2.0
BAR_COLUMNS = 48
BAR_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
HOPELESS_AFTER_RESTARTS = 2


def plan_table(planned: Plan) -> Group:
    """For each device what is asked of it, a bar of it, and last the order of starting."""
    parts: list[RenderableType] = []
    for device in planned.devices:
        memory = f"{_gib(device.total_bytes)} GiB, {_gib(device.held_bytes)} held by others"
        parts += [Text(f"{device.label}  {device.name}  {memory}", style="bold"), _plan_bar(planned, device)]
        table = Table(box=None, pad_edge=False, show_header=False)
        for placed in planned.on(device):
            need = placed.need_of(device)
            table.add_row(f"  {placed.model.key}", f"{_gib(need.total)} GiB", Text(_breakdown(need), style="dim"))
        table.add_row(
            "  together", f"{_gib(planned.asked_of(device))} GiB", f"{_gib(planned.left_on(device))} GiB left"
        )
        parts += [table, Text()]
    return Group(*parts, Text(f"starting order: {', '.join(planned.order)}"))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _breakdown(need: Need) -> str:
    weights = f"weights {_gib(need.weights)} + " if need.weights else ""  # none while they are not there yet
    return f"{weights}cache {_gib(need.cache)} + margin {_gib(need.margin)}"


def _plan_bar(planned: Plan, device: Device) -> Text:
    """The device from end to end: others' memory, a piece for each model, what is left."""
    pieces = [("░" * BAR_COLUMNS, device.held_bytes, "dim")]
    for placed in planned.on(device):
        colour = BAR_COLOURS[planned.placed.index(placed) % len(BAR_COLOURS)]
        label = f"▏{placed.model.key}".ljust(BAR_COLUMNS)
        pieces.append((label, placed.need_of(device).total, f"black on {colour}"))
    bar, end = Text("  "), 0
    for label, size, style in pieces:
        begin, end = end, end + size
        columns = round(end / device.total_bytes * BAR_COLUMNS) - round(begin / device.total_bytes * BAR_COLUMNS)
        bar.append(label[:columns], style)
    return bar.append("▏".ljust(max(0, BAR_COLUMNS + 2 - len(bar))) + "▏")


def plan_json(planned: Plan) -> dict[str, Any]:
    """Stable: fields are added, never renamed. Sizes in bytes."""
    return {
        "devices": [
            {
                "device": device.label,
                "handle": device.handle,
                "name": device.name,
                "total_bytes": device.total_bytes,
                "free_bytes": device.free_bytes,
                "held_by_others_bytes": device.held_bytes,
                "asked_bytes": planned.asked_of(device),
                "left_bytes": planned.left_on(device),
                "models": {placed.model.key: placed.need_of(device).total for placed in planned.on(device)},
            }
            for device in planned.devices
        ],
        "models": {placed.model.key: _placed_json(planned, placed) for placed in planned.placed},
        "order": list(planned.order),
    }


def _placed_json(planned: Plan, placed: Placed) -> dict[str, Any]:
    return {
        "devices": [device.label for device in placed.devices],
        "gpu_memory_utilization": placed.share,
        "starts_after": list(planned.before(placed.model.key)),
        "of_each_device": [
            {
                "weights_bytes": need.weights,
                "cache_bytes": need.cache,
                "margin_bytes": need.margin,
                "asked_bytes": need.total,
            }
            for need in placed.needs
        ],
    }


@dataclass(frozen=True)
class Row:
    model: Model
    state: EngineState
    note: str


def rows(settings: Settings) -> list[Row]:
    """Of the engines on this machine."""
    found = [(model, state.read(settings.run, model.key)) for model in settings.engines]
    return [Row(model, each, _note(settings, model, each)) for model, each in found]


def _note(settings: Settings, model: Model, each: EngineState) -> str:
    last = f"last: {each.reason}" if each.reason else None
    words: list[str | None]
    match each.phase:
        case Phase.READY:
            words = [each.note or f"ready after {each.ready_after} s"]
        case Phase.BACKOFF:
            again = max(0, round((each.retry_at or 0) - time.monotonic()))
            words = [f"{each.reason}; again in {again} s, log: {_log(settings, model)}"]
        case Phase.WAITING:
            words = [each.note or f"for {' and '.join(each.devices)}", last]
        case Phase.STARTING:
            words = [each.note, last]
        case _:
            words = [each.reason]
    return "; ".join(word for word in words if word)


def _log(settings: Settings, model: Model) -> Path:
    path = settings.run / "logs" / f"{model.key}.log"
    return path.relative_to(settings.home)


def state_table(
    found: Sequence[Row], usage: Mapping[str, Usage] | None = None, others: Sequence[tuple[Model, str]] = ()
) -> RenderableType:
    """A line a model, with `usage` also what it holds and does; below it what there is to say of some of them.

    `others`: as in `Status`.
    """
    more = ("device", "memory", "requests") if usage else ()
    table = Table("model", "port", "state", "for", "restarts", *more, box=None, pad_edge=False)
    for row in found:
        style = STYLES[row.state.phase]
        table.add_row(
            row.model.key,
            str(row.model.port),
            f"[{style}]{row.state.phase}[/]",
            duration(time.monotonic() - row.state.since),
            str(row.state.restarts),
            *(_usage_cells(row.state, usage[row.model.key]) if usage else ()),
        )
    for model, word in others:
        table.add_row(model.key, "", f"[dim]{word}[/]")
    for column in table.columns:
        column.no_wrap = True
    said_of_others = [Text(f"{model.key}: {_endpoints(model)}") for model, word in others if word == "remote"]
    said = [row for row in found if row.note and (row.state.phase is not Phase.READY or row.state.note)]
    # Text, because an engine's own words may look like markup
    return Group(table, *(Text(f"{row.model.key}: {row.note}") for row in said), *said_of_others)


def _usage_cells(each: EngineState, usage: Usage) -> tuple[str, str, str]:
    held = usage.gpu_bytes if any(label.startswith("GPU") for label in each.devices) else usage.memory_bytes
    memory = f"{held / GIB:.1f} GiB" if held else ""
    return ", ".join(each.devices), memory, "" if usage.requests is None else str(usage.requests)


@dataclass(frozen=True)
class Status:
    """The deployment at one moment. `router`, `documents`: their processes as supervisord sees them; None without a
    supervisord, and for a service that the settings do not want. `guard`: what the service found of the engine's guard
    against repetition; None where it says nothing. `companions`: the state of each that there is, by its name."""

    settings: Settings
    router: str | None
    documents: str | None
    guard: Mapping[str, Any] | None
    rows: Sequence[Row]
    usage: Mapping[str, Usage]
    companions: Mapping[str, str]

    @classmethod
    def now(cls, settings: Settings, containers: Mapping[str, str]) -> "Status":
        """`containers`: the state of each companion that has one, which nobody in ours can see."""
        running = programs(settings.run)
        router = None if running is None else _phase(running, "router")
        documents = _phase(running, "documents") if running is not None and settings.reads_documents else None
        guard = guard_of(settings) if documents == "running" else None
        found = rows(settings)
        usage = usage_of_all(settings, [row.state for row in found])
        processes = running or {}
        phases = {name: _phase(processes, name) for name in processes} | dict(containers)
        companions = {name: phases[name] for name in BY_NAME if name in phases}
        return cls(settings, router, documents, guard, found, usage, companions)

    @property
    def others(self) -> list[tuple[Model, str]]:
        """The models that have no engine here, or none that is to run, and the word for it."""
        remote = [(model, "remote") for model in self.settings.models if not model.served_here]
        return [*remote, *((model, "disabled") for model in self.settings.disabled)]

    @property
    def ready(self) -> bool:
        required = [row.state.phase for row in self.rows if row.model.required]
        return self.router == "running" and all(phase is Phase.READY for phase in required)

    def text(self) -> RenderableType:
        if self.router is None:
            return "not running; start it with ./deploy.sh start"
        models = state_table(self.rows, self.usage, self.others)
        lines: list[RenderableType] = [f"router    {self.settings.router_url}    {self.router}"]
        if self.documents is not None:
            lines.append(f"documents {self.settings.documents_url}    {self.documents}")
        if self.guard is not None and self.guard["works"] is False:
            lines.append(Text(f"          guard against repetition: {self.guard['message']}", style="yellow"))
        for name, phase in self.companions.items():
            lines.append(f"{name:<9} {BY_NAME[name].url(self.settings)}    {phase}")
        return Group(*lines, models)

    def document(self) -> dict[str, Any]:
        """Stable: fields are added, never renamed. Times are seconds since the epoch, sizes bytes."""
        return {
            "running": self.router is not None,
            "config": str(self.settings.file),
            "ready": self.ready,
            "router": {"state": self.router or "stopped", "port": self.settings.router.port},
            "documents": {
                "state": self.documents or "stopped",
                "port": self.settings.documents.port,
                "repetition_guard": self.guard,
            },
            "companions": {
                name: {"state": phase, "url": BY_NAME[name].url(self.settings)}
                for name, phase in self.companions.items()
            },
            "models": {
                **{row.model.key: _document_of(row, self.usage[row.model.key]) for row in self.rows},
                **{model.key: {**_said_of(model), "state": word} for model, word in self.others},
            },
        }


def guard_of(settings: Settings) -> Mapping[str, Any] | None:
    """What the document service found of the guard against repetition: `works` and `message`; None: it does not say."""
    try:
        _, said = loopback.get(f"{settings.documents_url}/health", timeout=GUARD_SECONDS)
        found: Mapping[str, Any] = json.loads(said)["repetition_guard"]
        return {"works": found["works"], "message": found["message"]}
    except (OSError, ValueError, KeyError, TypeError):  # it starts, or something else has its port
        return None


def _phase(running: Mapping[str, Any], program: str) -> str:
    return str(running.get(program, {}).get("statename", "STOPPED")).lower()


def _said_of(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "type": model.type,
        "port": model.port or None,
        "required": model.required,
        "endpoints": len(model.endpoints),
    }


def _document_of(row: Row, usage: Usage) -> dict[str, Any]:
    retry_at = row.state.retry_at
    return {
        **_said_of(row.model),
        "state": row.state.phase,
        "since": state.wall_clock(row.state.since),
        "ready_after": row.state.ready_after,
        "restarts": row.state.restarts,
        "reason": row.state.reason,
        "note": row.state.note,
        "retry_at": None if retry_at is None else state.wall_clock(retry_at),
        "pid": row.state.engine.pid if row.state.engine else None,
        "keeper_pid": row.state.keeper.pid if row.state.keeper else None,
        "devices": list(row.state.devices),
        "memory_bytes": usage.memory_bytes,
        "gpu_bytes": usage.gpu_bytes,
        "requests": usage.requests,
    }


def watch(settings: Settings, containers: Mapping[str, str]) -> None:
    """Show the status anew every second, until Ctrl-C."""
    with Live(Status.now(settings, containers).text(), auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(Status.now(settings, containers).text(), refresh=True)


def duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def wait_until_ready(settings: Settings, timeout: float, is_running: Callable[[], bool]) -> str | None:
    """Show every model's progress until the required ones are ready; None, or what went wrong."""
    console = Console()
    began = time.monotonic()
    shown: dict[str, Phase] = {}
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            found = rows(settings)
            if console.is_terminal:
                live.update(state_table(found), refresh=True)
            else:
                _print_changes(found, shown, time.monotonic() - began)
            if all(row.state.phase is Phase.READY for row in found if row.model.required):
                return None
            failed = [row for row in found if _is_hopeless(row)]
            if failed:
                return "; ".join(f"{row.model.key}: {row.state.reason}" for row in failed)
            if not is_running():
                return "supervisord has ended; run/logs/supervisord.log says why"
            if time.monotonic() - began > timeout:
                waiting = [row.model.key for row in found if row.model.required and row.state.phase is not Phase.READY]
                return f"not ready after {timeout:.0f} s: {', '.join(waiting)}"
            time.sleep(REFRESH_SECONDS)


def _is_hopeless(row: Row) -> bool:
    return row.model.required and row.state.phase is Phase.BACKOFF and row.state.restarts >= HOPELESS_AFTER_RESTARTS


def _print_changes(found: Iterable[Row], shown: dict[str, Phase], elapsed: float) -> None:
    for row in found:
        if shown.get(row.model.key) is not row.state.phase:
            shown[row.model.key] = row.state.phase
            print(f"[{elapsed:5.0f}s] {row.model.key:<12} {row.state.phase:<9} {row.note}", flush=True)


EXAMPLES: dict[Kind, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What are you?"}]}),
    "rerank": (
        "/v1/rerank",
        {
            "query": "What is the capital of France?",
            "documents": ["Bananas are yellow.", "Paris is the capital of France."],
        },
    ),
    "embedding": ("/v1/embeddings", {"input": "What is the capital of France?"}),
    "ocr": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}),
}
# What an OCR model may carry in its folder, to be tried with.
EXAMPLE_PAGE = "page.png"


def welcome_text(settings: Settings) -> str:
    """Addresses, key, and requests that work as pasted; Grafana's password the first time. Raises UserError when there
    is no key."""
    api_key = settings.require_api_key()
    width = max(len(model.key) for model in settings.models)
    own = [f"  {model.key:<{width}}  {_where(settings, model)}  {model.name}" for model in settings.models]
    return "\n".join(
        [
            f"All models   {settings.router_url}/v1",
            *own,
            f"API key      {api_key}   (in {settings.home / '.env'})",
            *_companions(settings),
            "",
            "Try it:",
            "",
            f"KEY={shlex.quote(api_key)}",
            *_examples(settings),
            "",
            "Next:  ./deploy.sh status   ./deploy.sh logs NAME   ./deploy.sh stop",
        ]
    )


def _companions(settings: Settings) -> Iterator[str]:
    for each in wanted(settings) if settings.in_containers else supervised(settings):
        yield f"{each.title:<12} {each.url(settings)}"
        if each is GRAFANA:
            password = Password(settings)
            told = password.told()
            yield f"             user admin, password {f'{told}   (this once; ' if told else '('}in {password.path})"


def _examples(settings: Settings) -> Iterator[str]:
    by_kind = {model.type: model for model in reversed(settings.models)}
    reader = by_kind.get("ocr")
    page = settings.folder(reader) / EXAMPLE_PAGE if reader else None
    has_page = page is not None and page.exists()
    shown: list[Kind] = [kind for kind in ("chat", "rerank") if kind in by_kind]
    if not shown and not has_page:
        # An embedding is no answer for people, and an OCR model wants a picture: these only where nothing else is.
        shown = [kind for kind in EXAMPLES if kind in by_kind][:1]
    for kind in shown:
        path, body = EXAMPLES[kind]
        document = json.dumps({"model": by_kind[kind].name, **body}, ensure_ascii=False)
        yield f"{_curl(settings, path)} -d {shlex.quote(document)}"
    if reader and has_page:
        # The picture is too long for an argument: it goes into the middle of the document on standard input.
        content = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,@"}},
            {"type": "text", "text": "Free OCR."},
        ]
        document = json.dumps({"model": reader.name, "messages": [{"role": "user", "content": content}]})
        before, _, after = document.rpartition("@")
        picture = f"base64 -w0 {shlex.quote(str(page))}"
        yield f"(printf %s {shlex.quote(before)}; {picture}; printf %s {shlex.quote(after)}) |"
        yield f"  {_curl(settings, '/v1/chat/completions')} -d @-"


def _curl(settings: Settings, path: str) -> str:
    return (
        f"curl {settings.router_url}{path} "
        """-H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \\\n """
    )


def keys_table(
    entries: Sequence[KeyEntry], today: Mapping[str, int], month: Mapping[str, int], now: datetime
) -> RenderableType:
    """`today`, `month`: tokens by the key's name."""
    if not entries:
        return Text(f"no keys in {KEYS_FILE}; make one with `vllm-unified keys create NAME`")
    table = Table("key", "models", "limits", "priority", "expires", "tokens today", "this month", box=None)
    for entry in entries:
        table.add_row(
            f"{entry.name} (admin)" if entry.admin else entry.name,
            ", ".join(entry.models or ["all"]),
            "\n".join(_limits(entry)) or "none",
            str(entry.priority),
            _expiry(entry, now),
            f"{today.get(entry.name, 0):,}",
            f"{month.get(entry.name, 0):,}",
        )
    return table


def keys_json(
    entries: Sequence[KeyEntry], today: Mapping[str, int], month: Mapping[str, int], now: datetime
) -> dict[str, Any]:
    """Stable: fields are added, never renamed. A limit that does not hold is null; no hashes."""
    return {
        "keys": [
            {
                **entry.model_dump(mode="json", exclude={"hash"}),
                "expired": _is_over(entry, now),
                "tokens_today": today.get(entry.name, 0),
                "tokens_this_month": month.get(entry.name, 0),
            }
            for entry in entries
        ]
    }


def _limits(entry: KeyEntry) -> list[str]:
    words = {
        "requests_per_minute": "requests/min",
        "tokens_per_minute": "tokens/min",
        "max_concurrent": "at once",
        "tokens_per_day": "tokens/day",
        "tokens_per_month": "tokens/month",
    }
    return [f"{limit:,} {unit}" for field, unit in words.items() if (limit := getattr(entry, field)) is not None]


def _expiry(entry: KeyEntry, now: datetime) -> Text:
    if entry.expires is None:
        return Text("never")
    over = _is_over(entry, now)
    return Text(f"{entry.expires:%Y-%m-%d}{', over' if over else ''}", "red" if over else "")


def _is_over(entry: KeyEntry, now: datetime) -> bool:
    return entry.expires is not None and now > entry.expires


def _where(settings: Settings, model: Model) -> str:
    return f"{settings.engine_url(model)}/v1" if model.served_here else _endpoints(model)


def _endpoints(model: Model) -> str:
    return f"{len(model.endpoints)} endpoint{'s' if len(model.endpoints) > 1 else ''}"


def reload_text(document: Mapping[str, Any]) -> str:
    """The answer of the router to a reload, a line each; last the commands that take up the rest."""
    lines = [f"applied   {each}" for each in document["applied"]]
    lines += [f"started   {each}" for each in document["started"]]
    lines += [f"stopped   {each}" for each in document["stopped"]]
    lines += [f"waiting   {each['what']}" for each in document["restart"]]
    commands = dict.fromkeys(each["command"] for each in document["restart"])
    if commands:
        lines.append(f"What is waiting needs a restart: {', '.join(commands)}")
    return "\n".join(lines) or "nothing has changed"


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
