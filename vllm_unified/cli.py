"""The command line: prints one line and exits with 1 on a user's error."""

import contextlib
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import click

from vllm_unified import __version__, loopback, state
from vllm_unified.bundle.commands import bundle, requirements
from vllm_unified.errors import ConfigError, UserError
from vllm_unified.hub.commands import COMMANDS as COMMANDS_OF_MODELS
from vllm_unified.logs.lines import end, under_supervisord, write_json
from vllm_unified.settings import Model, Settings, load
from vllm_unified.settings.environment import variable_of
from vllm_unified.state import EngineState, Phase

DEFAULT_CONFIG = "config/models.json"
NOT_RUNNING = 3
LINES_SHOWN = 50
# Beyond what requests in flight are given: for engines to end and keepers to start.
RELOAD_SECONDS = 120
MOVED_ROUTER = "where its port, address or key was changed, ./deploy.sh restart takes that up"


def main() -> None:
    try:
        cli.main(prog_name="vllm-unified", standalone_mode=False)
    except UserError as error:
        sys.exit(str(error))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit(f"vllm-unified: {error}")


class Project:
    """Where things stand: the folder with config/, .env and run/, and the file with the models."""

    def __init__(self) -> None:
        self.home = Path(os.environ.get("VLLM_UNIFIED_HOME") or Path(__file__).resolve().parents[1]).resolve()
        self.config: Path | None = None
        self.environ = dict(os.environ)

    def settings(self) -> Settings:
        return load((self.config or self.home / DEFAULT_CONFIG).resolve(), self.home, self.environ)

    def running_settings(self) -> Settings:
        """Those of the running deployment, whichever file it was started with."""
        started_with = self.home / "run" / "config"
        if self.config is None and started_with.is_file():
            return load(Path(started_with.read_text(encoding="utf-8").strip()), self.home, self.environ)
        return self.settings()


def _take_config(context: click.Context, _option: click.Parameter, value: Path | None) -> None:
    project = context.ensure_object(Project)
    project.config = value or project.config


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="VLLM_UNIFIED_CONFIG",
    metavar="FILE",
    help=f"The file with the models (default {DEFAULT_CONFIG}).",
    callback=_take_config,
    expose_value=False,
)


def _take_devices(context: click.Context, _option: click.Parameter, value: Path | None) -> None:
    if value:
        context.ensure_object(Project).environ[variable_of("devices_file")] = str(value.resolve())


devices_option = click.option(
    "--devices",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A JSON file that stands in for this machine's devices.",
    callback=_take_devices,
    expose_value=False,
)


class _Group(click.Group):
    """Every command takes --config, before its name and behind it."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(config_option(cmd), name)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@config_option
@click.version_option(__version__)
def cli() -> None:
    """Several vLLM servers on one machine, behind one OpenAI-compatible address.

    \b
    vllm-unified check                 is the configuration right?
    vllm-unified check --machine       and can this machine run it now?
    vllm-unified plan                  which model takes how much of which device?
    vllm-unified show chat             the command line that serves the model "chat"
    vllm-unified status --json         what runs, for machines

    Exit codes: 0 done, 1 something is wrong (one line says what), 2 wrong usage, 3 not running or not ready.
    """


@cli.command()
@devices_option
@click.option("--machine", is_flag=True, help="Look at devices, memory, weights and ports too.")
@click.option("--before", type=click.Choice(["fetching", "making"]), hidden=True, help="What comes for the weights.")
@click.pass_obj
def check(project: Project, machine: bool, before: str | None) -> None:
    """Check the configuration, and say everything that is wrong with it."""
    from vllm_unified.settings.keys import FILE, read_keys, unknown_models

    settings = project.settings()
    handles = [handle for model in (*settings.models, *settings.disabled) for handle in (model.key, *model.names)]
    for name in unknown_models(read_keys(project.home), handles):
        click.echo(f'{FILE}: no model is called "{name}"; the keys that name it can\'t use it', err=True)
    if machine:
        from vllm_unified.machine import notes_of_machine, problems_of_machine, to_be_fetched
        from vllm_unified.supervision.ask import programs

        found = programs(settings.run)
        running = None if found is None else [name for name, info in found.items() if info["pid"]]
        coming = {None: (), "fetching": to_be_fetched(settings), "making": settings.engines}[before]
        problems = problems_of_machine(settings, coming=coming, running=running)
        if problems:
            raise ConfigError(problems)
        for note in notes_of_machine(settings):
            click.echo(note)
    click.echo(f"{settings.shown_file}: {_models(len(settings.models))}, nothing wrong")


@cli.command()
@devices_option
@click.argument("name")
@click.pass_obj
def show(project: Project, name: str) -> None:
    """Print the command line of the model NAME, ready to be pasted into a shell."""
    from vllm_unified.engines.command import engine_command
    from vllm_unified.engines.placement import place_now

    settings = project.settings()
    model = _engine(settings, name)
    placed = place_now(settings, model).of(model.key)
    click.echo(engine_command(settings, placed).shown(settings))


@cli.command()
@devices_option
@click.option("--json", "as_json", is_flag=True, help="Sizes in bytes, for machines.")
@click.pass_obj
def plan(project: Project, as_json: bool) -> None:
    """Show how much of which device each model takes; refuse what can't fit."""
    from rich.console import Console

    from vllm_unified.console import plan_json, plan_table, print_json

    settings = project.settings()
    planned = _planned(settings)
    if as_json:
        print_json(plan_json(planned))
    elif not planned.placed:
        click.echo(f"{settings.shown_file}: nothing is served on this machine, all by endpoints")
    else:
        Console(soft_wrap=True).print(plan_table(planned))


