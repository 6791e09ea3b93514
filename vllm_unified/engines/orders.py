"""What the keeper of one engine has to know, as plain data.

A keeper lives for months beside its engine, so it loads neither the settings nor what they need (pydantic, YAML):
`vllm-unified engine NAME` reads those, writes these orders, and becomes the keeper.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Seat:
    """A device that the engine runs on, and the bytes that have to be free there when it starts.

    Known by its handle: numbers change when a card drops out.
    """

    handle: str
    label: str
    needed_bytes: int

    @property
    def lock(self) -> str:
        return self.handle if self.handle.startswith(("GPU-", "MIG-")) else self.label.lower().replace(" ", "-")


@dataclass(frozen=True)
class ProgressCheck:
    """How a hung engine is found; see `system` in models.json. Seconds."""

    enabled: bool
    interval: float
    timeout: float
    misses: int


@dataclass(frozen=True)
class Orders:
    """`before_us`: the models on the same devices that start earlier. Times in seconds, `environment` complete."""

    key: str
    kind: str
    name: str
    home: str
    run: str
    weights: str
    host: str
    port: int
    url: str
    api_key: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    seats: tuple[Seat, ...]
    visible_devices: str | None
    devices_file: str | None
    before_us: tuple[str, ...]
    startup_timeout: float
    drain_timeout: float
    longest_backoff: float
    progress: ProgressCheck

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Orders":
        fields = json.loads(text)
        fields["argv"] = tuple(fields["argv"])
        fields["before_us"] = tuple(fields["before_us"])
        fields["seats"] = tuple(Seat(**seat) for seat in fields["seats"])
        fields["progress"] = ProgressCheck(**fields["progress"])
        return cls(**fields)
