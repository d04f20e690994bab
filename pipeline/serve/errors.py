"""What a client is told when it gets no prediction."""

from __future__ import annotations

from pipeline.formats.images import ImageError

BAD_REQUEST, TOO_LARGE, UNSUPPORTED = 400, 413, 415
TOO_SLOW, BUSY = 408, 503


class Refused(Exception):
    """A request that gets no prediction.

    Attributes:
        status: of HTTP.
        reason: one line for the client.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def refused_image(error: ImageError) -> Refused:
    """Too large is 413, what is no image that can be read 415, a damaged one 400."""
    reason = str(error)
    if reason.startswith("too large"):
        return Refused(TOO_LARGE, reason)
    if reason.startswith(("not an image", "not supported")):
        return Refused(UNSUPPORTED, reason)
    return Refused(BAD_REQUEST, reason)