@cli.command()
@click.pass_obj
def render(project: Project) -> None:
    """Write run/supervisord.conf, run/placement.json and run/rendered from the configuration."""
    from vllm_unified.engines.placement import placement_text
    from vllm_unified.supervision.conf import supervisord_conf
    from vllm_unified.supervision.rendered import rendered_files, write_rendered

    settings = project.settings()
    text = supervisord_conf(settings)
    placement = placement_text(_planned(settings).places)
    files = rendered_files(settings)
    (settings.run / "logs").mkdir(parents=True, exist_ok=True)
    (settings.run / "supervisord.conf").write_text(text, encoding="utf-8")
    (settings.run / "placement.json").write_text(placement, encoding="utf-8")
    (settings.run / "config").write_text(f"{settings.file}\n", encoding="utf-8")
    write_rendered(settings, files)
    click.echo(f"wrote {settings.run / 'supervisord.conf'}")


@cli.command()
@click.pass_obj
def engines(project: Project) -> None:
    """Print the keys of the models that are served on this machine, one a line."""
    for model in project.settings().engines:
        click.echo(model.key)


@cli.command()
@click.pass_obj
def init(project: Project) -> None:
    """Put a random API key into .env (mode 0600), unless one is set."""
    from vllm_unified.settings.environment import ensure_api_key

    made = ensure_api_key(project.home, os.environ)
    click.echo(f"{project.home / '.env'}: {'made an API key' if made else 'has its API key already'}")


@cli.command()
@click.argument("name")
@click.pass_obj
def engine(project: Project, name: str) -> None:
    """Keep the server of the model NAME running, until SIGTERM. supervisord runs this."""
    from vllm_unified.engines.handover import become_keeper, orders_for

    with _service("keeper", name):
        try:
            settings = project.settings()
            orders = orders_for(settings, _engine(settings, name), project.environ)
        except UserError as error:
            if under_supervisord():  # which gave us the name that it was rendered with
                _say_why_there_is_no_keeper(project.home / "run", name, str(error))
            raise
        become_keeper(orders)


@cli.command()
@click.pass_obj
def router(project: Project) -> None:
    """Serve the router, until SIGTERM. supervisord runs this."""
    from vllm_unified.operations import Operations
    from vllm_unified.router.app import create_app
    from vllm_unified.router.serving import Router, run

    with _service("router"):
        settings = project.settings()
        serving = Router(settings)
        serving.app = create_app(serving, Operations(settings.file, settings.home, project.environ))
        run(serving)


@cli.command()
@click.pass_obj
def documents(project: Project) -> None:
    """Serve the documents' API behind the router, until SIGTERM. supervisord runs this."""
    from vllm_unified.documents.app import serve

    with _service("documents"):
        serve(project.settings())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For machines; fields are added, never renamed.")
