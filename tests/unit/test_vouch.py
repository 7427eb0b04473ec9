"""What the proxy vouches for, and what nobody else can say."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_scaling_fixes import vouch
from sglang_scaling_fixes.errors import ConfigError

SECRET = b"0123456789abcdef"


def word(secret: bytes = SECRET, expires: int = 100) -> str:
    return vouch.vouch(secret, vouch.UNGUARDED, "a-1", expires)


def test_a_word_says_what_was_signed_until_it_expires() -> None:
    assert vouch.vouched(SECRET, word(), 100) == vouch.Word(vouch.UNGUARDED, "a-1")
    assert vouch.vouched(SECRET, word(), 100.5) is None


def test_nothing_else_is_a_word() -> None:
    signed = word()
    wrong = [
        signed[:i] + ("x" if c != "x" else "y") + signed[i + 1 :] for i, c in enumerate(signed)
    ]
    wrong += [
        "",
        ".",
        "ssf",
        "ssf....",
        signed + "0",
        signed[:-1],
        word(b"another secret, as long"),
    ]
    wrong += [f"ssf.unguarded.a.100.{'é' * 32}", f"ssf.unguarded.a.1e9.{'0' * 32}"]
    assert [w for w in wrong if vouch.vouched(SECRET, w, 0)] == []


@pytest.mark.parametrize("subject", ["", "a.b", "é", "x" * 65, "a\n"])
def test_a_subject_cannot_say_more(subject: str) -> None:
    with pytest.raises(ValueError, match="subject"):
        vouch.vouch(SECRET, vouch.FRESH, subject, 1)


def test_a_secret_is_read_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(SECRET + b"\n")
    assert vouch.read_secret("--flag", str(path)) == SECRET
    path.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match=r"--flag .* 5 bytes are too short"):
        vouch.read_secret("--flag", str(path))
    with pytest.raises(ConfigError, match=r"--flag .*No such file"):
        vouch.read_secret("--flag", str(tmp_path / "absent"))
