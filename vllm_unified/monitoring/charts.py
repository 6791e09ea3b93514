"""Every chart of the dashboards and of the report, as data: what it asks Prometheus, its unit, and what to do.

`$model`, `$__rate_interval` (of a rate) and `$__range` (all of the time shown) are Grafana's; the report fills them in.
Units are Grafana's ids. A description says what an operator does about what the chart shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

PREFIX = "vllm-unified"


class Kind(StrEnum):
    """TIMELINE shows when each series was in which state, BARS a number for each, TABLE a line for each model."""

    TIMESERIES = "timeseries"
    STAT = "stat"
    TABLE = "table"
    BARS = "bars"
    TIMELINE = "timeline"
    HEATMAP = "heatmap"


class Colour(StrEnum):
    """Those with a meaning."""

    GOOD = "#2a9d6f"
    WARNING = "#e69f00"
    BAD = "#d1495b"
    QUIET = "#9ca3af"


# Of outcomes, and of the owners of errors.
COLOURS = {
    "2xx": Colour.GOOD,
    "4xx": Colour.WARNING,
    "5xx": Colour.BAD,
    "left": Colour.QUIET,
    "client": Colour.QUIET,
    "router": Colour.WARNING,
    "engine": Colour.BAD,
}


@dataclass(frozen=True)
class Query:
    """`legend` has labels as `{{model}}`; of a table it names the column, which has a unit of its own."""

    expr: str
    legend: str = "{{model}}"
    unit: str = "short"


@dataclass(frozen=True)
class Chart:
    """`limits`: from which value on it is WARNING, and BAD; where BAD is the lower one, small values are bad.

    `states`: of a timeline or a stat, what the values are called. `top`: the largest value there can be.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    description: str
    kind: Kind = Kind.TIMESERIES
    limits: tuple[float, float] | None = None
    states: tuple[tuple[int, str, Colour], ...] = ()
    top: float | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    title: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Dashboard:
    """`model`: whether it is about one model, which the variable $model names."""

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]
    of_one_model: bool = False

    @property
    def uid(self) -> str:
        return f"{PREFIX}-{self.name}"

    def charts(self) -> Iterator[Chart]:
        for row in self.rows:
            yield from row.charts


READY = ((1, "ready", Colour.GOOD), (0, "not ready", Colour.BAD))
UP = ((1, "up", Colour.GOOD), (0, "down", Colour.BAD))
BREAKER = ((0, "closed", Colour.GOOD), (1, "half open", Colour.WARNING), (2, "open", Colour.BAD))
IN_PHASE = ((1, "in this phase", Colour.GOOD),)
ONE_MODEL = 'model="$model"'


def rate(counter: str, selector: str = "", by: str = "model") -> str:
    return f"sum by ({by}) (rate({counter}{_braces(selector)}[$__rate_interval]))"


def increase(counter: str, selector: str = "", by: str = "model") -> str:
    """Over all of the time shown."""
    return f"sum by ({by}) (increase({counter}{_braces(selector)}[$__range]))"


def quantile(
    share: float, histogram: str, selector: str = "", by: str = "model", over: str = "$__rate_interval"
) -> str:
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share:g}, sum by ({labels}) (rate({histogram}_bucket{_braces(selector)}[{over}])))"


def quantiles(histogram: str, selector: str = ONE_MODEL) -> tuple[Query, ...]:
    return tuple(
        Query(quantile(share, histogram, selector, by=""), name)
        for share, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    )


def mean(histogram: str, selector: str, by: str = "model") -> str:
    return f"{rate(f'{histogram}_sum', selector, by)} / {rate(f'{histogram}_count', selector, by)}"


def buckets(histogram: str, selector: str = "") -> tuple[Query, ...]:
    return (Query(f"sum by (le) (increase({histogram}_bucket{_braces(selector)}[$__rate_interval]))", "{{le}}"),)


def largest(gauge: str, selector: str = "", by: str = "model") -> str:
    return f"max by ({by}) ({gauge}{_braces(selector)})"