@click.option("--watch", "watched", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@click.option("--container", "containers", multiple=True, hidden=True, metavar="NAME=STATE", help="Beside this one.")
@click.pass_obj
def status(project: Project, as_json: bool, watched: bool, containers: tuple[str, ...]) -> None:
    """Show what runs. Exits with 0 when every required model is ready, else with 3."""
    from rich.console import Console

    from vllm_unified.console import Status, print_json, watch

    if watched and as_json:
        raise click.UsageError("--watch is for people, --json for machines; ask for the JSON as often as you need it")
    settings = project.running_settings()
    beside = {name: state for name, _, state in (each.partition("=") for each in containers) if state}
    if watched:
        watch(settings, beside)
    now = Status.now(settings, beside)
    if as_json:
        print_json(now.document())
    else:
        Console().print(now.text())
    sys.exit(0 if now.ready else NOT_RUNNING)


@cli.command()
@click.option("--ready", is_flag=True, help="Ask only for the required models, as a container's health check does.")
@click.pass_obj
def health(project: Project, ready: bool) -> None:
    """Print the router's own report. Exits with 0 when every model is healthy, else with 3."""
    url = f"{project.running_settings().router_url}/{'ready' if ready else 'health'}"
    try:
        code, report = loopback.get(url, timeout=10)
    except OSError as error:
        click.echo(f"{url}: {getattr(error, 'reason', error)}; is it running? ./deploy.sh status", err=True)
        sys.exit(NOT_RUNNING)
    click.echo(report)
    sys.exit(0 if code == 200 else NOT_RUNNING)


def _take_since(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """Seconds since 1970."""
    if value is None:
        return None
    try:
        if found := re.fullmatch(r"(\d{1,6})([smhd])", value):
            unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[found[2]]
            return (datetime.now(UTC) - timedelta(**{unit: int(found[1])})).timestamp()
        return datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError):
        raise click.BadParameter(f'"{value}" is neither 30s, 10m, 2h or 3d nor a moment as 2026-11-22T15:00') from None


@cli.command()
@click.argument("names", nargs=-1, metavar="[MODEL|router|documents]...")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--lines", type=click.IntRange(min=0), metavar="N", help="The last N (default 50, with --since all).")
@click.option("--errors", is_flag=True, help="Only errors, and requests that failed by no fault of their clients.")
@click.option("--since", metavar="WHEN", callback=_take_since, help="30s, 10m, 2h, 3d, or a moment.")
@click.option("--json", "as_json", is_flag=True, help="The lines as they are, for machines.")
@click.pass_obj
def logs(
    project: Project,
    names: tuple[str, ...],
    follow: bool,
    lines: int | None,
    errors: bool,
    since: float | None,
    as_json: bool,
) -> None:
    """Show what all programs wrote, or those named, in the order of time.

    \b
    vllm-unified logs --errors --since 2h
    vllm-unified logs chat router --follow
    vllm-unified logs documents --since 2026-11-22T15:00 --json
    """
    from vllm_unified.logs import shown
    from vllm_unified.logs.files import Entry, Logs

    if lines is None and since is None:
        lines = LINES_SHOWN
    colour = sys.stdout.isatty()
    folder = project.home / "run" / "logs"
    with contextlib.closing(Logs(folder, names, since=since, lines=lines, errors=errors)) as found:

        def show(entries: Iterable[Entry]) -> None:
            now = datetime.now().astimezone()
            for entry in entries:
                print(shown.json(entry) if as_json else shown.text(entry, found.width, now, colour=colour))
            sys.stdout.flush()

        show(found.so_far())
        if follow:
            for entries in found.on():
                show(entries)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For machines; fields are added, never renamed.")
@click.pass_obj
def selftest(project: Project, as_json: bool) -> None:
    """Ask every model golden questions through the router. Exits with 0 when all is right, 1 when not, 3 when it does
    not run.
    """
    from rich.console import Console

    from vllm_unified import selftest as golden
    from vllm_unified.console import print_json

    settings = project.running_settings()
    try:
        outcomes = list(golden.run(settings, settings.require_api_key()))
    except OSError as error:
        click.echo(f"{settings.router_url}: {error}; is it running? ./deploy.sh status", err=True)
        sys.exit(NOT_RUNNING)
    if as_json:
        print_json(golden.document(outcomes))
    else:
        Console(soft_wrap=True).print(golden.table(outcomes))
    sys.exit(0 if golden.passed(outcomes) else 1)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For machines; fields are added, never renamed.")
@click.option("--restarted", hidden=True, metavar="KEY", help="An engine that was started with the new file already.")
@click.pass_obj
def reload(project: Project, as_json: bool, restarted: str | None) -> None:
    """Let the running deployment take up what changed in the configuration, and say what waits for a restart."""
    from vllm_unified.console import print_json, reload_text
    from vllm_unified.settings.changes import RESTART_ALL
    from vllm_unified.supervision.ask import programs
    from vllm_unified.supervision.rendered import rendered_files, write_rendered

    settings = project.running_settings()
    if programs(settings.run) is None:
        click.echo("not running; start it with ./deploy.sh start", err=True)
        sys.exit(NOT_RUNNING)
    api_key = settings.require_api_key()
    files = rendered_files(settings)  # so that nothing is taken up where they can't be
    url = f"{settings.router_url}/admin/reload"
    patience = settings.system.drain_timeout + RELOAD_SECONDS
    try:
        code, said = loopback.post(url, {"restarted": [restarted] if restarted else []}, api_key, patience)
    except OSError as error:
        raise UserError(f"{url}: {error}; {MOVED_ROUTER}") from None
    if code != HTTPStatus.OK:
        raise UserError(_refusal(code, said))
    document = json.loads(said)
    if as_json:
        print_json(document)
    elif any(document.values()) or not restarted:
        click.echo(reload_text(document))
    # What waits for a restart of all, as another port does, must not reach nginx before the router.
    if all(each["command"] != RESTART_ALL for each in document["restart"]):
        write_rendered(settings, files)


def _refusal(code: int, said: str) -> str:
    """The router's own words, and what to do where they are of a key that is not the one it was started with."""
    if code == HTTPStatus.UNAUTHORIZED:
        return f"the router refuses the key; {MOVED_ROUTER}"
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the router answers {code}: {said[:200]}"


@cli.command()
@click.option(
    "--hours", type=click.FloatRange(min=0.1, max=24 * 366), default=6.0, show_default=True, help="The last ones."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="vllm-unified-report.html",
    show_default=True,
    metavar="FILE",
    help="A page as FILE.html, with every chart; or a picture as FILE.png, of the overview.",
)
@click.option("--prometheus", "url", metavar="URL", help="Where it is (default http://127.0.0.1:VLLM_PROMETHEUS_PORT).")
@click.option("--stream", is_flag=True, hidden=True, help="To standard output, in the form that FILE names.")
@click.pass_obj
def report(project: Project, hours: float, output: Path, url: str | None, stream: bool) -> None:
    """Draw the charts of the last hours, as Grafana shows them. Exits with 3 where no Prometheus answers.

    \b
    vllm-unified report                                    a page, of the last six hours
    vllm-unified report --hours 24 --output day.html
    vllm-unified report --output now.png --hours 1
    """
    if output.suffix not in (".html", ".png"):
        raise click.UsageError(f"--output {output}: say FILE.html for a page or FILE.png for a picture")
    from vllm_unified.monitoring.history import history
    from vllm_unified.monitoring.prometheus import NoAnswerError, Prometheus, Span
    from vllm_unified.monitoring.report import page, picture

    end = time.time()
    url = url or project.running_settings().prometheus_url
    try:
        with Prometheus(url, Span(end - hours * 3600, end)) as prometheus:
            seen = history(prometheus, whole=output.suffix == ".html")
    except NoAnswerError as error:
        click.echo(f"{error}; COMPOSE_PROFILES=monitoring in .env turns it on, with ./deploy.sh restart", err=True)
        sys.exit(NOT_RUNNING)
    content = page(seen).encode() if output.suffix == ".html" else picture(seen)
    if stream:
        sys.stdout.buffer.write(content)
    else:
        output.write_bytes(content)
        click.echo(f"wrote {output}")


@cli.command()
@click.argument("name", required=False)
@click.option("--timeout", type=click.FloatRange(min=1), default=1800.0, show_default=True, help="Seconds.")
@click.pass_obj
def wait(project: Project, name: str | None, timeout: float) -> None:
    """Show the models' progress until every required one is ready, or the one of NAME."""
    from vllm_unified.console import wait_until_ready
    from vllm_unified.supervision.ask import programs

    settings = project.running_settings()
    if name:
        settings = replace(settings, models=(_engine(settings, name).model_copy(update={"required": True}),))
    deadline = time.monotonic() + timeout
    failure = wait_until_ready(settings, timeout, is_running=lambda: programs(settings.run) is not None)
    if failure is None and not name:
        failure = _wait_for_router(settings, deadline)
    if failure:
        raise UserError(f"not ready: {failure}")


def _wait_for_router(settings: Settings, deadline: float) -> str | None:
    """The router looks at its engines every few seconds; clients are told to come only when it knows."""
    while True:
        try:
            code, said = loopback.get(f"{settings.router_url}/ready", timeout=5)
        except OSError as error:
            code, said = 0, str(error)
        if code == 200:
            return None
        if time.monotonic() > deadline:
            return f"the router: {said}; run/logs/router.log says more"
        time.sleep(0.3)


@cli.command()
@click.pass_obj
def welcome(project: Project) -> None:
    """Print the addresses, the key, and a request that works as pasted."""
    from vllm_unified.console import welcome_text

    click.echo(welcome_text(project.running_settings()))


@cli.group(cls=_Group)
def keys() -> None:
    """API keys beside the deployment's own, in config/keys.yaml; the router takes up a change within a second.

    \b
    vllm-unified keys create alice --model chat --requests-per-minute 60
    vllm-unified keys list
    vllm-unified keys revoke alice
    """


@keys.command()
@click.argument("name")
@click.option("--model", "models", multiple=True, metavar="M", help="A model that it may use; say it again for more.")
@click.option("--requests-per-minute", type=click.IntRange(min=1), metavar="N")
@click.option("--tokens-per-minute", type=click.IntRange(min=1), metavar="N")
@click.option("--max-concurrent", type=click.IntRange(min=1), metavar="N", help="Requests at the same time.")
@click.option("--tokens-per-day", type=click.IntRange(min=1), metavar="N", help="Days of UTC.")
@click.option("--tokens-per-month", type=click.IntRange(min=1), metavar="N", help="Calendar months of UTC.")
@click.option("--expires", metavar="DATE", help="Its last day (UTC), as 2026-12-31, or moment: 2026-12-31T18:00:00Z.")
@click.option("--priority", type=int, metavar="N", help="Where requests wait the highest goes first (default 0).")
@click.option("--admin", is_flag=True, help="It sees the usage of every key.")
@click.pass_obj
def create(project: Project, /, name: str, models: tuple[str, ...], **given: Any) -> None:
    """Make a key for NAME and print its value, once. Without options it may use everything.

    \b
    vllm-unified keys create alice
    vllm-unified keys create bob --model chat --tokens-per-day 1000000 --expires 2026-12-31
    KEY=$(vllm-unified keys create nightly-indexer --model embedding --priority -10)
    """
    from vllm_unified.settings.keys import add_key, new_key

    if models:
        _require_models(project.settings(), models)
    value, hashed = new_key()
    said = {field: what for field, what in given.items() if what not in (None, False)}
    fields = {"name": name, "hash": hashed, **({"models": list(models)} if models else {}), **said}
    add_key(project.home, {**fields, "created": datetime.now(UTC).replace(microsecond=0)})
    click.echo("keep it now: it is stored nowhere, only its hash is", err=True)
    click.echo(value)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="For machines; fields are added, never renamed.")
