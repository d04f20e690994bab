"""The model hub: what of it is here, and one try at it (its client makes six of every request)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
from huggingface_hub import constants, get_session

URL_COPIES = Path("~/.cache/clip")  # where open_clip keeps what comes from no hub


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
    with _copies_alone():
        try:
            yield
        except FileNotFoundError:
            raise failure from None


def is_tag(model: str, tag: str) -> bool:
    """Whether open_clip has weights of that name, and so downloads them when they are used."""
    return bool(tag and open_clip.get_pretrained_cfg(model, tag))


def has_foreign_tokenizer(model: str) -> bool:
    """Whether the tokenizer of a named architecture is a file of the hub."""
    config = open_clip.get_model_config(model) or {}
    return bool(config.get("text_cfg", {}).get("hf_tokenizer_name"))


def is_downloaded(model: str, tag: str) -> bool:
    """Whether the weights of a tag were downloaded before; no network is asked."""
    config = open_clip.get_pretrained_cfg(model, tag)
    if not config.get("hf_hub"):
        return (URL_COPIES.expanduser() / Path(config.get("url", "")).name).is_file()
    try:
        with _copies_alone():
            return Path(open_clip.download_pretrained(config)).is_file()
    except FileNotFoundError:
        return False


@contextmanager
def _copies_alone() -> Iterator[None]:
    """Within it, the hub's client asks its cache alone."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _connection_failure() -> Exception | None:
    """What becomes of a connection to the hub; any answer will do."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of the HTTP client, which is another one in each version
        return error
    return None
