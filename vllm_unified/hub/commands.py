"""The commands of `vllm-unified models`. What they need is imported by each: this file is read by every command."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from vllm_unified.errors import UserError
from vllm_unified.settings import Model, Settings

if TYPE_CHECKING:
    from vllm_unified.hub.importing import Brought


class HasSettings(Protocol):
    def settings(self) -> Settings: ...


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.pass_obj
def download(project: HasSettings, names: tuple[str, ...]) -> None:
    """Fetch the models NAME, or all that are missing or broken off. Goes on where it was interrupted.

    What is there already and right stays: a damaged or missing file is fetched alone.

    \b
    vllm-unified models download
    vllm-unified models download chat embedding
    """
    from vllm_unified.hub.download import download as fetch
    from vllm_unified.hub.manifest import State, look

    settings = project.settings()
    models = _models(settings, names)
    if not names:
        states = {model.key: look(settings.folder(model), model).state for model in models}
        models = [model for model in models if states[model.key] in (State.MISSING, State.INCOMPLETE)]
        if not models:
            click.echo("no model is missing")
    _each(models, lambda model: click.echo(fetch(settings, model)))


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--repair", is_flag=True, help="Fetch again what is damaged or missing, and nothing else.")
@click.pass_obj
def verify(project: HasSettings, names: tuple[str, ...], repair: bool) -> None:
    """Read every file of the models NAME, or of all, and compare it with the manifest. Exits with 1 on damage.

    \b
    vllm-unified models verify
    vllm-unified models verify chat --repair
    """
    from rich.filesize import decimal

    from vllm_unified.hub.download import download as fetch
    from vllm_unified.hub.progress import duration
    from vllm_unified.hub.verify import verify as read

    settings = project.settings()

    def check(model: Model) -> None:
        verdict = read(settings, model)
        damage = [f"{model.key}: {path}: {what}" for path, what in verdict.damage.items()]
        if damage and not repair:
            remedy = f"./deploy.sh models verify {model.key} --repair fetches that again"
            raise UserError("\n".join([*damage, remedy]))
        if damage:
            click.echo("\n".join(damage), err=True)
            click.echo(fetch(settings, model, verdict.damage))
            return
        size, seconds = verdict.manifest.size, verdict.seconds
        speed = f"{decimal(int(size / max(seconds, 0.001)))}/s"
        said = f"{len(verdict.manifest.files)} files, {decimal(size)} in {duration(seconds)} ({speed})"
        click.echo(f"{model.key}: {said}, nothing wrong")

    _each(_models(settings, names), check)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="For machines; fields are added, never renamed.")
@click.pass_obj
def list_(project: HasSettings, as_json: bool) -> None:
    """Show each model: its folder, size, and whether it is complete, incomplete, missing or unverified.

    \b
    vllm-unified models list
    vllm-unified models list --json
    """
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    settings = project.settings()
    rows = [_row(settings, model) for model in settings.all_engines]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table("model", "state", "size", "from", "folder", "", box=None, pad_edge=False)
    for row in rows:
        origin = " ".join(filter(None, (row["repo"], (row["revision"] or "")[:12])))
        table.add_row(row["model"], row["state"], decimal(row["bytes"]), origin, row["folder"], row["note"])
    Console(soft_wrap=True).print(table, markup=False)


def _row(settings: Settings, model: Model) -> dict[str, Any]:
    from vllm_unified.hub.folders import size_of_folder
    from vllm_unified.hub.manifest import look

    folder = settings.folder(model)
    found = look(folder, model)
    return {
        "model": model.key,
        "repo": found.manifest.repo if found.manifest else model.repo,
        "revision": found.manifest.revision if found.manifest else None,
        "source": found.manifest.source if found.manifest else None,
        "folder": str(folder),
        "bytes": size_of_folder(folder),
        "state": found.state,
        "note": found.note,
    }


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path), metavar="FOLDER")
@click.argument("name", required=False)
@click.option("--move", is_flag=True, help="Take the files instead of copying them.")
@click.pass_obj
def import_(project: HasSettings, source: Path, name: str | None, move: bool) -> None:
    """Take the model in FOLDER, brought on a stick or of Hugging Face's cache, into the place of the model NAME.

    Every file is compared with the manifest that came with it; where none did, one is made. NAME may be left out where
    FOLDER says which repository it holds, and one model alone is of that.

    \b
    vllm-unified models import /media/stick/models/chat
    vllm-unified models import ~/.cache/huggingface/hub/models--BAAI--bge-m3 embedding
    vllm-unified models import /data/my-model chat --move
    """
    from vllm_unified.hub.importing import bring, look_at

    settings = project.settings()
    brought = look_at(source)
    model = _model(settings, name) if name else _meant(settings, brought)
    click.echo(bring(settings, model, brought, move))


@click.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Ask nothing.")
@click.pass_obj
def remove(project: HasSettings, name: str, force: bool) -> None:
    """Remove the files of the model NAME, after asking. Its entry in the configuration stays.

    \b
    vllm-unified models remove chat
    vllm-unified models remove chat --force
    """
    from rich.filesize import decimal

    from vllm_unified.hub.removal import remove as clear
    from vllm_unified.hub.removal import to_remove

    settings = project.settings()
    model = _model(settings, name)
    manifest = to_remove(settings, model)
    if not force:
        click.echo(f"removes: {len(manifest.files)} files, {decimal(manifest.size)}, in {settings.folder(model)}")
        if not sys.stdin.isatty():
            raise UserError("asks before it removes; say --force where nobody can answer")
        if not click.confirm("Go on?"):
            raise UserError("nothing was removed")
    click.echo(clear(settings, model))


COMMANDS = (download, verify, list_, import_, remove)


def _models(settings: Settings, names: tuple[str, ...]) -> list[Model]:
    return [_model(settings, name) for name in dict.fromkeys(names)] if names else list(settings.engines)


def _model(settings: Settings, name: str) -> Model:
    """Disabled ones too: they may be made ready before they are enabled."""
    by_key = {model.key: model for model in settings.all_engines}
    if name not in by_key:
        known = ", ".join(by_key) or "none"
        raise UserError(f'{settings.shown_file}: no model "{name}" with weights here; there are: {known}')
    return by_key[name]


def _meant(settings: Settings, brought: "Brought") -> Model:
    repo = brought.manifest.repo
    found = [model for model in settings.all_engines if repo and model.repo == repo]
    if len(found) != 1:
        why = f"{len(found)} models are of {repo}" if repo else "it does not say which repository it holds"
        raise UserError(f"{brought.source}: {why}; say which: ./deploy.sh models import {brought.source} NAME")
    return found[0]


def _each(models: list[Model], work: Callable[[Model], None]) -> None:
    """One that fails does not keep the others; all that failed is said, at the end."""
    failures = []
    for model in models:
        try:
            work(model)
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("\n".join(failures))