def wait(selector: str = "") -> str:
    """Of a request that comes now, where the router knows it; else what the engine's own queue took."""
    known = largest(f"{OURS}_estimated_wait_seconds", selector)
    return f"{known} or {mean('vllm:request_queue_time_seconds', selector)}"


def _braces(selector: str) -> str:
    return f"{{{selector}}}" if selector else ""


OURS = "vllm_unified"
DOCUMENTS = "vllm_unified_documents"
KNOWN = 'model!=""'
FAILED = 'owner!="client"'
OF_ONE_AND_FAILED = f"{ONE_MODEL},{FAILED}"
KEY_LIMITS = (0.8, 1.0)
FIRST_BYTE_LIMITS = (2.5, 10.0)
CACHE_LIMITS = (0.9, 0.98)

NOW = (
    Chart(
        "Models that are not ready",
        "short",
        (Query(f"count({OURS}_model_ready == 0) or vector(0)", "not ready"),),
        "`./deploy.sh status` says why, in one line for each model.",
        Kind.STAT,
        limits=(1, 1),
    ),
    Chart(
        "Requests per second",
        "reqps",
        (Query(f"sum(rate({OURS}_requests_total[$__rate_interval]))", "requests"),),
        "All that clients sent, answered or refused.",
        Kind.STAT,
    ),
    Chart(
        "Failed by us",
        "percentunit",
        (
            Query(
                f"sum(rate({OURS}_errors_total{{{FAILED}}}[$__rate_interval]))"
                f" / sum(rate({OURS}_requests_total[$__rate_interval]))",
                "failed",
            ),
        ),
        "Requests whose error was the router's or an engine's. `./deploy.sh logs router` has each with its reason.",
        Kind.STAT,
        limits=(0.01, 0.05),
    ),
    Chart(
        "Tokens per second",
        "short",
        (Query(f"sum(rate({OURS}_tokens_total[$__rate_interval]))", "tokens"),),
        "Read and written, of all models together.",
        Kind.STAT,
    ),
    Chart(
        "Pages waiting",
        "short",
        (Query(f"sum({DOCUMENTS}_pages_waiting)", "pages"),),
        "Pages of documents that nobody has read yet.",
        Kind.STAT,
    ),
    Chart(
        "Alerts",
        "short",
        (Query('count(ALERTS{alertstate="firing"}) or vector(0)', "alerts"),),
        "Firing now. docs/operations.md has the remedy of each.",
        Kind.STAT,
        limits=(1, 1),
    ),
)

MODELS = Chart(
    "Models",
    "short",
    (
        Query(largest(f"{OURS}_model_ready"), "State"),
        Query(f"avg by (model) (avg_over_time({OURS}_model_ready[$__range]))", "Ready", "percentunit"),
        Query(increase(f"{OURS}_requests_total", KNOWN), "Requests"),
        Query(increase(f"{OURS}_errors_total", f"{KNOWN},{FAILED}"), "Failed"),
        Query(quantile(0.95, f"{OURS}_time_to_first_byte_seconds", KNOWN, over="$__range"), "First byte p95", "s"),
        Query(increase(f"{OURS}_tokens_total", KNOWN), "Tokens"),
        Query(wait(), "Wait", "s"),
        Query("max by (model) (max_over_time(vllm:kv_cache_usage_perc[$__range]))", "KV cache peak", "percentunit"),
        Query(increase(f"{OURS}_engine_restarts_total"), "Restarts"),
        Query(largest(f"{OURS}_engine_memory_bytes"), "Memory", "bytes"),
    ),
    "One line for each model; the link leads to all of its charts. `./deploy.sh status` says why one is not ready.",
    Kind.TABLE,
    states=READY,
)

