"""One try at the model hub: its client makes six of every request, with pauses of seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session


@contextmanager
def tried_once() -> Iterator[None]:
    """Within it, the hub's client asks its cache alone if the hub cannot be reached.

    `HF_HUB_OFFLINE` and `HF_HUB_ETAG_TIMEOUT` (seconds) hold as ever.

    Raises:
        Exception: why the hub cannot be reached, where the block finds a file missing.
    """
    failure = None if constants.HF_HUB_OFFLINE else _connection_failure()
    if failure is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except FileNotFoundError:
        raise failure from None
    finally:
        constants.HF_HUB_OFFLINE = False


def _connection_failure() -> Exception | None:
    """What becomes of a connection to the hub; any answer will do."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of the HTTP client, which is another one in each version
        return error
    return None
