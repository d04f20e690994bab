"""Which hosts answer."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from urllib.parse import urlparse

HUB = "https://huggingface.co"
HUB_VARIABLE, OFFLINE_VARIABLE = "HF_ENDPOINT", "HF_HUB_OFFLINE"  # of the hub's client
_TRUE = ("1", "ON", "YES", "TRUE")
PATIENCE_S = 3


class Network:
    """Asks hosts whether they are there, each once.

    Args:
        offline: ask none.
    """

    def __init__(self, *, offline: bool) -> None:
        self.is_tried = not offline
        self._problems: dict[str, str | None] = {}

    def problem(self, host: str) -> str | None:
        """Why a host is known to be out of reach; None if it answers, or none is asked."""
        if host == hub() and os.environ.get(OFFLINE_VARIABLE, "").upper() in _TRUE:
            return f"{OFFLINE_VARIABLE} is set"
        if self.is_tried and host not in self._problems:
            self._problems[host] = _problem(host)
        return self._problems.get(host)


def hub() -> str:
    """The model hub: scheme and host."""
    return os.environ.get(HUB_VARIABLE, HUB).rstrip("/")


def host_of(url: str) -> str:
    """Scheme and host of an address."""
    parts = urlparse(url)
    return f"{parts.scheme}://{parts.netloc}"


def _problem(host: str) -> str | None:
    """Why a host does not answer, in one try; any answer will do."""
    try:
        request = urllib.request.Request(host, method="HEAD")
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None
