"""Files and environment → frozen, validated values. `load` is the one way in."""

from vllm_unified.settings.load import Settings, load
from vllm_unified.settings.schema import Kind, Model, RouterSettings, SystemSettings

__all__ = ["Kind", "Model", "RouterSettings", "Settings", "SystemSettings", "load"]
