"""Words in a picture."""

from __future__ import annotations

from xml.sax.saxutils import escape


def text(x: float, y: float, words: str, style: str = "") -> str:
    """An SVG text element at this place, with further attributes in `style`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