OVERVIEW = Dashboard(
    "overview",
    "Overview",
    "Is every model up, how long do requests wait, and what is about to run out?",
    (
        Row("Now", NOW),
        Row("Models", (MODELS,)),
        Row(
            "Over time",
            (
                Chart(
                    "When each model was ready",
                    "short",
                    (Query(largest(f"{OURS}_model_ready")),),
                    "Red is a model that took no requests: `./deploy.sh logs MODEL` for that time.",
                    Kind.TIMELINE,
                    states=READY,
                ),
                Chart(
                    "Requests",
                    "reqps",
                    (Query(rate(f"{OURS}_requests_total", KNOWN)),),
                    "A model that suddenly has none: look at its errors, then at its clients.",
                ),
                Chart(
                    "Failed requests",
                    "percentunit",
                    (
                        Query(
                            f"{rate(f'{OURS}_errors_total', f'{KNOWN},{FAILED}')}"
                            f" / {rate(f'{OURS}_requests_total', KNOWN)}"
                        ),
                    ),
                    "Errors of the router and of engines, not of clients: `./deploy.sh logs MODEL` has them.",
                    limits=(0.01, 0.05),
                ),
                Chart(
                    "Time to first byte, p95",
                    "s",
                    (Query(quantile(0.95, f"{OURS}_time_to_first_byte_seconds", KNOWN)),),
                    "Grows with the queue: another replica, shorter prompts, or a smaller max_queue.",
                ),
                Chart(
                    "Requests that wait",
                    "short",
                    (Query(f"sum by (model) ({OURS}_queued) + sum by (model) ({OURS}_waiting)"),),
                    "For a slot of max_concurrent, or for the model to be ready.",
                ),
                Chart(
                    "Expected wait of the next request",
                    "s",
                    (Query(wait()),),
                    "A request that comes now waits so long for a slot; without max_concurrent, in the engine's queue.",
                    limits=(10, 30),
                ),
                Chart(
                    "KV cache in use",
                    "percentunit",
                    (Query(largest("vllm:kv_cache_usage_perc")),),
                    "Near 100 % requests are put back and wait: more memory for the model, a smaller max_model_len, or "
                    "max_concurrent.",
                    limits=CACHE_LIMITS,
                    top=1,
                ),
                Chart(
                    "Tokens per second",
                    "short",
                    (Query(rate(f"{OURS}_tokens_total", KNOWN)),),
                    "Read and written, as the engines count them.",
                ),
            ),
        ),
    ),
)

