"""Why a plan does not fit, in numbers, and the changes with which it would, computed."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_unified.devices import GIB, Device
from vllm_unified.engines.memory import LEAST_CACHE_BYTES, is_bound_by_share, least_bytes, share, weight_bytes
from vllm_unified.errors import ConfigError, Problem
from vllm_unified.settings import Model, Settings

if TYPE_CHECKING:
    from vllm_unified.engines.placement import Placed, Plan

# Below this, what others hold is the driver's and the desktop's, and explains nothing.
WORTH_SAYING_BYTES = GIB // 2
TRIED_MOVES = 12


@dataclass(frozen=True)
class Suggestion:
    """A change of one field of one model."""

    key: str
    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        if self.field == "gpus":
            return f"put {self.key} on GPU {' and '.join(map(str, self.new))}"
        if self.field == "enabled":
            return f'disable {self.key} ("enabled": false)'
        verb = "lower" if self.new < self.old else "raise"
        return f"{verb} {self.key}.{self.field} from {_number(self.old)} to {_number(self.new)}"


Change = tuple[Suggestion, ...]  # what has to be done together
Replan = Callable[[Settings], "Plan | None"]  # changed settings on the same devices; None where some do not exist


class RefusedPlanError(ConfigError):
    """`changes`: with any one of them the plan fits."""

    def __init__(self, problems: list[Problem], changes: Sequence[Change]) -> None:
        super().__init__(problems)
        self.changes = tuple(changes)


def changed(settings: Settings, change: Change) -> Settings:
    fields: dict[str, dict[str, Any]] = {}
    for each in change:
        fields.setdefault(each.key, {})[each.field] = each.new
    models = (model.model_copy(update=fields.get(model.key, {})) for model in settings.models)
    return replace(settings, models=tuple(model for model in models if model.enabled))


def refusal(settings: Settings, result: "Plan", replan: Replan) -> RefusedPlanError:
    changes = _changes_that_fit(settings, result, replan)
    lines = [*_too_small(settings, result)]
    overfull = _overfull(result)
    if overfull:
        lines.append(("models", "; ".join(_numbers(result, device) for device in overfull)))
    remedy = ", or ".join(" and ".join(map(str, change)) for change in changes) or _no_remedy(settings, result)
    place, said = lines.pop()
    lines.append((place, f"{said}; {remedy}"))
    return RefusedPlanError([Problem(settings.shown_file, place, said) for place, said in lines], changes)


def _too_small(settings: Settings, result: "Plan") -> Iterator[tuple[str, str]]:
    for placed in result.placed:
        need = min(placed.needs, key=lambda each: each.cache)
        if need.cache < 0:
            weights, room = need.weights / GIB, (need.weights + need.cache) / GIB
            yield (
                f"models.{placed.model.key}",
                f"its weights take {weights:.1f} GiB of each device, its share is {room:.1f}",
            )


def _numbers(result: "Plan", device: Device) -> str:
    held = f" ({device.held_bytes / GIB:.1f} held by others)" if device.held_bytes > WORTH_SAYING_BYTES else ""
    each = " + ".join(f"{placed.model.key} {placed.need_of(device).total / GIB:.1f}" for placed in result.on(device))
    has, asked = device.total_bytes / GIB, result.asked_of(device) / GIB
    return f"{device.label} has {has:.1f} GiB{held}, asked for {asked:.1f} ({each})"


def _overfull(result: "Plan") -> list[Device]:
    return [device for device in result.devices if result.left_on(device) < 0]


def _no_remedy(settings: Settings, result: "Plan") -> str:
    """No single kind of change is enough."""
    missing = sum(-result.left_on(device) for device in _overfull(result)) / GIB
    how = "use larger devices, fewer or smaller models, or spread one with tensor_parallel_size"
    return f"{missing:.1f} GiB are missing: {how}" if missing else how


def _changes_that_fit(settings: Settings, result: "Plan", replan: Replan) -> list[Change]:
    """Of each kind the first that is enough; leaving a model out only when nothing else is."""

    def fits(change: Change) -> bool:
        planned = replan(changed(settings, change))
        return planned is not None and planned.fits

    kinds = (_resized(settings, result), _moved(settings, result), _spread(settings, result))
    found = [next((change for change in kind if change and fits(change)), None) for kind in kinds]
    offered = [change for change in found if change]
    last = () if offered else next(filter(fits, _left_out(settings, result, replan)), ())
    return offered or ([last] if last else [])


def _moved(settings: Settings, result: "Plan") -> Iterator[Change]:
    """One model with a place of its own to another place; small ones are moved more easily."""
    full = _overfull(result)
    movable = [each for each in result.placed if each.model.gpus and set(full).intersection(each.devices)]
    movable.sort(key=lambda each: sum(need.total for need in each.needs))
    moves = (
        (Suggestion(each.model.key, "gpus", each.model.gpus, sorted(device.index for device in on)),)
        for each in movable
        for on in itertools.combinations(
            sorted(set(result.devices) - set(full), key=lambda device: (-result.left_on(device), device.index)),
            len(each.devices),
        )
    )
    return itertools.islice(moves, TRIED_MOVES)


def _spread(settings: Settings, result: "Plan") -> Iterator[Change]:
    """A model whose weights are too large for its share, over more devices."""
    for placed in result.placed:
        model = placed.model
        if model.gpus is None and any(need.cache < 0 for need in placed.needs):
            for ranks in (2, 4, 8):
                if model.tensor_parallel_size < ranks <= len(result.devices):
                    yield (Suggestion(model.key, "tensor_parallel_size", model.tensor_parallel_size, ranks),)


def _left_out(settings: Settings, result: "Plan", replan: Replan) -> Iterator[Change]:
    """One model less: rather one that is not required, or a small one; and where need be the others resized."""
    if len(result.placed) == 1:
        return
    for placed in sorted(result.placed, key=lambda each: (each.model.required, sum(need.total for need in each.needs))):
        without: Change = (Suggestion(placed.model.key, "enabled", True, False),)
        yield without
        remaining = changed(settings, without)
        planned = replan(remaining)
        if planned:
            yield from (without + change for change in _resized(remaining, planned))


@dataclass
class _Dial:
    """The field by which a model's memory is set: its value, how low it may go, what 1.0 of it is on a device."""

    key: str
    field: str
    old: float
    value: float
    floor: float
    step: int  # parts of 1.0
    unit: dict[Device, float]

    def slack(self, device: Device) -> float:
        return max(0.0, self.value - self.floor) * self.unit[device]

    def lower(self, size: float, device: Device) -> None:
        lowered = math.floor(round((self.value - size / self.unit[device]) * self.step, 6)) / self.step
        self.value = max(self.floor, lowered)


