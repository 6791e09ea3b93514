"""From the settings to the orders of one keeper, and from this process into that keeper."""

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

from vllm_unified.devices import Device
from vllm_unified.engines.command import engine_command
from vllm_unified.engines.memory import Need
from vllm_unified.engines.orders import Orders, ProgressCheck, Seat
from vllm_unified.engines.placement import place_now
from vllm_unified.settings import Model, Settings


def orders_for(settings: Settings, model: Model, environ: Mapping[str, str]) -> Orders:
    """Raises UserError when there is no API key, or when the devices of the model do not exist."""
    environment = settings.environment
    planned = place_now(settings, model)
    placed = planned.of(model.key)
    command = engine_command(settings, placed)
    system = settings.system
    return Orders(
        key=model.key,
        kind=model.type,
        name=model.name,
        home=str(settings.home),
        run=str(settings.run),
        weights=str(settings.folder(model)),
        host=environment.engine_host,
        port=model.port,
        url=settings.engine_url(model),
        api_key=settings.require_api_key(),
        argv=command.argv,
        environment=command.full_environment(environ),
        seats=tuple(Seat(each.handle, each.label, _needed(each, placed.need_of(each))) for each in placed.devices),
        visible_devices=environment.visible_devices,
        devices_file=str(settings.devices_file) if settings.devices_file else None,
        before_us=planned.before(model.key),
        startup_timeout=settings.startup_timeout(model),
        drain_timeout=system.drain_timeout,
        longest_backoff=system.longest_backoff,
        progress=ProgressCheck(
            enabled=system.progress_check,
            interval=system.progress_interval,
            timeout=system.progress_timeout,
            misses=system.progress_misses,
        ),
    )


def _needed(device: Device, need: Need) -> int:
    """Of a GPU no more than vLLM itself insists on: the margin is an estimate, and no reason to hold back a start."""
    return need.total - need.margin if device.kind == "cuda" else need.total


def become_keeper(orders: Orders) -> NoReturn:
    """The same process, so that supervisord keeps its child, without the memory that the settings took."""
    descriptor = os.memfd_create(f"orders-{orders.key}", flags=0)  # no file: the orders hold secrets
    with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
        file.write(orders.to_json())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.execv(  # noqa: S606  (our own interpreter and module)
        sys.executable, [sys.executable, "-m", "vllm_unified.engines.keeper", orders.key, str(descriptor)]
    )
