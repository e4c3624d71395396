r"""Pre-tokenizer patterns, translated from the engine of ``tokenizers`` to Python's ``re``.

Byte-level BPE splits text by a regular expression (GPT-2's, GPT-4's, …) before it merges.
Python's ``re`` runs these patterns faster than the other engines at hand, but lacks
``\p{…}`` and has its own idea of ``\s``.  So every class is written out as ranges, and
anything whose meaning could differ is refused: the caller then keeps to the slower path.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from megatron.tokenizer.unicode_classes import (
    ASCII_END,
    Ranges,
    UnknownClassError,
    class_ranges,
    clip,
    tier_of,
)

Splitter = Callable[[str], list[str]]

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same language with the alternatives in the order that Python tries fastest: all but the
# contractions are disjoint in their first character, so their order is free.
_GPT2_FAST = (
    r" (?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\p{L}+|'(?:[stmd]|re|ve|ll)"
    r"|[^\s\p{L}\p{N}]+|\p{N}+|\s+(?!\S)|\s+"
)

_ESCAPED_CLASS = re.compile(r"\\[pP]\{\^?[A-Za-z_]+\}|\\p[LNZPSMC]|\\[sSdD]")
_ESCAPED_LITERAL = re.compile(r"\\[rntfv]|\\[^A-Za-z0-9\s]")
_GROUP_START = re.compile(r"\((?:\?:|\?i:|\?!|\?=|(?!\?))")
_QUANTIFIER = re.compile(r"(?:[?*+]|\{\d+(?:,\d*)?\}|\{,\d+\})")
_LITERAL = re.compile(r"[^\\()\[\]{}|?*+.^$]")


class NotUnderstoodError(ValueError):
    """A construct whose meaning might differ between the engines."""


class PatternSplitter:
    """Splits as ``Split(Regex(pattern), "isolated")`` of ``tokenizers`` does.

    Text in ASCII, in the basic plane and beyond each have a pattern of their own (a smaller
    character class is a faster one), made when first needed.
    """

    def __init__(self, pattern: str) -> None:
        """Translate ``pattern``.

        Raises:
            NotUnderstoodError: naming the construct.
        """
        self._covers = pattern == GPT2_PATTERN  # every character is in one of its classes
        self._pattern = _GPT2_FAST if self._covers else pattern
        self._by_tier: dict[int, Splitter] = {}
        self.ascii = self.of_tier(ASCII_END)

    def of_tier(self, tier: int) -> Splitter:
        """Return the function that splits texts of a tier.

        Raises:
            NotUnderstoodError: naming the construct.
        """
        splitter = self._by_tier.get(tier)
        if splitter is None:
            try:
                splitter = _finder(translate(self._pattern, tier), self._covers)
            except (re.error, UnknownClassError) as error:
                raise NotUnderstoodError(f"pattern {self._pattern!r}: {error}") from error
            self._by_tier[tier] = splitter
        return splitter

    def for_text(self, text: str) -> Splitter:
        """Return the function that splits ``text`` (and any text no richer in characters)."""
        return self.ascii if text.isascii() else self.of_tier(tier_of(text))


def translate(pattern: str, end: int) -> str:
    """Translate a pattern for texts whose code points are below ``end``.

    Raises:
        NotUnderstoodError: naming the construct and its place.
    """
    out: list[str] = []
    at = 0
    while at < len(pattern):
        token, at = _next_token(pattern, at, end)
        out.append(token)
    return "".join(out)


def _next_token(pattern: str, at: int, end: int) -> tuple[str, int]:
    if match := _ESCAPED_CLASS.match(pattern, at):
        ranges, negated = _named_class(match.group(), end)
        return _bracket(ranges, negated), match.end()
    if match := _ESCAPED_LITERAL.match(pattern, at):
        return match.group(), match.end()
    if match := _GROUP_START.match(pattern, at):
        # A capturing group would change what findall returns.
        return ("(?:" if match.group() == "(" else match.group()), match.end()
    if match := _QUANTIFIER.match(pattern, at):
        if at == 0:
            raise NotUnderstoodError(f"{pattern!r}: quantifier at the start")
        stop = match.end()
        possessive_or_lazy = pattern[stop : stop + 1] in ("+", "?")
        if possessive_or_lazy and match.group().startswith("{"):
            # "{1,3}+" repeats in one engine and is possessive in the other.
            raise NotUnderstoodError(f"{pattern!r}: '{match.group()}' followed by '+' or '?'")
        return pattern[at : stop + possessive_or_lazy], stop + possessive_or_lazy
    if pattern[at] == "[":
        return _translate_bracket(pattern, at, end)
    if pattern[at] in "|)":
        return pattern[at], at + 1
    if match := _LITERAL.match(pattern, at):
        return re.escape(match.group()), match.end()
    raise NotUnderstoodError(f"{pattern!r}: '{pattern[at : at + 4]}' at position {at}")


def _translate_bracket(pattern: str, start: int, end: int) -> tuple[str, int]:
    """Translate a character class ``[…]`` that starts at ``start``."""
    at = start + 1
    negated = pattern[at : at + 1] == "^"
    at += negated
    ranges: list[tuple[int, int]] = []
    while at < len(pattern) and pattern[at] != "]":
        if pattern[at] == "[" or pattern.startswith("&&", at):
            raise NotUnderstoodError(f"{pattern!r}: set operation at position {at}")
        if match := _ESCAPED_CLASS.match(pattern, at):
            named, complement = _named_class(match.group(), end)
            if complement:
                raise NotUnderstoodError(f"{pattern!r}: '{match.group()}' inside brackets")
            ranges.extend(named)
            at = match.end()
            continue
        low, at = _bracket_character(pattern, at)
        high = low
        if pattern[at : at + 1] == "-" and pattern[at + 1 : at + 2] not in ("]", ""):
            high, at = _bracket_character(pattern, at + 1)
        ranges.append((low, high + 1))
    if at >= len(pattern) or not ranges:
        raise NotUnderstoodError(f"{pattern!r}: brackets at position {start}")
    return _bracket(clip(tuple(sorted(ranges)), end), negated), at + 1


def _bracket_character(pattern: str, at: int) -> tuple[int, int]:
    if match := _ESCAPED_LITERAL.match(pattern, at):
        simple = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
        character = match.group()[1]
        return ord(simple.get(character, character)), match.end()
    if pattern[at] == "\\":
        raise NotUnderstoodError(f"{pattern!r}: '{pattern[at : at + 2]}' inside brackets")
    return ord(pattern[at]), at + 1


def _named_class(escape: str, end: int) -> tuple[Ranges, bool]:
    r"""Return the ranges of an escape and whether it means their complement (``\S``, ``\P``)."""
    negated = escape[1] in "SDP"
    if negated:
        escape = escape[0] + escape[1].lower() + escape[2:]
    return class_ranges(escape, end), negated


def _bracket(ranges: Ranges, negated: bool) -> str:
    if not ranges:
        return r"[\s\S]" if negated else r"(?!)"
    body = "".join(
        _hex(low) if high == low + 1 else f"{_hex(low)}-{_hex(high - 1)}" for low, high in ranges
    )
    return f"[{'^' if negated else ''}{body}]"


def _hex(code_point: int) -> str:
    return f"\\U{code_point:08x}"


def _finder(source: str, covers: bool) -> Splitter:
    """Compile; what lies between two matches is a piece of its own, as in ``Split``."""
    compiled = re.compile(source if covers else f"{source}|(?:(?!{source})[\\s\\S])+")
    if compiled.match("") is not None:
        raise NotUnderstoodError("the pattern matches the empty string")
    return compiled.findall
