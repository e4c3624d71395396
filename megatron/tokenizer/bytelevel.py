"""Reading a tokenizer.json: is it a byte-level BPE of which every part is understood?

The fast path may only be taken where it is provably the same function.  Everything here
answers "yes, and these are its parts" or "no, because …"; the reason goes to the log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megatron.tokenizer.pattern import GPT2_PATTERN, NotUnderstoodError

_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_MODEL_KEYS = frozenset(
    {
        "type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
        "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is found in the text by its name, before anything is split."""

    content: str
    id: int
    normalized: bool


@dataclass(frozen=True, kw_only=True)
class ByteLevelBPE:
    """The parts of a byte-level BPE.

    Attributes:
        patterns: regular expressions that split the text, one after the other.
        add_prefix_space: whether a segment that does not start with a space gets one.
        normalizes: whether text that is not ASCII goes through a Unicode normal form first.
        byte_ids: id of each of the 256 bytes.
        merges: for each merge, in order of rank: the two parts and the id they become.
        dropped_merges: number of merges left out because they can never happen.
        whole_words: pieces that are one token before any merge (``ignore_merges``).
        added: tokens found by name.
        prefix, suffix: ids put around every document.
    """

    patterns: tuple[str, ...]
    add_prefix_space: bool
    normalizes: bool
    byte_ids: tuple[int, ...]
    merges: tuple[tuple[bytes, bytes, int], ...]
    dropped_merges: int
    whole_words: Mapping[bytes, int]
    added: tuple[AddedToken, ...]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def byte_alphabet() -> dict[str, int]:
    """Return the 256 printable characters by which a byte-level vocabulary writes bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


class ByteWriting:
    """How a byte-level vocabulary writes bytes as characters, both ways."""

    def __init__(self) -> None:
        """Make the tables."""
        alphabet = byte_alphabet()
        self._to_character = {byte: character for character, byte in alphabet.items()}
        # Latin-1 carries bytes as characters; anything outside the alphabet must not pass.
        self._to_byte = dict.fromkeys(range(256), "\uffff")
        self._to_byte.update({ord(character): chr(byte) for character, byte in alphabet.items()})

    def read(self, written: str) -> bytes:
        """Return the bytes; raises KeyError for a character that stands for none."""
        try:
            return written.translate(self._to_byte).encode("latin-1")
        except UnicodeEncodeError:
            raise KeyError(written) from None

    def write(self, token: bytes) -> str:
        """Return bytes as the vocabulary writes them."""
        return token.decode("latin-1").translate(self._to_character)


def parse_byte_level(serialized: str) -> ByteLevelBPE:
    """Take a serialized ``tokenizers.Tokenizer`` apart.

    Args:
        serialized: what ``Tokenizer.to_str()`` gives.

    Raises:
        NotUnderstoodError: it is something else, or a part has a meaning not covered here.
    """
    content = json.loads(serialized)
    model = content["model"]
    _check_model(model)
    patterns, add_prefix_space = _parse_pre_tokenizer(content.get("pre_tokenizer"))
    normalizes = _parse_normalizer(content.get("normalizer"))
    prefix, suffix = _parse_post_processor(content.get("post_processor"))
    alphabet = byte_alphabet()
    vocabulary: dict[str, int] = model["vocab"]
    lacking = [character for character in alphabet if character not in vocabulary]
    if lacking:
        raise NotUnderstoodError(f"the vocabulary lacks {len(lacking)} of the 256 bytes")
    byte_ids = [0] * 256
    for character, byte in alphabet.items():
        byte_ids[byte] = vocabulary[character]
    writing = ByteWriting()
    merges = _parse_merges(model["merges"], vocabulary, writing)
    return ByteLevelBPE(
        patterns=patterns,
        add_prefix_space=add_prefix_space,
        normalizes=normalizes,
        byte_ids=tuple(byte_ids),
        merges=merges,
        dropped_merges=len(model["merges"]) - len(merges),
        whole_words=_whole_words(vocabulary, writing) if model.get("ignore_merges") else {},
        added=_parse_added(content.get("added_tokens") or []),
        prefix=prefix,
        suffix=suffix,
    )


def _check_model(model: Mapping[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise NotUnderstoodError(f"the model is {model.get('type')}, not BPE")
    if unknown := sorted(model.keys() - _MODEL_KEYS):
        raise NotUnderstoodError(f"the model has the unknown field '{unknown[0]}'")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            raise NotUnderstoodError(f"the model sets {field}")


def _parse_pre_tokenizer(content: Mapping[str, Any] | None) -> tuple[tuple[str, ...], bool]:
    steps = _steps(content, "pretokenizers")
    if not steps or steps[-1].get("type") != "ByteLevel":
        raise NotUnderstoodError("the pre-tokenizer does not end with ByteLevel")
    *splits, last = steps
    patterns = [_split_pattern(step) for step in splits]
    if last.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    if not patterns:
        raise NotUnderstoodError("the pre-tokenizer does not split")
    add_prefix_space = bool(last.get("add_prefix_space", True))
    if add_prefix_space and splits:
        raise NotUnderstoodError("add_prefix_space after a split")
    return tuple(patterns), add_prefix_space


def _split_pattern(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern") or {}
    if (
        step.get("type") != "Split"
        or step.get("behavior") != "Isolated"
        or step.get("invert")
        or "Regex" not in pattern
    ):
        raise NotUnderstoodError(f"the pre-tokenizer step {step.get('type')}")
    return str(pattern["Regex"])


def _parse_normalizer(content: Mapping[str, Any] | None) -> bool:
    steps = _steps(content, "normalizers")
    for step in steps:
        if step.get("type") not in _NORMALIZERS:
            raise NotUnderstoodError(f"the normalizer {step.get('type')}")
    return bool(steps)


def _parse_post_processor(
    content: Mapping[str, Any] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids put before and after a single text."""
    template: Mapping[str, Any] | None = None
    for step in _steps(content, "processors"):
        if step.get("type") == "ByteLevel":
            continue
        if step.get("type") != "TemplateProcessing" or template is not None:
            raise NotUnderstoodError(f"the post-processor {step.get('type')}")
        template = step
    before: list[int] = []
    after: list[int] = []
    seen = template is None
    for part in template["single"] if template else ():
        if "Sequence" in part:
            if seen:
                raise NotUnderstoodError("a template that repeats the text")
            seen = True
        else:
            assert template is not None
            ids = template["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            (after if seen else before).extend(ids)
    if not seen:
        raise NotUnderstoodError("a template without the text")
    return tuple(before), tuple(after)


def _parse_merges(
    merges: Sequence[Any], vocabulary: Mapping[str, int], writing: ByteWriting
) -> tuple[tuple[bytes, bytes, int], ...]:
    """Check the merges and return them as bytes, without those that can never happen.

    What is checked here, and that the text of every token encodes to that token (checked by
    the encoder), make "merge the adjacent pair whose concatenation has the lowest rank"
    (tiktoken) the same as "merge the adjacent pair with the lowest rank" (tokenizers): where
    two adjacent pieces spell a token, everything between their outer ends has evolved as the
    token's text does on its own under the lower ranks, so they are the token's own halves.
    Some files list several merges for one token, one behind the other; those whose halves
    rank higher than the token are the ones that can never happen.
    """
    # Every half is a byte or a token made before, so its bytes are known when it comes up.
    spelled = {writing.write(bytes((byte,))): bytes((byte,)) for byte in range(256)}
    ranks = dict.fromkeys(spelled, -1)
    parsed: list[tuple[bytes, bytes, int]] = []
    last, usable = "", True
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        whole = left + right
        if whole not in vocabulary:
            raise NotUnderstoodError(f"the merge {left!r} {right!r} makes no token")
        if whole != last:
            if not usable or whole in ranks:
                raise NotUnderstoodError(f"the merges of {(whole if usable else last)!r}")
            last, usable = whole, False
            ranks[whole] = rank
        own = ranks[whole]
        if ranks.get(left, own) < own and ranks.get(right, own) < own:
            parsed.append((spelled[left], spelled[right], vocabulary[whole]))
            spelled[whole] = spelled[left] + spelled[right]
            usable = True
    if not usable:
        raise NotUnderstoodError(f"the merges of {last!r} come before its halves")
    return tuple(parsed)


def _whole_words(vocabulary: Mapping[str, int], writing: ByteWriting) -> dict[bytes, int]:
    words = {}
    for word, token in vocabulary.items():
        with suppress(KeyError):  # a name such as "<|begin|> x" that is no text
            words[writing.read(word)] = token
    return words


def _parse_added(tokens: Sequence[Mapping[str, Any]]) -> tuple[AddedToken, ...]:
    parsed = []
    for token in tokens:
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise NotUnderstoodError(f"the added token {token['content']!r} sets {flag}")
        parsed.append(
            AddedToken(
                content=token["content"],
                id=int(token["id"]),
                normalized=bool(token.get("normalized", not token.get("special"))),
            )
        )
    return tuple(parsed)


def _steps(content: Mapping[str, Any] | None, field: str) -> list[Mapping[str, Any]]:
    """Return a component as a list of its steps: nothing, itself, or a Sequence's members."""
    if content is None:
        return []
    if content.get("type") != "Sequence":
        return [content]
    if field not in content:
        raise NotUnderstoodError(f"a Sequence without '{field}'")
    return [step for member in content[field] for step in _steps(member, field)]
