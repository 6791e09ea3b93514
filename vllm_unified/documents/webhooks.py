"""What a client is told when its job ends, and when it is told again.

Signed as Standard Webhooks 1.0 says, so that its libraries verify it:
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import random
import ssl
from collections.abc import Callable
from typing import Literal

import msgspec

from vllm_unified.documents import fetching
from vllm_unified.documents.fetching import AddressRule, Resolve
from vllm_unified.documents.problems import DocumentError

PREFIX = "whsec_"
SECRET_BYTES = range(24, 65)
LOOK_UP_SECONDS = 10.0
ATTEMPT_SECONDS = 20.0
# Seconds after the first failure, the second, ...: about an hour in all.
DELAYS = (10.0, 30.0, 90.0, 270.0, 810.0, 2430.0)


class Outcome(msgspec.Struct, frozen=True):
    """Of one attempt. "failed" is tried again after `next_attempt`, "gone" never: the receiver wants no more (410)."""

    state: Literal["delivered", "failed", "gone"]
    reason: str = ""


async def check(url: str, secret: str, *, allowed: AddressRule, resolve: Resolve = fetching.look_up) -> None:
    """Before a job is accepted. `secret` is "" for messages without a signature. Raises DocumentError 400 or 403."""
    key(secret)
    try:
        async with asyncio.timeout(LOOK_UP_SECONDS):
            await fetching.check(url, allowed=allowed, resolve=resolve)
    except TimeoutError:
        raise _invalid("The URL's host was not found in time.") from None
    except DocumentError as error:
        if error.status == 403:
            raise DocumentError(403, f"webhook: {error}", code="webhook_not_allowed") from None
        raise _invalid(str(error)) from None


def key(secret: str) -> bytes:
    """The bytes to sign with, b"" for "". Raises DocumentError 400."""
    if not secret:
        return b""
    try:
        found = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not secret.startswith(PREFIX) or len(found) not in SECRET_BYTES:
        raise _invalid('The secret has to be "whsec_" and 24 to 64 random bytes in base64 (openssl rand -base64 32).')
    return found


def headers(message_id: str, body: bytes, secret: str, now: int) -> dict[str, str]:
    """What goes with `body`, the job as JSON.

    `message_id` has no full stop in it, and is the same at each attempt, so that the receiver knows a message it had.
    `now`: seconds since 1970, of this attempt.
    """
    signed = f"{message_id}.{now}.".encode() + body
    found = {"content-type": "application/json", "webhook-id": message_id, "webhook-timestamp": str(now)}
    if secret:
        digest = hmac.new(key(secret), signed, hashlib.sha256).digest()
        found["webhook-signature"] = "v1," + base64.b64encode(digest).decode()
    return found


async def deliver(
    url: str,
    body: bytes,
    headers: dict[str, str],
    *,
    allowed: AddressRule,
    resolve: Resolve = fetching.look_up,
    tls: ssl.SSLContext | None = None,
    seconds: float = ATTEMPT_SECONDS,
) -> Outcome:
    """One attempt, to an address that is checked anew. Delivered is 2xx; no redirect is followed, no answer is read."""
    try:
        async with (
            asyncio.timeout(seconds),
            fetching.request(
                "POST",
                fetching.parse(url),
                headers=headers.items(),
                content=body,
                allowed=allowed,
                resolve=resolve,
                tls=tls,
            ) as answer,
        ):
            status = answer.status
    except TimeoutError:
        return Outcome("failed", f"no answer within {seconds:g} seconds")
    except DocumentError as error:
        return Outcome("failed", str(error))
    if 200 <= status < 300:
        return Outcome("delivered")
    return Outcome("gone" if status == 410 else "failed", f"answered with status {status}")


def next_attempt(attempts: int, spread: Callable[[float, float], float] = random.uniform) -> float | None:
    """Seconds to wait after that many failures, from 1; None when that was the last attempt.

    Spread by a fifth, so that the messages to a host that was down don't all come back at once.
    """
    return DELAYS[attempts - 1] * spread(0.8, 1.2) if attempts <= len(DELAYS) else None


def _invalid(message: str) -> DocumentError:
    return DocumentError(400, f"webhook: {message}", code="webhook_invalid")