MODEL = Dashboard(
    "model",
    "One model",
    "Latency, tokens, queue, cache and batch of one model, and what its engine did.",
    (
        Row(
            "Now",
            (
                Chart(
                    "State",
                    "short",
                    (Query(largest(f"{OURS}_model_ready", ONE_MODEL), "state"),),
                    "`./deploy.sh status` says why it is not ready.",
                    Kind.STAT,
                    states=READY,
                ),
                Chart(
                    "Expected wait",
                    "s",
                    (Query(wait(ONE_MODEL), "wait"),),
                    "Of a request that comes now.",
                    Kind.STAT,
                    limits=(10, 30),
                ),
                Chart(
                    "First byte, p95",
                    "s",
                    (
                        Query(
                            quantile(
                                0.95, f"{OURS}_time_to_first_byte_seconds", ONE_MODEL, by="", over="$__rate_interval"
                            ),
                            "p95",
                        ),
                    ),
                    "From the request to the first byte of its answer, at the router.",
                    Kind.STAT,
                    limits=FIRST_BYTE_LIMITS,
                ),
                Chart(
                    "KV cache",
                    "percentunit",
                    (Query(largest("vllm:kv_cache_usage_perc", ONE_MODEL), "in use"),),
                    "Near 100 % requests are put back and wait.",
                    Kind.STAT,
                    limits=CACHE_LIMITS,
                    top=1,
                ),
                Chart(
                    "Last start took",
                    "s",
                    (Query(largest(f"{OURS}_engine_start_seconds", ONE_MODEL), "start"),),
                    "From its start to ready.",
                    Kind.STAT,
                ),
                Chart(
                    "Last restart cost",
                    "s",
                    (Query(largest(f"{OURS}_engine_downtime_seconds", ONE_MODEL), "not ready"),),
                    "From not ready to ready again.",
                    Kind.STAT,
                ),
            ),
        ),
        Row(
            "Requests",
            (
                Chart(
                    "Requests by outcome",
                    "reqps",
                    (Query(rate(f"{OURS}_requests_total", ONE_MODEL, by="code"), "{{code}}"),),
                    "2xx answered, 4xx refused as the client's mistake or a limit, 5xx failed, left: the client went.",
                    stacked=True,
                ),
                Chart(
                    "Errors by owner",
                    "reqps",
                    (Query(rate(f"{OURS}_errors_total", ONE_MODEL, by="owner"), "{{owner}}"),),
                    "client: its request was wrong. router: a limit, a full queue, a model that is not ready. engine: "
                    "`./deploy.sh logs MODEL`.",
                    stacked=True,
                ),
                Chart(
                    "Time to first byte",
                    "s",
                    (
                        *quantiles(f"{OURS}_time_to_first_byte_seconds", f'{ONE_MODEL},stream="true"'),
                        Query(
                            quantile(0.95, f"{OURS}_time_to_first_byte_seconds", f'{ONE_MODEL},stream="false"', by=""),
                            "p95, not streamed",
                        ),
                    ),
                    "Of streams, at the router, with the queue. Far above the engine's: requests wait for a slot.",
                    limits=FIRST_BYTE_LIMITS,
                ),
                Chart(
                    "Request duration",
                    "s",
                    quantiles(f"{OURS}_request_duration_seconds"),
                    "From the request to the end of its answer.",
                ),
                Chart(
                    "Request durations",
                    "s",
                    buckets(f"{OURS}_request_duration_seconds", ONE_MODEL),
                    "How many requests took how long. Two bands are two kinds of requests.",
                    Kind.HEATMAP,
                ),
                Chart(
                    "Queue time",
                    "s",
                    quantiles(f"{OURS}_queue_seconds"),
                    "In the router's queue: a larger max_concurrent where the engine has room, or another replica.",
                ),
            ),
        ),
        Row(
            "Engine",
            (
                Chart(
                    "Time to first token",
                    "s",
                    quantiles("vllm:time_to_first_token_seconds"),
                    "vLLM's own: its queue and the reading of the prompt.",
                ),
                Chart(
                    "Inter-token latency",
                    "s",
                    quantiles("vllm:inter_token_latency_seconds"),
                    "How fluently an answer is written; grows with the batch.",
                ),
                Chart(
                    "Tokens per second",
                    "short",
                    (
                        Query(rate("vllm:prompt_tokens_total", ONE_MODEL), "prompt"),
                        Query(rate("vllm:generation_tokens_total", ONE_MODEL), "completion"),
                    ),
                    "Of prompts, and of answers.",
                ),
                Chart(
                    "Tokens per request, p95",
                    "short",
                    (
                        Query(quantile(0.95, "vllm:request_prompt_tokens", ONE_MODEL, by=""), "prompt"),
                        Query(quantile(0.95, "vllm:request_generation_tokens", ONE_MODEL, by=""), "completion"),
                    ),
                    "Long prompts are what fills the cache.",
                ),
                Chart(
                    "Queue and batch",
                    "short",
                    (
                        Query(f"sum(vllm:num_requests_running{{{ONE_MODEL}}})", "running in the engine"),
                        Query(f"sum(vllm:num_requests_waiting{{{ONE_MODEL}}})", "waiting in the engine"),
                        Query(
                            f"sum({OURS}_queued{{{ONE_MODEL}}}) + sum({OURS}_waiting{{{ONE_MODEL}}})",
                            "waiting in the router",
                        ),
                    ),
                    "Waiting in the engine means that its cache or its batch is full.",
                ),
                Chart(
                    "Tokens per step",
                    "short",
                    (Query(mean("vllm:iteration_tokens_total", ONE_MODEL), "tokens"),),
                    "How large the batches are: the larger, the better the device is used.",
                ),
                Chart(
                    "KV cache in use",
                    "percentunit",
                    (Query(largest("vllm:kv_cache_usage_perc", ONE_MODEL), "in use"),),
                    "Near 100 %: more memory for the model, a smaller max_model_len, or max_concurrent.",
                    limits=CACHE_LIMITS,
                    top=1,
                ),
                Chart(
                    "Prefix cache hits",
                    "percentunit",
                    (
                        Query(
                            f"{rate('vllm:prefix_cache_hits_total', ONE_MODEL)} / "
                            f"{rate('vllm:prefix_cache_queries_total', ONE_MODEL)}",
                            "hits",
                        ),
                    ),
                    "The share of the tokens of prompts that need not be read again.",
                    top=1,
                ),
                Chart(
                    "Preemptions",
                    "ops",
                    (Query(rate("vllm:num_preemptions_total", ONE_MODEL), "preemptions"),),
                    "Requests whose cache was taken, to be read again: the KV cache is too small for the load.",
                ),
                Chart(
                    "Memory",
                    "bytes",
                    (
                        Query(largest(f"{OURS}_engine_memory_bytes", ONE_MODEL), "host"),
                        Query(largest(f"{OURS}_engine_gpu_memory_bytes", ONE_MODEL), "GPU"),
                    ),
                    "Of the engine and all its processes. Memory of the host that only grows is a leak: restart it.",
                ),
            ),
        ),
        Row(
            "Restarts and replicas",
            (
                Chart(
                    "Phases of the engine",
                    "short",
                    (Query(f"max by (phase) ({OURS}_engine_phase{{{ONE_MODEL}}}) == 1", "{{phase}}"),),
                    "backoff: it failed, and is tried again later; `./deploy.sh status` has the reason.",
                    Kind.TIMELINE,
                    states=IN_PHASE,
                ),
                Chart(
                    "Restarts",
                    "short",
                    (
                        Query(f"sum({OURS}_engine_restarts_total{{{ONE_MODEL}}})", "restarts"),
                        Query(f"sum({OURS}_engine_hangs_total{{{ONE_MODEL}}})", "because it hung"),
                    ),
                    "Since the keeper began. One that restarts again and again: `./deploy.sh logs MODEL`.",
                ),
                Chart(
                    "When each replica was up",
                    "short",
                    (Query(largest(f"{OURS}_replica_up", ONE_MODEL, by="replica"), "{{replica}}"),),
                    "Down: its health check fails. Of a remote one, look there.",
                    Kind.TIMELINE,
                    states=UP,
                ),
                Chart(
                    "Requests of each replica",
                    "short",
                    (Query(largest(f"{OURS}_replica_in_flight", ONE_MODEL, by="replica"), "{{replica}}"),),
                    "In flight. Far from equal: look at `balancing` and `weight`.",
                ),
                Chart(
                    "Breakers",
                    "short",
                    (Query(largest(f"{OURS}_breaker_state", ONE_MODEL, by="replica"), "{{replica}}"),),
                    "Open: five failures in a row, so that nothing is sent there for some seconds.",
                    Kind.TIMELINE,
                    states=BREAKER,
                ),
            ),
        ),
    ),
    of_one_model=True,
)