@click.pass_obj
def list_(project: Project, as_json: bool) -> None:
    """Show the keys: models, limits, expiry, and the tokens of today and of this month (UTC).

    \b
    vllm-unified keys list
    vllm-unified keys list --json
    """
    from rich.console import Console

    from vllm_unified.console import keys_json, keys_table, print_json
    from vllm_unified.router.usage import FILE, recorded_tokens
    from vllm_unified.settings.keys import read_keys

    entries = read_keys(project.home)
    now = datetime.now(UTC)
    usage = project.home / FILE
    try:
        today, month = (recorded_tokens(usage, day) for day in (now.date(), now.date().replace(day=1)))
    except sqlite3.Error as error:
        raise UserError(f"{usage}: {error}") from None
    if as_json:
        print_json(keys_json(entries, today, month, now))
    else:
        Console(soft_wrap=True).print(keys_table(entries, today, month, now))


@keys.command()
@click.argument("name")
@click.pass_obj
def revoke(project: Project, name: str) -> None:
    """Take the key NAME out of the file. Its requests in flight end, new ones get 401.

    \b
    vllm-unified keys revoke alice
    """
    from vllm_unified.settings.keys import remove_key

    remove_key(project.home, name)
    click.echo(f"{name} is revoked; a running router takes it up within a second")


