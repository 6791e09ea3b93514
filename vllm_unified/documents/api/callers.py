"""Who asks: the router has checked the client's key and tells its name."""

import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from vllm_unified.documents.problems import DocumentError
from vllm_unified.documents.store import Document

DEPLOYMENT = "deployment"


@dataclass(frozen=True)
class Caller:
    """`key`: the name of the client's API key; pages are charged to it."""

    key: str
    admin: bool

    def require(self, document: Document) -> Document:
        """Raises DocumentError 404: whose document it is says nothing to others, not even that it is there."""
        if self.admin or document.key == self.key:
            return document
        raise DocumentError(404, f'there is no document "{document.id}"', code="document_not_found")


def caller_of(request: Request) -> Caller:
    """Raises DocumentError 401 for who does not come through the router and has not the deployment's key either."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    wanted: str = request.app.state.api_key
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), wanted.encode()):
        message = "this service is asked through the router, which knows the keys; send your request there"
        raise DocumentError(401, message, code="invalid_api_key")
    name = request.headers.get("x-api-key-name")
    if name is None:
        return Caller(DEPLOYMENT, admin=True)
    # The router writes UTF-8, and headers are read as latin-1.
    return Caller(
        name.encode("latin-1").decode("utf-8", "replace"), admin=request.headers.get("x-api-key-admin") == "1"
    )


Asking = Annotated[Caller, Depends(caller_of)]
