"""Write vllm_unified/settings/vllm_flags.json: the flags of the installed vLLM's server, so that `check`
finds a mistyped flag on a machine without vLLM. Run it again when the version in versions.env changes.

    .venv/bin/python scripts/list_vllm_flags.py
"""

import argparse
import json
from pathlib import Path

TARGET = Path(__file__).parents[1] / "vllm_unified" / "settings" / "vllm_flags.json"


def installed_flags() -> dict[str, str]:
    """Flag without its dashes → `boolean` (has a --no- form), `switch`, `list` or `value`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return {
        option.removeprefix("--"): kind_of(action)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not (isinstance(action, argparse.BooleanOptionalAction) and is_negative(option))
    }


def kind_of(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "boolean"
    if action.nargs == 0:
        return "switch"
    return "list" if action.nargs in ("+", "*") else "value"


def is_negative(option: str) -> bool:
    return option.startswith("--no-")


def main() -> None:
    flags = dict(sorted(installed_flags().items()))
    TARGET.write_text(json.dumps(flags, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {len(flags)} flags to {TARGET}")


if __name__ == "__main__":
    main()