@cli.group(cls=_Group)
def models() -> None:
    """The weights: from Hugging Face or ModelScope, or brought on a stick; verified, listed, removed.

    \b
    vllm-unified models download            all that are missing
    vllm-unified models verify chat
    vllm-unified models list
    vllm-unified models import /media/stick/models/chat
    vllm-unified models remove chat
    """


for command in COMMANDS_OF_MODELS:
    models.add_command(command)
for command in (bundle, requirements):
    cli.add_command(command)


project_option = click.option(
    "--project", "project_folder", type=click.Path(path_type=Path), hidden=True, help="Where config/ and .env are."
)


@cli.command()
@click.option("--with-models", is_flag=True, help="With the weights.")
@project_option
@click.pass_obj
def backup(project: Project, with_models: bool, project_folder: Path | None) -> None:
    """Write configuration, .env, keys, jobs and usage to standard output. ./deploy.sh backup puts that into a file."""
    from vllm_unified.backup import Places, write

    if sys.stdout.isatty():
        raise UserError("a backup is no text: ./deploy.sh backup FILE puts it into a file")
    write(Places(project_folder or project.home, project.home), sys.stdout.buffer, with_models=with_models)


@cli.command()
@project_option
@click.pass_obj
def restore(project: Project, project_folder: Path | None) -> None:
    """Put a backup, from standard input, into its place. ./deploy.sh restore FILE does so, and asks before."""
    from vllm_unified import backup as archive

    click.echo(archive.restore(archive.Places(project_folder or project.home, project.home), sys.stdin.buffer))


