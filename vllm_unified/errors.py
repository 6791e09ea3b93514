"""What a user can see go wrong. The CLI prints these, one line a problem, and exits with 1."""

from dataclasses import dataclass
from typing import Any

# How every port answers what is wrong with a request, in OpenAPI's words; OpenAI's shape.
OPENAI_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "what is wrong, and what to do"},
                "type": {"type": "string", "examples": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "the field that is wrong"},
                "code": {"type": ["string", "integer", "null"], "examples": ["model_not_found"]},
            },
        }
    },
}


class UserError(Exception):
    """Something that the user can put right; the message says how."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the configuration: where it stands, what it is, what to do."""

    file: str
    place: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.place, self.message) if part)


class ConfigError(UserError):
    """All that is wrong with the configuration, not only the first of it."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