def _resized(settings: Settings, result: "Plan") -> Iterator[Change]:
    """Shares below the weights raised; then on each device that is too full one lowered, or all in proportion."""
    dials = {placed.model.key: dial for placed in result.placed if (dial := _dial(settings, placed))}
    for placed in result.placed:
        dial = dials.get(placed.model.key)
        if dial and any(need.cache < 0 for need in placed.needs):
            dial.value = dial.floor
    for device in result.devices:
        here = [dials[placed.model.key] for placed in result.on(device) if placed.model.key in dials]
        grown = sum((dial.value - dial.old) * dial.unit[device] for dial in here)
        if not _lower(here, device, grown - result.left_on(device)):
            return
    yield tuple(
        Suggestion(dial.key, dial.field, dial.old, dial.value) for dial in dials.values() if dial.value != dial.old
    )


def _lower(dials: list[_Dial], device: Device, excess: float) -> bool:
    if excess <= 0:
        return True
    for dial in sorted(dials, key=lambda each: -each.value * each.unit[device]):
        if dial.slack(device) >= excess:
            dial.lower(excess, device)
            return True
    slack = sum(dial.slack(device) for dial in dials)
    if slack < excess:
        return False
    for dial in dials:
        dial.lower(excess * dial.slack(device) / slack, device)
    return True


def _dial(settings: Settings, placed: "Placed") -> _Dial | None:
    model, on = placed.model, placed.devices
    smallest = min(device.total_bytes for device in on)
    if model.kv_cache_memory_gib is not None:
        floor = min(model.kv_cache_memory_gib, LEAST_CACHE_BYTES / GIB)
        value = model.kv_cache_memory_gib
        return _Dial(model.key, "kv_cache_memory_gib", value, value, floor, 10, dict.fromkeys(on, GIB))
    if not is_bound_by_share(settings, model, on[0]):
        return None
    if model.memory_gib is not None:
        floor = _floor(settings, model, model.memory_gib, GIB, 10)
        units = {device: GIB * device.total_bytes / smallest for device in on}
        return _Dial(model.key, "memory_gib", model.memory_gib, model.memory_gib, floor, 10, units)
    floor = _floor(settings, model, share(model), smallest, 100)
    units = {device: float(device.total_bytes) for device in on}
    return _Dial(model.key, "gpu_memory_utilization", share(model), share(model), floor, 100, units)


def _floor(settings: Settings, model: Model, value: float, unit: int, step: int) -> float:
    """Weights that are not there yet have no size: then half of what is asked for is left alone."""
    least = least_bytes(settings, model) / unit if weight_bytes(settings, model) else value / 2
    return math.ceil(round(least * step, 6)) / step


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}" if value < 1 else f"{value:g}"