GPU_SHARE = f"{OURS}_gpu_memory_used_bytes / {OURS}_gpu_memory_bytes"
GPUS = Dashboard(
    "gpus",
    "GPUs and host",
    "What fills the cards, how warm they are, and what is left of memory and disks.",
    (
        Row(
            "GPUs",
            (
                Chart(
                    "Cards",
                    "bytes",
                    (
                        Query(
                            f"{OURS}_gpu_memory_bytes * on (gpu) group_left (name) {OURS}_gpu_info", "{{gpu}} {{name}}"
                        ),
                    ),
                    "The GPUs of this deployment, and the memory of each.",
                    Kind.BARS,
                ),
                Chart(
                    "Memory in use",
                    "percentunit",
                    (Query(GPU_SHARE, "GPU {{gpu}}"),),
                    "By this deployment and by others. What is asked for: `./deploy.sh plan`.",
                    limits=(0.97, 0.99),
                    top=1,
                ),
                Chart(
                    "Memory of each model",
                    "bytes",
                    (Query(largest(f"{OURS}_engine_gpu_memory_bytes")),),
                    "On all of its cards. `./deploy.sh plan` says what each was given.",
                    stacked=True,
                ),
                Chart(
                    "Utilization",
                    "percentunit",
                    (Query(f"{OURS}_gpu_utilization_ratio", "GPU {{gpu}}"),),
                    "The share of the time in which a kernel ran. Idle cards while requests wait: look at the engine.",
                    top=1,
                ),
                Chart(
                    "Temperature",
                    "celsius",
                    (
                        Query(f"{OURS}_gpu_temperature_celsius", "GPU {{gpu}}"),
                        Query(f"{OURS}_gpu_temperature_limit_celsius", "limit of GPU {{gpu}}"),
                    ),
                    "At its limit a card slows down: look at fans and air.",
                ),
                Chart(
                    "Power",
                    "watt",
                    (Query(f"{OURS}_gpu_power_watts", "GPU {{gpu}}"),),
                    "Little power under load is a card that waits or is slowed down.",
                ),
            ),
        ),
        Row(
            "Host",
            (
                Chart(
                    "CPU cores at work",
                    "short",
                    (
                        Query(
                            rate(f"{OURS}_host_cpu_seconds_total", 'mode!~"idle|iowait|guest.*"', by="mode"),
                            "{{mode}}",
                        ),
                    ),
                    "Cores at work. Where all are, engines wait for the host between their steps.",
                    stacked=True,
                ),
                Chart(
                    "Memory",
                    "bytes",
                    (
                        Query(f"max({OURS}_host_memory_bytes) - max({OURS}_host_memory_available_bytes)", "in use"),
                        Query(f"max({OURS}_host_memory_bytes)", "there is"),
                    ),
                    "When it is full the kernel ends engines: fewer models, or more memory.",
                ),
                Chart(
                    "Memory of each engine",
                    "bytes",
                    (Query(largest(f"{OURS}_engine_memory_bytes")),),
                    "Of the host, with all processes of an engine.",
                    stacked=True,
                ),
                Chart(
                    "Disks in use",
                    "percentunit",
                    (Query(f"1 - {OURS}_disk_free_bytes / {OURS}_disk_bytes", "{{folder}}"),),
                    "models: weights. data: documents, jobs and usage. run: logs. Free some before it is full.",
                    limits=(0.85, 0.95),
                    top=1,
                ),
            ),
        ),
    ),
)