def _require_models(settings: Settings, names: Sequence[str]) -> None:
    known = {each for model in settings.models for each in (model.key, *model.names)}
    for name in names:
        if name not in known:
            raise UserError(f'{settings.shown_file}: no model "{name}"; there are {", ".join(sorted(known))}')


def _planned(settings: Settings) -> Any:
    from vllm_unified.engines.placement import plan_now
    from vllm_unified.supervision.ask import programs

    return plan_now(settings, running=programs(settings.run) is not None)


def _model(settings: Settings, name: str) -> Model:
    """`name` is a key, or else a name that clients use: what is one model's key may be another's alias."""
    by_name = {each: model for model in settings.models for each in model.names}
    model = settings.model(name) or by_name.get(name)
    if model is None and name in [disabled.key for disabled in settings.disabled]:
        raise UserError(f"{settings.shown_file}: models.{name} is disabled; enable it, and ./deploy.sh reload")
    if model is None:
        keys = ", ".join(model.key for model in settings.models)
        raise UserError(f'{settings.shown_file}: no model "{name}"; there are {keys}')
    return model


def _engine(settings: Settings, name: str) -> Model:
    model = _model(settings, name)
    if not model.served_here:
        raise UserError(f"{settings.shown_file}: models.{model.key}: no engine here serves it, its endpoints do")
    return model


def _say_why_there_is_no_keeper(run: Path, key: str, reason: str) -> None:
    """What a killed keeper left written stays: the next one has to find the engine that it left behind."""
    before = state.read_as_written(run, key) or EngineState(key, Phase.STOPPED, time.monotonic())
    replace(before, phase=Phase.STOPPED, since=time.monotonic(), keeper=None, reason=reason).write(run)


@contextlib.contextmanager
def _service(source: str, model: str | None = None) -> Iterator[None]:
    """It writes lines of JSON, and ends with supervisord."""
    if under_supervisord():
        from vllm_unified.engines.processes import die_with_parent

        die_with_parent()
    write_json(source, model)
    try:
        yield
    except UserError as error:
        end(str(error))


def _models(count: int) -> str:
    return f"{count} model{'s' if count != 1 else ''}"
