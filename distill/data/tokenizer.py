"""Tokenizers over the vocabulary of captions: every grammar word is one token, every other text falls to bytes.

    python -m distill.data.tokenizer bundles/scenes-sdxl/tokenizer

``build_tokenizer`` makes CLIP's, ``build_t5_tokenizer`` the same words with the special tokens of T5 and UMT5.

The folder loads in transformers' ``CLIPTokenizer`` and, through ``tokenizer.json``, in ``tokenizers`` alone; both give
the same ids. Texts are lower-cased, begin with ``<|startoftext|>``, end with ``<|endoftext|>`` and are padded with it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from distill.data.captions import vocabulary

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's own pattern of words."""


def build_tokenizer(folder: Path, max_tokens: int = 40) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and their two configs into ``folder``. Same input, same bytes.

    max_tokens: the fixed length of every encoded text, begin and end tokens included.
    """
    if max_tokens < 3:
        raise ValueError(f"max_tokens is {max_tokens}; give at least 3: begin, one token, end")
    alphabet = _alphabet()
    merges = _merges(vocabulary())
    tokens = [*alphabet, *(a + b for a, b in merges), BEGIN, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocab)
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_tokens, "do_lower_case": True, **special}
    _write_json(folder / "tokenizer_config.json", config)
    _tokenizer(vocab, merges, max_tokens).save(str(folder / "tokenizer.json"))


PAD, STOP, UNKNOWN = "<pad>", "</s>", "<unk>"
"""T5's special tokens, with the ids 0, 1 and 2."""


def build_t5_tokenizer(folder: Path, max_tokens: int = 64) -> None:
    """Write tokenizer.json and its config into ``folder``: texts end with ``</s>``, and are as long as they are."""
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; give at least 2: one token and the end")
    merges = _merges(vocabulary())
    vocab = {token: i for i, token in enumerate([PAD, STOP, UNKNOWN, *_alphabet(), *(a + b for a, b in merges)])}
    tokenizer = _words(vocab, merges, UNKNOWN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {STOP}", special_tokens=[(STOP, vocab[STOP])])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, STOP, UNKNOWN)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": PAD, "eos_token": STOP, "unk_token": UNKNOWN}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens, **special}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, object] | dict[str, int] | dict[str, str]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _alphabet() -> list[str]:
    """Symbols of all bytes that lower-cased UTF-8 can hold, each alone and, where a word can end on it, with </w>."""
    upper = range(ord("A"), ord("Z") + 1)
    single = [byte for byte in range(0x80) if byte not in upper and byte != ord(" ")]
    last, lead = [*single, *range(0x80, 0xC0)], range(0xC2, 0xF5)
    symbols = _byte_symbols()
    return [symbols[b] for b in (*last, *lead)] + [symbols[b] + WORD_END for b in last]


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes, which byte-level BPE writes into its files."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one symbol: the most frequent pair first, ties in alphabetical order."""
    split = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges = []
    while pairs := Counter(pair for symbols in split for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merge(symbols, best) for symbols in split]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _words(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Tokenizer:
    """Lower-cased words by CLIP's pattern, merged from bytes."""
    model = BPE(
        vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=WORD_END, unk_token=unknown
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], max_tokens: int) -> Tokenizer:
    """The same pipeline that transformers builds for CLIP, with CLIP's fixed length."""
    tokenizer = _words(vocab, merges, END)
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocab[END]), (BEGIN, vocab[BEGIN]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (BEGIN, END)])
    tokenizer.enable_truncation(max_length=max_tokens)
    tokenizer.enable_padding(length=max_tokens, pad_id=vocab[END], pad_token=END)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tokenizer of captions into a folder.")
    parser.add_argument("folder", type=Path, help="for example bundles/scenes-sdxl/tokenizer")
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()
    build_tokenizer(args.folder, args.max_tokens)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    main()
