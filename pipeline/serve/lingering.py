"""Answers that reach a client which is still sending."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A refused client may send on for so long before it reads the answer.
LINGER_S, LINGER_BYTES = 2.0, 1 << 28


class Lingering:
    """ASGI middleware: what was not read of a body is thrown away after the answer.

    Closing a connection with unread bytes resets it, and the client may lose the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_whole = False

        async def watched() -> Message:
            nonlocal is_whole
            message = await receive()
            is_whole = not message.get("more_body", False)
            return message

        async def lingering(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                if not is_whole:
                    await _discard(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, watched, lingering)


async def _discard(receive: Receive) -> None:
    """Read on until the end of the body, or until that takes too long."""
    length = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while length < LINGER_BYTES:
                message = await receive()
                length += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