DOCUMENT_SERVICE = Dashboard(
    "documents",
    "Documents",
    "How far behind the reading of documents is, what failed, and why.",
    (
        Row(
            "Now",
            (
                Chart(
                    "Pages waiting",
                    "short",
                    (Query(f"max({DOCUMENTS}_pages_waiting)", "pages"),),
                    "Pages that nobody has read yet.",
                    Kind.STAT,
                ),
                Chart(
                    "Oldest has waited",
                    "s",
                    (Query(f"max({DOCUMENTS}_oldest_waiting_seconds)", "waited"),),
                    "The document that has waited longest: where it grows, pages come faster than they are read.",
                    Kind.STAT,
                    limits=(600, 3600),
                ),
                Chart(
                    "Pages per second",
                    "ops",
                    (Query(f"sum(rate({DOCUMENTS}_pages_done_total[$__rate_interval]))", "pages"),),
                    "Read and good.",
                    Kind.STAT,
                ),
                Chart(
                    "Failed pages",
                    "percentunit",
                    (
                        Query(
                            f"sum(increase({DOCUMENTS}_pages_failed_total[$__range])) / "
                            f"(sum(increase({DOCUMENTS}_pages_failed_total[$__range]))"
                            f" + sum(increase({DOCUMENTS}_pages_done_total[$__range])))",
                            "failed",
                        ),
                    ),
                    "Of all pages in the time shown; the reasons are below.",
                    Kind.STAT,
                    limits=(0.01, 0.05),
                ),
            ),
        ),
        Row(
            "Over time",
            (
                Chart(
                    "Pages waiting",
                    "short",
                    (Query(f"max({DOCUMENTS}_pages_waiting)", "pages"),),
                    "Falls when the model keeps up. documents.max_waiting_pages is where uploads are refused.",
                ),
                Chart(
                    "Pages read",
                    "ops",
                    (
                        Query(f"sum(rate({DOCUMENTS}_pages_done_total[$__rate_interval]))", "read"),
                        Query(f"sum(rate({DOCUMENTS}_page_retries_total[$__rate_interval]))", "asked again"),
                    ),
                    "Many that are asked again: look at why pages fail.",
                ),
                Chart(
                    "Pages that failed, by reason",
                    "ops",
                    (Query(f"sum by (reason) (rate({DOCUMENTS}_pages_failed_total[$__rate_interval]))", "{{reason}}"),),
                    "engine: `./deploy.sh logs ocr`. disk: free some. file: the upload is damaged. The others are the "
                    "model's answers.",
                    stacked=True,
                ),
                Chart(
                    "Time per page",
                    "s",
                    quantiles(f"{DOCUMENTS}_page_seconds", ""),
                    "Of the model, with all its retries.",
                ),
                Chart(
                    "Times of pages",
                    "s",
                    buckets(f"{DOCUMENTS}_page_seconds"),
                    "How many pages took how long.",
                    Kind.HEATMAP,
                ),
                Chart(
                    "Pages that are read at a time",
                    "short",
                    (
                        Query(f"max({DOCUMENTS}_pages_in_flight)", "now"),
                        Query(f"max({DOCUMENTS}_pages_in_flight_limit)", "at most"),
                    ),
                    "At its most while pages wait: the OCR model is the limit; another replica of it would help.",
                ),
                Chart(
                    "Documents finished",
                    "ops",
                    (
                        Query(
                            f"sum by (state) (rate({DOCUMENTS}_finished_total[$__rate_interval]))",
                            "{{state}}",
                        ),
                    ),
                    "failed: GET /api/tasks/ID says why.",
                    stacked=True,
                ),
                Chart(
                    "Documents that are kept",
                    "short",
                    (Query(f"sum by (state) ({DOCUMENTS})", "{{state}}"),),
                    "By state. documents.keep_days and keep_gib say how long.",
                    stacked=True,
                ),
                Chart(
                    "Disk",
                    "bytes",
                    (
                        Query(f"max({DOCUMENTS}_bytes)", "uploads and products"),
                        Query(f"max({DOCUMENTS}_disk_free_bytes)", "free"),
                    ),
                    "On a full disk uploads get 507: lower documents.keep_gib, or free some.",
                ),
            ),
        ),
    ),
)

