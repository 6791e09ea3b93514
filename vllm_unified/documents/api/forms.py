"""What a client sends beside its key: files, options, wishes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request

from vllm_unified.documents import uploads
from vllm_unified.documents.api.callers import Caller
from vllm_unified.documents.options import Options, options_in
from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.service import Service, Wishes
from vllm_unified.documents.uploads import Received

WISHES = ("webhook_url", "webhook_secret", "wait")


@dataclass(frozen=True)
class Form:
    fields: Mapping[str, str]
    files: tuple[Received, ...]
    options: Options
    wishes: Wishes

    def one_file(self) -> Received:
        """Raises DocumentError 400."""
        if len(self.files) != 1:
            message = f"send one file here, not {len(self.files)}" if self.files else "the form has no file in it"
            raise DocumentError(400, message, code="invalid_form")
        return self.files[0]

    def flag(self, name: str, *, default: bool) -> bool:
        return flag_in(self.fields, name, default=default)
