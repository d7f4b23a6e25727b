"""The tokenizer: one id per grammar word, the same ids in `tokenizers` and in transformers, a fixed length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from distill.data.captions import describe, vocabulary
from distill.data.tokenizer import BEGIN, END, build_tokenizer
from distill.data.world import sample_scene

LENGTH = 40
ODD = [
    "",
    "A RED Sphere",
    "don't  a\tb\u00a0c\n",
    "Zoë's 日本 🙂 — 12,5 €",
    "x" * 300,
    "a\x00\x1bb",
    "<|endoftext|>",
    "ÿÀ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path, LENGTH)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def captions(count: int) -> list[str]:
    return [
        describe(sample_scene(5, i, moving=i % 2 == 1), np.random.default_rng((5, i)), full=i % 4 < 2).text
        for i in range(count)
    ]


def test_every_grammar_word_is_one_token(tokenizer: Tokenizer) -> None:
    for word in vocabulary():
        assert tokenizer.encode(word, add_special_tokens=False).tokens[0] == word + "</w>"


def test_the_vocabulary_is_small_and_complete(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocab) < 700
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert vocab[END] == len(vocab) - 1 == vocab[BEGIN] + 1, "CLIP finds the end by its highest id"


def test_the_longest_of_20000_captions_fits(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode_batch(captions(20_000))
    assert {len(e.ids) for e in encoded} == {LENGTH}
    assert max(sum(e.attention_mask) for e in encoded) <= LENGTH
    assert not any(e.overflowing for e in encoded)


def test_begin_tokens_end_padding(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode("A  Red\tSPHERE")
    assert encoded.tokens == [BEGIN, "a</w>", "red</w>", "sphere</w>", *[END] * (LENGTH - 4)]
    assert encoded.attention_mask == [1] * 5 + [0] * (LENGTH - 5)


def test_truncation_keeps_the_end_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("red " * 100).ids
    assert len(ids) == LENGTH
    assert ids[-1] == tokenizer.token_to_id(END)
    assert END not in [tokenizer.id_to_token(i) for i in ids[:-1]]


@pytest.mark.parametrize("text", [text for text in ODD if END not in text])
def test_any_text_falls_to_bytes_and_never_to_the_unknown_token(tokenizer: Tokenizer, text: str) -> None:
    assert END not in tokenizer.encode(text, add_special_tokens=False).tokens[: len(text.split())]
    encoded = tokenizer.encode(text)
    assert encoded.ids.index(tokenizer.token_to_id(END)) == sum(encoded.attention_mask) - 1


def test_every_printable_ascii_character_has_its_own_token(tokenizer: Tokenizer) -> None:
    ids = {tokenizer.encode(chr(code)).ids[1] for code in range(0x21, 0x7F)}
    assert len(ids) == 94 - 26, "upper case falls onto lower case"


def test_text_can_be_decoded(tokenizer: Tokenizer) -> None:
    text = "a small zebra to the left of it"
    assert tokenizer.decode(tokenizer.encode(text).ids).replace("</w>", " ").strip() == text


def test_transformers_gives_the_same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(folder)
    assert (theirs.model_max_length, theirs.pad_token, theirs.bos_token) == (LENGTH, END, BEGIN)
    texts = captions(500) + ODD
    got = theirs(texts, padding="max_length", max_length=theirs.model_max_length, truncation=True)
    expected = tokenizer.encode_batch(texts)
    assert got.input_ids == [e.ids for e in expected]
    assert got.attention_mask == [e.attention_mask for e in expected]


def test_files_without_tokenizer_json_still_give_the_same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import CLIPTokenizer

    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    theirs = CLIPTokenizer(vocab=vocab, merges=[tuple(line.split(" ")) for line in lines])
    texts = captions(200)
    got = theirs(texts, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    assert got == [e.ids for e in tokenizer.encode_batch(texts)]


def test_saving_through_transformers_keeps_the_ids(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again("a large red ball").input_ids == CLIPTokenizer.from_pretrained(folder)("a large red ball").input_ids


def test_same_files_every_time(folder: Path, tmp_path: Path) -> None:
    def digests(path: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}

    build_tokenizer(tmp_path, LENGTH)
    assert digests(tmp_path) == digests(folder)
    assert set(digests(folder)) == {
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


def test_too_short_a_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens is 2; give at least 3"):
        build_tokenizer(tmp_path, 2)
