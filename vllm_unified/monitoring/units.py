"""Numbers as people read them, in the units of charts: 0.034 s is 34 ms, 3221225472 bytes are 3 GiB."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A number is shown divided by `factor`, before `suffix`; from `at` on."""

    at: float
    factor: float
    suffix: str

    def text(self, value: float) -> str:
        """With three digits, as 1,234 or 12.3 or 0.0123; nothing is nothing in any unit."""
        if value == 0:
            return "0"
        value = value / self.factor
        size = abs(value)
        digits = 0 if size >= 100 or size == round(size) else max(0, 2 - math.floor(math.log10(size)))
        text = f"{value:,.{digits}f}"
        return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{self.suffix}"


def _binary(unit: str) -> tuple[Scale, ...]:
    return tuple(
        Scale(1024.0**power, 1024.0**power, f" {prefix}{unit}")
        for power, prefix in enumerate(("", "Ki", "Mi", "Gi", "Ti"))
    )


def _decimal(unit: str) -> tuple[Scale, ...]:
    return tuple(
        Scale(1000.0**power, 1000.0**power, f"{prefix}{unit}") for power, prefix in enumerate(("", "k", "M", "G"))
    )


# By Grafana's ids. The first scale of each is that of the smallest numbers.
UNITS = {
    "short": _decimal(""),
    "reqps": _decimal("/s"),
    "ops": _decimal("/s"),
    "percentunit": (Scale(0, 0.01, " %"),),
    "bytes": _binary("B"),
    "celsius": (Scale(0, 1, " °C"),),
    "watt": (Scale(0, 1, " W"), Scale(1000, 1000, " kW")),
    "s": (
        Scale(0, 0.001, " ms"),
        Scale(1, 1, " s"),
        Scale(180, 60, " min"),
        Scale(2 * 3600, 3600, " h"),
        Scale(2 * 86400, 86400, " d"),
    ),
}


def scale_of(unit: str, largest: float) -> Scale:
    """The one in which numbers up to `largest` are read best."""
    scales = UNITS[unit]
    return next((scale for scale in reversed(scales) if abs(largest) >= scale.at), scales[0])


def shown(value: float, unit: str) -> str:
    if math.isnan(value):
        return "–"
    return scale_of(unit, value).text(value) if math.isfinite(value) else "∞"
