"""The retry proxy's words in a request's namespace (SGLang's `extra_key`).

    fresh        compute the prompt anew. The word is a namespace that nobody else has
    unguarded    as fresh, and do not end the request: its anomaly is the text's, not the KV's

Stock puts other text before a word (`cache_salt`, up to 0.5.17) and behind it (an adapter's id, the
size of an elastic group), without a mark between. So a word is found anywhere in it.

A word is checked in two places. The main process has the clock: it turns a word that is not valid,
or not any more, into one that no secret vouches for. The schedulers check the signature and no
clock, because they must all decide alike.
"""

from __future__ import annotations

import re

from sglang_scaling_fixes.vouch import FRESH, PREFIX, UNGUARDED, Word, vouched

_WORD = re.compile(
    rf"(?=({PREFIX}\.(?:{FRESH}|{UNGUARDED})\.[A-Za-z0-9_-]{{1,64}}\.[0-9]{{1,12}}\.[0-9a-f]{{32}}))"
)
MOST = 4
"""Words of one request that are checked: what follows them is a client's, and may be long."""


def is_fresh(text: str | None) -> bool:
    """Whether the request asks for its prompt to be computed anew, vouched for or not."""
    return bool(text) and _WORD.search(str(text)) is not None


def find(secret: bytes | None, text: str | None, now: float = 0.0) -> Word | None:
    """The word that is signed with `secret`; `now` 0: whenever it was to expire."""
    if secret is None or not text:
        return None
    for _, match in zip(range(MOST), _WORD.finditer(text), strict=False):
        if (word := vouched(secret, match[1], now)) is not None:
            return word
    return None


def settled(secret: bytes, text: str, now: float) -> str:
    """`text` as the schedulers may see it: what says `unguarded` in it is valid now."""
    said = f"{PREFIX}.{UNGUARDED}."
    if said not in text:
        return text
    if (word := find(secret, text, now)) is not None and word == find(secret, text):
        return text
    return text.replace(said, f"{PREFIX}.{FRESH}.")
