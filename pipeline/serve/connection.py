"""Connections that no client holds for longer than it may."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.serve.errors import TOO_SLOW
from pipeline.serve.lingering import LINGER_S
from pipeline.serve.options import Limits


class TimedConnection(H11Protocol):
    """uvicorn's connection, for one request, with an end that is known when it begins.

    Its head has `limits.head_s`, its body and its answer have `limits.timeout_s` (which is kept by
    the route), and the client may take as long again to read the answer.
    """

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's; from now on time counts."""
        super().connection_made(transport)
        head_s, timeout_s = self.limits.head_s, self.limits.timeout_s
        longest_s = head_s + 2 * timeout_s + LINGER_S
        self._timers = [
            self.loop.call_later(head_s, self._end_without_head),
            self.loop.call_later(longest_s, transport.abort),
        ]

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        for timer in self._timers:
            timer.cancel()
        super().connection_lost(exc)

    def _end_without_head(self) -> None:
        """Close it unless the head is there; who has sent a part of one is told why."""
        if self.cycle is not None or self.transport.is_closing():
            return
        received, _ = self.conn.trailing_data
        if received:
            self._write_error(f"head: not received within {self.limits.head_s:g} s")
        self.transport.close()

    def _write_error(self, reason: str) -> None:
        content = json.dumps({"error": reason}).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
        }
        response = h11.Response(status_code=TOO_SLOW, headers=list(headers.items()))
        for event in (response, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


def connections_within(limits: Limits) -> type[TimedConnection]:
    """The protocol of connections with these limits."""
    return type("TimedConnection", (TimedConnection,), {"limits": limits})
