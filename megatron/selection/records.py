"""What is text in a record: a field, a conversation, or a prompt and its completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from megatron.data.ingest.records import (
    PARAGRAPH_JOIN,
    BadRecordError,
    json_name,
    shown_keys,
    sound_text,
)
from megatron.errors import did_you_mean
from megatron.selection.base import ANSWERING, Turn

CONVERSATIONS: Final = ("messages", "conversation")
PROMPT, COMPLETION, TEXT, ID = "prompt", "completion", "text", "id"

Content = tuple[str, tuple[Turn, ...]]


def wanted_columns(columns: Sequence[str], field: str | None) -> tuple[str, ...]:
    """Return the columns of a table that decide its documents, in the table's order.

    Args:
        columns: all there are.
        field: that the user named, or None.

    Raises:
        BadRecordError: none of them holds text.
    """
    known = {field} if field is not None else {*CONVERSATIONS, PROMPT, COMPLETION, TEXT}
    if not known.intersection(columns):
        raise _no_text(dict.fromkeys(columns), field)
    return tuple(name for name in columns if name in known or name == ID)


def content(record: Any, field: str | None) -> Content:
    """Return the text of a record, and its turns if it is a conversation.

    Without ``field`` the first of these counts that is there and not null: ``messages`` or
    ``conversation`` (turns with ``role`` and ``content``), ``prompt`` and ``completion`` (a turn of
    the user and one of the assistant), ``text``.  A record that is a bare string is text itself.

    Args:
        record: as read.
        field: whose value is the text or the conversation; None finds out.

    Raises:
        BadRecordError: nothing of it is there, or it is neither text nor turns.
    """
    if isinstance(record, str) and field in (None, TEXT):
        return sound_text(record, TEXT), ()
    if not isinstance(record, Mapping):
        raise BadRecordError(f"{json_name(record)}, not a JSON object")
    if field is not None:
        if record.get(field) is None:
            raise _no_text(record, field)
        return _value(record[field], field)
    for key in CONVERSATIONS:
        if record.get(key) is not None:
            return _value(record[key], key)
    if record.get(PROMPT) is not None and record.get(COMPLETION) is not None:
        turns = (
            *_as_turns(record[PROMPT], "user", PROMPT),
            *_as_turns(record[COMPLETION], ANSWERING, COMPLETION),
        )
        return _joined(turns), turns
    if record.get(TEXT) is not None:
        return _value(record[TEXT], TEXT)
    raise _no_text(record, field)


def own_id(record: Any) -> str | None:
    """Return a record's own id; None if it has none."""
    value = record.get(ID) if isinstance(record, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    name = str(value)
    # An id that is no valid text could not be written down.
    return name if name and not any("\ud800" <= letter <= "\udfff" for letter in name) else None


def _value(value: Any, key: str) -> Content:
    if isinstance(value, str):
        return sound_text(value, key), ()
    if isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        return sound_text(PARAGRAPH_JOIN.join(value), key), ()
    turns = _turns(value, key)
    return _joined(turns), turns


def _as_turns(value: Any, role: str, key: str) -> tuple[Turn, ...]:
    if isinstance(value, str):
        return (Turn(role=role, content=sound_text(value, key)),)
    return _turns(value, key)


def _turns(value: Any, key: str) -> tuple[Turn, ...]:
    if not isinstance(value, Sequence) or not value:
        raise BadRecordError(f"'{key}' is {json_name(value)}, neither text nor a list of turns")
    return tuple(_turn(one, f"{key}[{number}]") for number, one in enumerate(value))


def _turn(value: Any, place: str) -> Turn:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise BadRecordError(f'\'{place}\' is no turn: {{"role": …, "content": …}}')
    if "content" not in value:
        raise BadRecordError(f"'{place}' has no 'content'{did_you_mean('content', value)}")
    return Turn(role=value["role"], content=sound_text(_spoken(value["content"], place), place))


def _spoken(value: Any, place: str) -> str:
    """Return what a turn says: its text, or the texts of its parts."""
    if value is None:  # a turn that calls a tool
        return ""
    if isinstance(value, str):
        return value
    said = []
    for part in value if isinstance(value, Sequence) else [value]:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise BadRecordError(f"the content of '{place}' is not text")
        said.append(part["text"])
    return "\n".join(said)


def _joined(turns: Sequence[Turn]) -> str:
    return "\n".join(turn.content for turn in turns)


def _no_text(record: Mapping[str, Any], field: str | None) -> BadRecordError:
    has = shown_keys(record)
    if field is not None:
        if field in record:
            return BadRecordError(f"'{field}' is null, not text")
        return BadRecordError(
            f"no key '{field}'{did_you_mean(field, record)} {has}; name the right one with --field"
        )
    return BadRecordError(
        f"no 'text', 'messages', 'conversation', or 'prompt' and 'completion' {has}; name the key "
        "that holds the text or the conversation with --field"
    )
