"""Prompts to token ids, as the text encoders of a bundle read them."""

from __future__ import annotations

import functools
import html
import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from distill.bundle import Bundle, BundleError
from service.runtimes.base import Tokens

logger = logging.getLogger(__name__)


class ClipTokenizer:
    """CLIP's prompt form: begin, tokens, end, padded with the end token to a fixed length."""

    BEGIN, END = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, bundle: Bundle, max_tokens: int) -> None:
        self._tokenizer, path = _load(bundle)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        begin, end = (self._tokenizer.token_to_id(token) for token in (self.BEGIN, self.END))
        if begin is None or end is None:
            raise BundleError(f"{path} lacks {self.BEGIN} or {self.END}; write the bundle again")
        self._begin, self._end, self._max_tokens = begin, end, max_tokens
        self.room = max_tokens - 2
        """Tokens of a prompt that are read."""

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        ids: NDArray[np.int64] = np.full((len(prompts), self._max_tokens), self._end, dtype=np.int64)
        encoded = [self._tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        for row, tokens in zip(ids, encoded, strict=True):
            row[0] = self._begin
            row[1 : 1 + min(len(tokens), self.room)] = tokens[: self.room]
        counts = tuple(len(tokens) for tokens in encoded)
        return Tokens(ids, np.ones_like(ids), counts, tuple(min(count, self.room) for count in counts))


class T5Tokenizer:
    """T5's prompt form: tokens and the end, padded to a fixed length that a mask tells from the prompt.

    Prompts are cleaned as diffusers' Wan pipeline and Wan's own code do it.
    """

    def __init__(self, bundle: Bundle, max_tokens: int) -> None:
        self._tokenizer, path = _load(bundle)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = json.loads(bundle.file("tokenizer/tokenizer_config.json").read_text(encoding="utf-8"))
        pad = self._tokenizer.token_to_id(str(config.get("pad_token", "<pad>")))
        if pad is None:
            raise BundleError(f"{path} lacks {config.get('pad_token', '<pad>')}; write the bundle again")
        self._pad, self._max_tokens = int(pad), max_tokens
        self.room = max_tokens - self._tokenizer.num_special_tokens_to_add(is_pair=False)
        """Tokens of a prompt that are read."""

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        ids: NDArray[np.int64] = np.full((len(prompts), self._max_tokens), self._pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        counts = []
        for row, seen, prompt in zip(ids, mask, prompts, strict=True):
            encoded = self._tokenizer.encode(clean(prompt), add_special_tokens=False)
            counts.append(len(encoded.ids))
            encoded.truncate(self.room)
            framed = self._tokenizer.post_process(encoded).ids
            row[: len(framed)], seen[: len(framed)] = framed, 1
        return Tokens(ids, mask, tuple(counts), tuple(min(count, self.room) for count in counts))


def clean(prompt: str) -> str:
    """A prompt as Wan reads it: broken characters repaired, HTML entities resolved twice, runs of space made one."""
    prompt = _repair()(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


@functools.cache
def _repair() -> Callable[[str], str]:
    """ftfy, which the serve extra brings; without it broken characters stay, and training read them repaired."""
    if importlib.util.find_spec("ftfy") is None:
        logger.warning("ftfy is not installed: prompts with broken characters are not repaired as Wan repairs them")
        return str
    found: Callable[[str], str] = importlib.import_module("ftfy").fix_text
    return found


def _load(bundle: Bundle) -> tuple[Tokenizer, Path]:
    path = bundle.file("tokenizer/tokenizer.json")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8")), path
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{path} does not load: {error}; write the bundle again") from None