KEYS = Dashboard(
    "keys",
    "Keys and usage",
    "What each key uses, and which one is about to meet its limit.",
    (
        Row(
            "In the time shown",
            (
                Chart(
                    "Tokens of each key",
                    "short",
                    (Query(f"topk(15, {increase(f'{OURS}_key_tokens_total', by='key')})", "{{key}}"),),
                    "The 15 that used most. By day and model: GET /usage.",
                    Kind.BARS,
                ),
                Chart(
                    "Requests of each key",
                    "short",
                    (Query(f"topk(15, {increase(f'{OURS}_key_requests_total', by='key')})", "{{key}}"),),
                    "The 15 that sent most.",
                    Kind.BARS,
                ),
                Chart(
                    "Limits used",
                    "percentunit",
                    (Query(f"topk(15, max by (key, limit) ({OURS}_key_limit_used_ratio))", "{{key}}, {{limit}}"),),
                    "At 100 % the key gets 429. A larger limit: config/keys.yaml, which is taken up within a second.",
                    Kind.BARS,
                    limits=KEY_LIMITS,
                    top=1,
                ),
                Chart(
                    "Tokens of each model",
                    "short",
                    (Query(increase(f"{OURS}_tokens_total", KNOWN, by="model, kind"), "{{model}}, {{kind}}"),),
                    "prompt: read. completion: written.",
                    Kind.BARS,
                ),
            ),
        ),
        Row(
            "Over time",
            (
                Chart(
                    "Tokens per second",
                    "short",
                    (Query(f"topk(10, {rate(f'{OURS}_key_tokens_total', by='key')})", "{{key}}"),),
                    "Of the ten keys that use most.",
                ),
                Chart(
                    "Requests",
                    "reqps",
                    (Query(f"topk(10, {rate(f'{OURS}_key_requests_total', by='key')})", "{{key}}"),),
                    "Of the ten keys that send most.",
                ),
                Chart(
                    "Limits used",
                    "percentunit",
                    (Query(f"topk(10, max by (key, limit) ({OURS}_key_limit_used_ratio))", "{{key}}, {{limit}}"),),
                    "Keys that come near 100 % will be refused: a larger limit, or a word with who has it.",
                    limits=KEY_LIMITS,
                    top=1,
                ),
            ),
        ),
    ),
)

