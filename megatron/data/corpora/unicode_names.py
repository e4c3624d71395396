"""The Unicode character database as text: a line per character, a document per run of them."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator

from megatron.data.corpora.documents import Document

# Their names are made from the code point: long lists that say nothing.
_NUMBERED = (
    "CJK UNIFIED",
    "CJK COMPATIBILITY IDEOGRAPH",
    "HANGUL SYLLABLE",
    "TANGUT",
    "NUSHU CHARACTER",
    "KHITAN SMALL SCRIPT CHARACTER",
    "VARIATION SELECTOR",
)


def characters() -> Iterator[Document]:
    """Yield documents of 48 characters each: code point, character, name and properties."""
    lines: list[str] = []
    first = 0
    for point in range(0x20, sys.maxunicode + 1):
        name = unicodedata.name(chr(point), "")
        if not name or name.startswith(_NUMBERED):
            continue
        if not lines:
            first = point
        lines.append(_described(point, name))
        if len(lines) == 48:
            yield Document(text="\n".join(lines) + "\n", source=f"characters from U+{first:04X}")
            lines = []
    if lines:
        yield Document(text="\n".join(lines) + "\n", source=f"characters from U+{first:04X}")


def _described(point: int, name: str) -> str:
    character = chr(point)
    parts = [f"U+{point:04X} {character} {name}", f"category {unicodedata.category(character)}"]
    direction = unicodedata.bidirectional(character)
    if direction and direction != "L":
        parts.append(f"direction {direction}")
    if unicodedata.combining(character):
        parts.append(f"combining class {unicodedata.combining(character)}")
    number = unicodedata.numeric(character, None)
    if number is not None:
        parts.append(f"value {number:g}")
    if made := unicodedata.decomposition(character):
        pieces = (piece if piece[0] == "<" else f"U+{piece}" for piece in made.split())
        parts.append("decomposes to " + " ".join(pieces))
    for change, other in (("upper", character.upper()), ("lower", character.lower())):
        if other != character and len(other) == 1:
            parts.append(f"{change} case U+{ord(other):04X}")
    if unicodedata.mirrored(character):
        parts.append("mirrored")
    return "; ".join(parts)
