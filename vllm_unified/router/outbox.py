"""Writes of one turn of the event loop, sent together at its end.

A write wakes the process that waits for it. When the answers of sixty requests come in one turn, their clients and
engines are woken once in place of sixty times, which costs the kernel less than half.
"""

import asyncio

LARGE = 64 * 1024  # what is not copied to be sent with the rest


class Outbox:
    """Of connections that belong to one event loop."""

    def __init__(self) -> None:
        self._senders: list[Sender] = []

    def add(self, sender: "Sender") -> None:
        if not self._senders:
            asyncio.get_running_loop().call_soon(self._send_all)
        self._senders.append(sender)

    def _send_all(self) -> None:
        senders, self._senders = self._senders, []
        for sender in senders:
            sender.flush()


class Sender:
    """A connection's writing side."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self._unsent:
            self._outbox.add(self)
        self._unsent.append(data)

    def flush(self) -> None:
        unsent = self._unsent
        if unsent:
            self._unsent = []
            if self._transport is None:
                return
            if len(unsent) == 1:
                self._transport.write(unsent[0])
            elif sum(map(len, unsent)) < LARGE:
                self._transport.write(b"".join(unsent))
            else:
                self._transport.writelines(unsent)

    def close_when_sent(self) -> None:
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """Close it at once, without what was not sent."""
        self._unsent = []
        if self._transport is not None:
            self._transport.abort()
