"""Which model runs on which devices, and whether it fits: computed before anything starts."""

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_unified import state
from vllm_unified.devices import Device, read_devices
from vllm_unified.engines.memory import Need, Needs, needs
from vllm_unified.engines.refusal import refusal
from vllm_unified.errors import ConfigError, Problem
from vllm_unified.settings import Model, Settings
from vllm_unified.state import Phase

# How many places are tried before it counts as impossible: well under a second.
SEARCH_STEPS = 4000
# For each change that a refusal might offer; one that is not found in so many is not offered.
CHECK_STEPS = 300
HOLDING_MEMORY = (Phase.STARTING, Phase.READY, Phase.DRAINING, Phase.STOPPING)


@dataclass(frozen=True)
class Placed:
    """A model on its devices, what it asks of each, and the share for its command line (None: vLLM's default)."""

    model: Model
    devices: tuple[Device, ...]
    needs: tuple[Need, ...]
    share: float | None

    def need_of(self, device: Device) -> Need:
        return self.needs[self.devices.index(device)]


@dataclass(frozen=True)
class Plan:
    """`placed` in the order of models.json, `order` that of starting, as keys."""

    devices: tuple[Device, ...]
    placed: tuple[Placed, ...]
    order: tuple[str, ...]

    def of(self, key: str) -> Placed:
        return next(placed for placed in self.placed if placed.model.key == key)

    def on(self, device: Device) -> list[Placed]:
        return [placed for placed in self.placed if device in placed.devices]

    def asked_of(self, device: Device) -> int:
        return sum(placed.need_of(device).total for placed in self.on(device))

    def left_on(self, device: Device) -> int:
        return device.free_bytes - self.asked_of(device)

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """Key → the handles of its devices."""
        return {placed.model.key: tuple(device.handle for device in placed.devices) for placed in self.placed}

    @property
    def fits(self) -> bool:
        enough = all(self.left_on(device) >= 0 for device in self.devices)
        return enough and all(need.cache >= 0 for placed in self.placed for need in placed.needs)

    def before(self, key: str) -> tuple[str, ...]:
        """Those that share a device with it and start earlier."""
        own = set(self.of(key).devices)
        earlier = self.order[: self.order.index(key)]
        return tuple(other for other in earlier if own.intersection(self.of(other).devices))


Recorded = Mapping[str, Sequence[str]]  # key → handles of the devices that an earlier plan chose


def plan(settings: Settings, devices: Sequence[Device], recorded: Recorded | None = None) -> Plan:
    """Raises ConfigError when a model's devices do not exist or have no room for what is asked of them.

    The room of a device is its free memory. A model without `gpus` stays where `recorded` says while that exists.
    """
    missing = [problem for model in settings.engines if (problem := _missing_devices(settings, model, devices))]
    if missing:
        raise ConfigError(missing)
    result = _planned(settings, devices, recorded or {}, SEARCH_STEPS)
    if not result.fits:
        raise refusal(settings, result, lambda changed: _replanned(changed, devices, recorded or {}))
    return result


def place_now(settings: Settings, model: Model) -> Plan:
    """For the keeper of one model, which waits for memory itself: nothing is refused but what it can't run on.

    A change to another model, which that one has not taken up yet, must not keep this one from coming back.
    """
    present = read_devices(settings.environment.visible_devices, settings.devices_file)
    devices = [replace(each, free_bytes=each.total_bytes) for each in present]
    missing = {each.key: problem for each in settings.engines if (problem := _missing_devices(settings, each, devices))}
    if model.key in missing:
        raise ConfigError([missing[model.key]])
    possible = tuple(each for each in settings.engines if each.key not in missing)
    return _planned(replace(settings, models=possible), devices, recorded(settings), SEARCH_STEPS)


def plan_now(settings: Settings, *, running: bool) -> Plan:
    """On the devices as they are. Models that run stay where they are, and their memory counts as ours."""
    if not settings.engines:
        return Plan((), (), ())
    if running:
        return plan_beside(settings, recorded(settings))
    return plan(settings, read_devices(settings.environment.visible_devices, settings.devices_file))