ROUTER_PROCESS = 'job="vllm-unified",type="router"'
ROUTER = Dashboard(
    "router",
    "Router",
    "The one door: what comes in, what is refused, and what the router itself takes.",
    (
        Row(
            "Requests",
            (
                Chart(
                    "Requests by outcome",
                    "reqps",
                    (Query(rate(f"{OURS}_requests_total", by="code"), "{{code}}"),),
                    "4xx that grow: a client with a wrong key or model. 5xx: see which model on the overview.",
                    stacked=True,
                ),
                Chart(
                    "Requests by path",
                    "reqps",
                    (Query(rate(f"{OURS}_requests_total", by="path"), "{{path}}"),),
                    "What clients call.",
                    stacked=True,
                ),
                Chart(
                    "Errors by owner",
                    "reqps",
                    (Query(rate(f"{OURS}_errors_total", by="owner"), "{{owner}}"),),
                    "Whose each was; x-error-source says so to clients.",
                    stacked=True,
                ),
                Chart(
                    "Retries",
                    "reqps",
                    (Query(rate(f"{OURS}_retries_total")),),
                    "Requests that failed somewhere and were tried again. Steady ones: a replica is ill.",
                ),
                Chart(
                    "Requests in flight",
                    "short",
                    (
                        Query(f"sum({OURS}_in_flight)", "in flight"),
                        Query(f"sum({OURS}_queued)", "waiting for a slot"),
                        Query(f"sum({OURS}_waiting)", "waiting for a model"),
                    ),
                    "Of all models together.",
                ),
                Chart(
                    "Connections",
                    "short",
                    (Query(f"sum({OURS}_connections)", "connections"),),
                    "Of clients. One that only grows: a client that never closes.",
                ),
            ),
        ),
        Row(
            "Itself",
            (
                Chart(
                    "CPU",
                    "percentunit",
                    (Query(f"rate(process_cpu_seconds_total{{{ROUTER_PROCESS}}}[$__rate_interval])", "of one core"),),
                    "Near 100 % of one core it is the limit: share the clients among two deployments.",
                    limits=(0.7, 0.9),
                ),
                Chart(
                    "Memory",
                    "bytes",
                    (Query(f"process_resident_memory_bytes{{{ROUTER_PROCESS}}}", "memory"),),
                    "Grows with large requests in flight, and falls again.",
                ),
                Chart(
                    "Open files",
                    "short",
                    (
                        Query(f"process_open_fds{{{ROUTER_PROCESS}}}", "open"),
                        Query(f"process_max_fds{{{ROUTER_PROCESS}}}", "at most"),
                    ),
                    "Near the most, connections are refused: raise the limit of open files (ulimit -n).",
                ),
                Chart(
                    "Access log lines lost",
                    "ops",
                    (Query(f"sum(rate({OURS}_access_log_dropped_total[$__rate_interval]))", "lost"),),
                    "The disk is too slow or full.",
                ),
                Chart(
                    "What Prometheus reaches",
                    "short",
                    (
                        Query('max by (type) (up{job="vllm-unified",type=~"router|documents"})', "{{type}}"),
                        Query('max by (model) (up{job="vllm-unified",model!=""})'),
                    ),
                    "Down: there are no numbers of it for that time.",
                    Kind.TIMELINE,
                    states=UP,
                ),
                Chart(
                    "Certificates end in",
                    "s",
                    (Query(f"min by (file) ({OURS}_certificate_expiry_timestamp_seconds) - time()", "{{file}}"),),
                    "Put a new one into config/tls in time, then ./deploy.sh reload.",
                    Kind.BARS,
                    limits=(21 * 86400, 7 * 86400),
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, MODEL, GPUS, DOCUMENT_SERVICE, KEYS, ROUTER)
