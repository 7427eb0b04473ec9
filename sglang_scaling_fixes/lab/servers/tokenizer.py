"""Tokenizers for the lab's models, for requests in text.

Of words: token n is the word `wn`. Of bytes: token n below 256 is the byte n, and one above is the
word `wn`; so an answer may hold any text, and a character may be cut between two tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write(folder: Path, vocabulary: int, words: Mapping[int, str] | None = None) -> Path:
    """Write the files transformers reads into `folder`; return it.

    `words`: what some tokens say instead, without white space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said = {**{number: f"w{number}" for number in range(vocabulary)}, **(words or {})}
    model = {
        "type": "WordLevel",
        "vocab": {word: number for number, word in said.items()},
        "unk_token": "w0",
    }
    # No special tokens: transformers would find "w1" in "w17". Words are joined by a space.
    return _write(folder, model, {"type": "WhitespaceSplit"}, None)


def write_bytes(folder: Path, vocabulary: int) -> Path:
    """As `write`, the tokenizer of bytes."""
    letters = {chr(letter): number for number, letter in enumerate(_byte_letters())}
    words = {f"w{number}": number for number in range(256, vocabulary)}
    model = {"type": "BPE", "vocab": {**letters, **words}, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return _write(folder, model, {**level, "use_regex": False}, level)


def _byte_letters() -> list[int]:
    """The code point that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [byte if byte in printable else 256 + rest.index(byte) for byte in range(256)]


def _write(folder: Path, model: object, splits: object, joins: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": splits,
        "post_processor": None,
        "decoder": joins,
        "model": model,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _CHAT,
        "model_max_length": 1 << 20,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def text(ids: Sequence[int]) -> str:
    """What these tokens say."""
    return " ".join(f"w{number}" for number in ids)


def ids(said: str) -> list[int]:
    """The tokens of what was said."""
    return [int(number) for number in re.findall(r"w(\d+)", said)]
