"""The command behind build_offline_package.sh. What it needs is imported inside: every command reads this file."""

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vllm_unified import __version__
from vllm_unified.errors import UserError
from vllm_unified.hub.commands import HasSettings
from vllm_unified.settings import Model, Settings

if TYPE_CHECKING:
    from vllm_unified.bundle.making import Made, Plan

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SMALLEST_PART = 10**6
# As Docker calls them.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@click.command(hidden=True)
@click.option("--version", default=__version__, show_default=True, help="What the bundle is called.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("dist"), show_default=True, help="Folder for it."
)
@click.option("--models", help="Keys of the models to carry, with commas (default: all that are enabled).")
@click.option("--skip-models", is_flag=True, help="Carry no weights.")
@click.option("--image", help="The image to carry.")
@click.option("--companion", "companions", multiple=True, help="A further image, under its own name.")
@click.option("--profiles", default="", help="What the deployment there shall run beside the models, with commas.")
@click.option("--wheels", type=click.Path(path_type=Path), help="A folder of wheels to carry instead.")
@click.option("--devices", type=click.Choice(["gpu", "cpu"]), required=True, help="What vLLM in it runs on.")
@click.option("--split", metavar="SIZE", help="Largest part, as 4G (default: one file).")
@click.option("--since", type=click.Path(path_type=Path), metavar="FILE", help="SHA256SUMS of an earlier bundle.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, help="Threads (default: all cores).")
@click.option("--no-verify", is_flag=True, help="Do not read the bundle back.")
@click.pass_obj
def bundle(
    project: HasSettings,
    version: str,
    output: Path,
    models: str | None,
    skip_models: bool,
    image: str | None,
    companions: tuple[str, ...],
    profiles: str,
    wheels: Path | None,
    devices: str,
    split: str | None,
    since: Path | None,
    jobs: int,
    no_verify: bool,
) -> None:
    """Make the offline bundle. ./build_offline_package.sh gathers what goes in, and calls this.

    \b
    vllm-unified bundle --devices gpu --image knowflow/vllm-unified:latest --output /media/stick --split 4G
    """
    from vllm_unified.bundle import contents
    from vllm_unified.bundle.images import inspect
    from vllm_unified.bundle.making import Plan, make
    from vllm_unified.bundle.wheels import installed_bytes

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", version):
        raise UserError(f'--version "{version}": letters, digits, dots and dashes, as a tag of an image has them')
    part_bytes = _bytes(split) if split else None
    earlier = contents.read_sums(since) if since else {}
    settings = project.settings()
    chosen = [] if skip_models else _chosen(settings, models)
    if lacking := contents.missing(settings, chosen):
        keys = " ".join(model.key for model in lacking)
        raise UserError(f"no weights of {keys}; fetch them first: ./deploy.sh models download {keys}")
    found = inspect(image, f"{re.sub(':[^:/]*$', '', image)}:{version}") if image else None
    images = [*([found] if found else []), *(inspect(each, each) for each in companions)]
    weights = contents.models(settings, chosen)
    others = contents.program(Path(__file__).resolve().parents[2], native=wheels is not None)
    others += contents.config(settings)
    if wheels:
        others += contents.files_below(wheels, "wheels")
        weights += contents.files_below(settings.home / "models" / "demo", "models/demo")
    about = {
        "BUNDLE_VERSION": version,
        "BUNDLE_RUNTIME": "native" if wheels else "docker",
        "BUNDLE_ARCHITECTURE": found.architecture if found else _architecture(),
        "BUNDLE_DEVICES": devices,
        "BUNDLE_MODEL_BYTES": str(sum(source.size for source in weights)),
        "BUNDLE_IMAGE": found.name if found else "",
        "BUNDLE_COMPANIONS": " ".join(companions),
        "BUNDLE_IMAGE_BYTES": str(sum(each.size for each in images)),
        "BUNDLE_PROFILES": profiles,
        "BUNDLE_PACKAGE_BYTES": str(installed_bytes(wheels) if wheels else 0),
        "BUNDLE_PYTHON": f"{sys.version_info.major}.{sys.version_info.minor}" if wheels else "",
    }
    # The last of those with one place: this deployment's configuration is in that of the shipped one.
    sources = list({source.place: source for source in (*others, *weights)}.values())
    plan = Plan(output.resolve(), version, about, sources, images, earlier, part_bytes, jobs)
    _report(plan, make(plan, not no_verify, click.echo))


def _report(plan: "Plan", made: "Made") -> None:
    from rich.filesize import decimal

    from vllm_unified.bundle.making import FOLDER
    from vllm_unified.hub.progress import duration

    sizes = {path: path.stat().st_size for path in made.parts}
    for path, size in sizes.items():
        click.echo(f"{path}  {decimal(size)}")
    click.echo(f"{decimal(sum(sizes.values()))} in {duration(made.seconds)}; their checksums: {plan.name}.sha256")
    unpack = f"tar xf {plan.name}.tar" if plan.part_bytes is None else f"cat {plan.name}.tar.* | tar x"
    click.echo(f"its fingerprint, to be told by another way than the bundle goes: {made.fingerprint}")
    click.echo(f"There: {unpack} && cd {FOLDER} && ./install.sh")
    click.echo(f"For an increment on it later: --since {made.sums}")


@click.command(hidden=True)
def requirements() -> None:
    """List the Python packages that are installed for vLLM and ourselves, as pip reads them."""
    from vllm_unified.bundle.wheels import requirements as installed

    click.echo("\n".join(installed()))


def _architecture() -> str:
    """Of this machine."""
    return ARCHITECTURES.get(platform.machine(), platform.machine())


def _chosen(settings: Settings, models: str | None) -> list[Model]:
    if models is None:
        return list(settings.engines)
    by_key = {model.key: model for model in settings.all_engines}
    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names:
        raise UserError("--models: names no model; --skip-models carries none")
    for name in names:
        if name not in by_key:
            raise UserError(f'--models: {settings.shown_file} has no model "{name}"; it has: {", ".join(by_key)}')
    return [by_key[name] for name in dict.fromkeys(names)]


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", size.upper())
    found = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if found < SMALLEST_PART:
        raise UserError(f'--split "{size}": a size as 4G or 700M, of 1M at least')
    return found
