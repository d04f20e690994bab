"""Texts to token ids, also for a text tower that was cut to a small vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import get_clean_fn
from torch import Tensor

from pipeline.errors import PipelineError, first_line
from pipeline.models.clip.hub import tried_once

VOCABULARY_SPECIALS = (0, 49406, 49407)


class Tokenizer:
    """Texts to token ids.

    Args:
        tokenizer: one of open_clip's.
        vocabulary: the ids that the text tower was cut to, if it was; what comes out are their
            places.

    Attributes:
        context_length: tokens that the text tower reads of a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: list[int] | None = None) -> None:
        self.context_length: int = tokenizer.context_length
        self._tokenizer = tokenizer
        self._index: dict[int, int] | None = None
        if vocabulary is not None:
            self._index = {token: index for index, token in enumerate(vocabulary)}

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids (N, context_length), int64, as the text tower expects them.

        Raises:
            PipelineError: a word outside the vocabulary.
        """
        tokens: Tensor = self._tokenizer(texts)
        if self._index is None:
            return tokens
        rows = tokens.tolist()
        for text, row in zip(texts, rows, strict=True):
            if any(token not in self._index for token in row):
                raise self._unknown_word(text, self._index)
        return torch.tensor([[self._index[token] for token in row] for row in rows]).long()

    def ids(self, text: str) -> list[int]:
        """All tokens of a text, however long, start and end included; of the full vocabulary."""
        if isinstance(self._tokenizer, open_clip.SimpleTokenizer):
            start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
            return [start, *self._tokenizer.encode(text), end]
        clean = getattr(self._tokenizer, "clean_fn", None) or get_clean_fn("canonicalize")
        with quiet_logging():  # transformers warns of long texts
            return list(self._tokenizer.tokenizer(clean(text)).input_ids)

    def _unknown_word(self, text: str, known: Container[int]) -> PipelineError:
        for word in text.split():
            if any(token not in known for token in self._tokenizer.encode(word)):
                break
        return PipelineError(
            f"categories or background: the word {word!r} of {text!r} is unknown to these weights: "
            "their vocabulary was cut to the words of the world they were trained in. Use names of "
            "that world, or the weights of a full CLIP (encoder.model, encoder.pretrained)"
        )


def load_tokenizer(config: dict[str, Any], *, name: str, source: str) -> Tokenizer:
    """The tokenizer of a named architecture, or of a config file (`name` is empty)."""
    if name:
        return Tokenizer(_named_tokenizer(name))
    text_config = config["text_cfg"]
    foreign = text_config.get("hf_tokenizer_name") or text_config.get("hf_model_name")
    if foreign:
        raise PipelineError(
            f"encoder.model: {source}: the tokenizer {foreign} is not supported in a config file; "
            "use CLIP's own (leave the key out) or a named architecture of open_clip"
        )
    tokenizer = _own_tokenizer(text_config.get("context_length", 77))
    if "vocabulary" not in config:
        return Tokenizer(tokenizer)
    _check_vocabulary(config["vocabulary"], text_config.get("vocab_size"), source=source)
    return Tokenizer(tokenizer, config["vocabulary"])


@cache
def _own_tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    """CLIP's tokenizer, whose table of 49,000 merges is read once a process."""
    return open_clip.SimpleTokenizer(context_length=context_length)


@cache
def _named_tokenizer(name: str) -> Any:
    try:
        with quiet_logging(), _hub_of(name):
            return open_clip.get_tokenizer(name)
    except Exception as error:  # as in _download: some architectures fetch theirs from the hub
        raise PipelineError(
            f"encoder.model: could not get the tokenizer of {name} ({type(error).__name__}: "
            f"{first_line(error)}); without a network, use an architecture with CLIP's own "
            "tokenizer, for example ViT-B-16-quickgelu, or the preset folder-offline (photo_clip)"
        ) from None


def _hub_of(name: str) -> AbstractContextManager[None]:
    """What an architecture's tokenizer needs of the model hub: one try, or nothing."""
    text_config = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    return tried_once() if text_config.get("hf_tokenizer_name") else nullcontext()


def _check_vocabulary(vocabulary: list[int], vocab_size: int | None, *, source: str) -> None:
    if vocabulary != sorted(set(vocabulary)) or not set(VOCABULARY_SPECIALS) <= set(vocabulary):
        raise PipelineError(
            f"encoder.model: {source}: vocabulary must be sorted, without repeats, and contain "
            f"{VOCABULARY_SPECIALS} (padding, start and end of a text)"
        )
    if len(vocabulary) != vocab_size:
        raise PipelineError(
            f"encoder.model: {source}: {len(vocabulary)} tokens in vocabulary, but "
            f"text_cfg.vocab_size is {vocab_size}"
        )


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Keep open_clip's informational root-logger lines off the progress bars."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