def plan_beside(settings: Settings, seated: Recorded) -> Plan:
    """`plan_now` beside a running deployment, of whose models those in `seated` stay where that says."""
    devices = read_devices(settings.environment.visible_devices, settings.devices_file)
    up = [each.key for each in settings.all_engines if state.read(settings.run, each.key).phase in HOLDING_MEMORY]
    return plan(settings, with_ours_free(settings, devices, seated, up), seated)


def recorded(settings: Settings) -> dict[str, tuple[str, ...]]:
    """What `placement_text` left in run/placement.json; empty when there is nothing."""
    try:
        document = json.loads((settings.run / "placement.json").read_text(encoding="utf-8"))
        return {str(key): tuple(map(str, handles)) for key, handles in document.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def placement_text(places: Recorded) -> str:
    """run/placement.json: the devices of each model, for all who plan while it runs."""
    return json.dumps(dict(places)) + "\n"


def with_ours_free(
    settings: Settings, devices: Sequence[Device], recorded: Recorded, up: Collection[str]
) -> list[Device]:
    """The devices as if the engines in `up` did not run: what they were planned to take is free again.

    A disabled one among them is about to end.
    """
    ours = dict.fromkeys(devices, 0)
    for model in settings.all_engines:
        on = _recorded_devices(model, devices, recorded) if model.key in up else None
        for device, need in zip(on, needs(settings, model, on).each, strict=True) if on else ():
            ours[device] += need.total
    return [replace(each, free_bytes=min(each.total_bytes, each.free_bytes + ours[each])) for each in devices]


def _missing_devices(settings: Settings, model: Model, devices: Sequence[Device]) -> Problem | None:
    place = f"models.{model.key}"
    numbered = _are_numbered(devices)
    kind = "GPU" if devices[0].kind == "cuda" else "CPU"
    if model.devices_needed > len(devices):
        have = f"{len(devices)} {kind}{'s' if len(devices) > 1 else ''}" if numbered else "no NVIDIA GPU"
        return Problem(settings.shown_file, place, f"needs {_ranks(model)}, this machine has {have}")
    if model.gpus and numbered and max(model.gpus) >= len(devices):
        message = f"there is no {kind} {max(model.gpus)}; this machine has {len(devices)}, numbered from 0"
        return Problem(settings.shown_file, f"{place}.gpus", message)
    meant = [devices[index] for index in model.gpus] if model.gpus and numbered else devices
    whole = [device for device in meant if not device.is_mig_part]
    if model.devices_needed > max(1, len(whole)):
        message = (
            f"needs {_ranks(model)}, and a model can use no more than one MIG instance (CUDA shows a process only "
            f"one); set tensor_parallel_size and pipeline_parallel_size to 1, or use GPUs that are not in MIG mode"
        )
        return Problem(settings.shown_file, place, message)
    return None


def _are_numbered(devices: Sequence[Device]) -> bool:
    """Whether `gpus` means these: a machine's only CPU serves models that were meant for GPUs."""
    return devices[0].kind == "cuda" or len(devices) > 1


def _ranks(model: Model) -> str:
    return (
        f"{model.devices_needed} GPUs (tensor_parallel_size {model.tensor_parallel_size} × "
        f"pipeline_parallel_size {model.pipeline_parallel_size})"
    )


def _replanned(settings: Settings, devices: Sequence[Device], recorded: Recorded) -> Plan | None:
    if any(_missing_devices(settings, model, devices) for model in settings.engines):
        return None
    return _planned(settings, devices, recorded, CHECK_STEPS)


def _planned(settings: Settings, devices: Sequence[Device], recorded: Recorded, steps: int) -> Plan:
    seats = _Seats(settings, devices, steps)
    open_ones = []
    for model in settings.engines:
        on = _given_devices(model, devices) or _recorded_devices(model, devices, recorded)
        if on:
            seats.take(model, on)
        else:
            open_ones.append(model)
    # Large ones find room only while there is much.
    open_ones.sort(key=lambda model: -sum(need.total for need in seats.first_needs(model)))
    if not seats.find(open_ones):
        seats.overfill(open_ones)
    by_priority = sorted(settings.engines, key=lambda model: -model.priority)
    placed = (seats.placed[model.key] for model in settings.engines)
    return Plan(tuple(devices), tuple(placed), tuple(model.key for model in by_priority))


def _given_devices(model: Model, devices: Sequence[Device]) -> tuple[Device, ...] | None:
    if model.gpus is None or not _are_numbered(devices):
        return None
    return tuple(devices[index] for index in model.gpus)


def _recorded_devices(model: Model, devices: Sequence[Device], recorded: Recorded) -> tuple[Device, ...] | None:
    by_handle = {device.handle: device for device in devices}
    handles = recorded.get(model.key, ())
    if len(handles) != model.devices_needed or not set(handles) <= set(by_handle):
        return None
    return tuple(by_handle[handle] for handle in handles)


class _Seats:
    """Who sits where, and the room that is left, while places are being found."""

    def __init__(self, settings: Settings, devices: Sequence[Device], steps: int) -> None:
        self.settings = settings
        self.devices = devices
        self.steps_left = steps
        self.room = {device: device.free_bytes for device in devices}
        self.placed: dict[str, Placed] = {}
        self.known: dict[tuple[str, tuple[int, ...]], Needs] = {}

    def take(self, model: Model, on: tuple[Device, ...]) -> None:
        asked = self._needs(model, on)
        self.placed[model.key] = Placed(model, on, asked.each, asked.share)
        for device, need in zip(on, asked.each, strict=True):
            self.room[device] -= need.total

    def leave(self, model: Model) -> None:
        left = self.placed.pop(model.key)
        for device, need in zip(left.devices, left.needs, strict=True):
            self.room[device] += need.total

    def find(self, models: Sequence[Model]) -> bool:
        """Place for all of `models`, or False when there is none within the steps."""
        if not models:
            return True
        for on in self._choices(models[0]):
            if self.steps_left == 0:
                return False
            self.steps_left -= 1
            if self._has_room(models[0], on):
                self.take(models[0], on)
                if self.find(models[1:]):
                    return True
                self.leave(models[0])
        return False

    def overfill(self, models: Sequence[Model]) -> None:
        """Each where most room is left: the numbers for a refusal."""
        for model in models:
            choices = list(itertools.islice(self._choices(model), 2 * len(self.devices)))
            self.take(model, next((on for on in choices if self._has_room(model, on)), choices[0]))

    def first_needs(self, model: Model) -> tuple[Need, ...]:
        return self._needs(model, next(self._choices(model))).each

    def _choices(self, model: Model) -> Iterator[tuple[Device, ...]]:
        """Sets of devices for the ranks, most room first; of those that are alike only one."""
        ranks = model.devices_needed
        usable = [device for device in self.devices if ranks == 1 or not device.is_mig_part]
        usable.sort(key=lambda device: (-self.room[device], device.index))
        seen = set()
        for group in _of_equal_size(usable, ranks):
            for chosen in itertools.combinations(group, ranks):
                look = tuple((device.total_bytes, self.room[device]) for device in chosen)
                if look not in seen:
                    seen.add(look)
                    yield tuple(sorted(chosen, key=lambda device: device.index))

    def _has_room(self, model: Model, on: tuple[Device, ...]) -> bool:
        asked = self._needs(model, on).each
        return all(need.cache >= 0 and need.total <= self.room[device] for device, need in zip(on, asked, strict=True))

    def _needs(self, model: Model, on: tuple[Device, ...]) -> Needs:
        sizes = (model.key, tuple(device.total_bytes for device in on))
        if sizes not in self.known:
            self.known[sizes] = needs(self.settings, model, on)
        return self.known[sizes]


def _of_equal_size(devices: Sequence[Device], ranks: int) -> list[list[Device]]:
    """Ranks wait for one another, so they go on cards of one size where there are enough of them."""
    if ranks == 1:
        return [list(devices)]
    sizes = dict.fromkeys(device.total_bytes for device in devices)
    groups = [[device for device in devices if device.total_bytes == size] for size in sizes]
    return [group for group in groups if len(group) >= ranks] or [list(devices)]
