"""Prompts to token ids, as the text encoders of a bundle read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from distill.bundle import Bundle, BundleError
from service.runtimes.base import Tokens


class ClipTokenizer:
    """CLIP's prompt form: begin, tokens, end, padded with the end token to a fixed length."""

    BEGIN, END = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, bundle: Bundle, max_tokens: int) -> None:
        path = bundle.file("tokenizer/tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path} does not load: {error}; write the bundle again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        begin, end = (self._tokenizer.token_to_id(token) for token in (self.BEGIN, self.END))
        if begin is None or end is None:
            raise BundleError(f"{path} lacks {self.BEGIN} or {self.END}; write the bundle again")
        self._begin, self._end, self._max_tokens = begin, end, max_tokens

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        room = self._max_tokens - 2
        ids: NDArray[np.int64] = np.full((len(prompts), self._max_tokens), self._end, dtype=np.int64)
        encoded = [self._tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        for row, tokens in zip(ids, encoded, strict=True):
            row[0] = self._begin
            row[1 : 1 + min(len(tokens), room)] = tokens[:room]
        counts = tuple(len(tokens) for tokens in encoded)
        return Tokens(ids, counts, tuple(min(count, room) for count in counts))
