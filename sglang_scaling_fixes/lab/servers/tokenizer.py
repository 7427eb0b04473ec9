"""A tokenizer of words for the lab's models, for requests in text: token n is the word `wn`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

_CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write(folder: Path, vocabulary: int) -> Path:
    """Write the files transformers reads into `folder`; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,  # words are joined by a space
        "model": {
            "type": "WordLevel",
            "vocab": {f"w{number}": number for number in range(vocabulary)},
            "unk_token": "w0",
        },
    }
    # No special tokens: transformers would find "w1" in "w17".
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
