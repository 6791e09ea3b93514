"""Gateways side by side, in front of the same engine without a model. Prints Markdown and, with --json, writes data.

Rounds are interleaved, medians count, and of the figures only their ratios within this run. Run it with nothing else
on the machine.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.demo import API_KEY
from benchmarks.router import gateways, measures, report, requests
from benchmarks.router.gateways import GATEWAYS, Gateway
from benchmarks.router.measures import FULL, QUICK, Clients, Figures, Sizes
from benchmarks.router.programs import BenchmarkError, Programs, Server, compiled, free_ports, serving

ENGINE = "engine itself"
ENGINE_PORTS = 64
OPEN_FILES = 16384
ENDING = (signal.SIGINT, signal.SIGTERM)
# Requests that clients send in turn, where models or keys are many.
DISTINCT = 64
# Of ours alone: name → models, keys.
VARIANTS = {"4 models": (4, 1), "64 models": (64, 1), "10,000 keys": (4, 10_000)}
VARIED = f"ours with {', '.join(VARIANTS)}"


@contextlib.contextmanager
def engine(programs: Programs) -> Iterator[tuple[Sequence[int], Server]]:
    ports = free_ports(ENGINE_PORTS)
    with _folder() as folder:
        is_ready = lambda: gateways.answers(ports[-1], requests.chat(API_KEY))  # noqa: E731
        with serving([programs.engine, *map(str, ports)], {}, folder / "log", is_ready) as server:
            yield ports, server


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vllm-unified-benchmark-") as name:
        yield Path(name)


def one(programs: Programs, name: str, sizes: Sizes) -> Figures:
    """Everything of one gateway, started for it."""
    with engine(programs) as (ports, server):
        if name == ENGINE:
            return measures.everything(programs, Gateway(ports[0], API_KEY, server), sizes)
        with _folder() as folder, gateways.running(GATEWAYS[name](folder, ports), folder) as gateway:
            return measures.everything(programs, gateway, sizes)


def variants(programs: Programs, sizes: Sizes) -> dict[str, Figures]:
    """Requests per second through ours with few and with many models and keys."""
    return {
        name: _variant(programs, models, min(keys, sizes.most_keys), sizes) for name, (models, keys) in VARIANTS.items()
    }


def _variant(programs: Programs, model_count: int, key_count: int, sizes: Sizes) -> Figures:
    models = [f"model-{number}" for number in range(model_count)]
    with engine(programs) as (ports, _), _folder() as folder:
        command = gateways.ours(folder, ports, models, key_count)
        with gateways.running(command, folder, models) as gateway:
            clients = [gateways.client_key(number) for number in range(min(key_count, DISTINCT))]
            if gateway.key == API_KEY:  # this router reads no keys.yaml
                if key_count > 1:
                    return {}
                clients = [API_KEY]
            pairs = itertools.islice(zip(itertools.cycle(clients), itertools.cycle(models), strict=True), DISTINCT)
            wire = [requests.chat(key, model) for key, model in pairs]
            return measures.rate(Clients(programs.load, gateway.port), wire, sizes)


def memory(programs: Programs, sizes: Sizes) -> list[dict[str, float]]:
    with (
        engine(programs) as (ports, _),
        _folder() as folder,
        gateways.running(gateways.ours(folder, ports), folder) as gateway,
    ):
        return measures.memory(Clients(programs.load, gateway.port), gateway, sizes)


def compare(programs: Programs, names: Sequence[str], count: int, sizes: Sizes) -> dict[str, Any]:
    """What fails is left out of all rounds, and of the tables."""
    measured: dict[str, Callable[[], Any]] = {name: partial(one, programs, name, sizes) for name in names}
    if "ours" in names:
        measured[VARIED] = partial(variants, programs, sizes)
    rounds: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for number in range(1, count + 1):
        rounds.append({})
        for name in [each for each in measured if each not in failed]:
            say(f"round {number} of {count}: {name}")
            try:
                rounds[-1][name] = measured[name]()
            except BenchmarkError as error:
                failed[name] = str(error)
                say(f"left out: {error}")
    complete = [{name: each[name] for name in each if name not in failed} for each in rounds]
    varied = [each.pop(VARIED) for each in complete if VARIED in each]
    return {"rounds": complete, "variants": varied, "failed": failed}


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def versions(names: Sequence[str]) -> dict[str, str]:
    return {name: gateways.version(name) for name in names if name != ENGINE}


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def allow_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def arguments() -> argparse.Namespace:
    names = [ENGINE.split()[0], *GATEWAYS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.router",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: .venv/bin/python -m benchmarks.router --rounds 5 --only ours,nginx --json router.json",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=lambda said: said.split(","), default=names, metavar=",".join(names))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there")
    parser.add_argument("--quick", action="store_true", help="small and short: whether it works, not how fast it is")
    parser.add_argument(
        "--memory", action="store_true", help="a million requests through ours, and its memory meanwhile"
    )
    options = parser.parse_args()
    for name in options.only:
        if name not in names:
            parser.error(f'--only: no "{name}"; there are {", ".join(names)}')
    options.only = [ENGINE if name == names[0] else name for name in options.only]
    return options


def end(number: int, _frame: object) -> None:
    """Once: a second signal, as `timeout` sends it, would interrupt the ending of what was started."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    options = arguments()
    sizes = QUICK if options.quick else FULL
    for number in ENDING:
        signal.signal(number, end)
    allow_open_files()
    try:
        with compiled() as programs:
            if options.memory:
                measured: Any = memory(programs, sizes)
                print(report.memory(measured))
            else:
                about = {"machine": machine(), "versions": versions(options.only)}
                measured = {**about, **compare(programs, options.only, options.rounds, sizes)}
                print(report.tables(measured))
        if options.quick:
            say("--quick: sizes are smaller than the columns say, and the figures mean nothing")
    except BenchmarkError as error:
        sys.exit(f"benchmarks.router: {error}")
    if options.json:
        options.json.write_text(json.dumps(measured, indent=2) + "\n")
    if not options.memory and measured["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
