"""Conversations to tokens and labels, through a tokenizer's own chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

from megatron.data.ingest.sources import Source, find_sources
from megatron.data.ingest.streams import read_blocks
from megatron.data.samples import UNTRAINED
from megatron.errors import ConfigError, DataError, MissingExtraError
from megatron.tokenizer.chat import chat_tokenizer

_CHUNK = 25


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How conversations become documents.

    Attributes:
        tokenizer_path: folder (or hub name) of a Hugging Face tokenizer with a chat template.
        keys: fields that hold conversations, each written to a dataset of its own.
        role: whose turns are trained on.
        mask: whether other turns are left out of the loss.
        only_last: train on the last turn alone.
        for_rm: train on the last token alone, for a reward model.
        reward_key: field of a number that is written beside; None = none.
        binary_reward: write 1 for a true reward and -1 for a false one.
        ftfy: repair the text first.
    """

    tokenizer_path: str
    keys: tuple[str, ...] = ("conversation",)
    role: str = "assistant"
    mask: bool = True
    only_last: bool = False
    for_rm: bool = False
    reward_key: str | None = None
    binary_reward: bool = False
    ftfy: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatDocument:
    """A conversation: tokens, as many labels, the bytes of its text, and its reward if any."""

    tokens: list[int]
    labels: list[int]
    text_bytes: int
    reward: int | None = None


def read_conversations(inputs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the lines of JSON-lines inputs, each with its place.

    Raises:
        DataError: an input does not exist, or is of another format.
    """
    for source in find_sources(inputs):
        if source.kind != "jsonl":
            raise DataError(f"{source.path}: conversations are read from JSON lines (.jsonl)")
        number, rest = 0, b""
        for block in _blocks(source):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                if line.strip():
                    yield f"{source.path}, line {number}", line.decode("utf-8", "replace")
        if rest.strip():
            yield f"{source.path}, line {number + 1}", rest.decode("utf-8", "replace")


def _blocks(source: Source) -> Iterator[bytes]:
    if source.compression:
        yield from (block for block, _ in read_blocks(source.path, source.compression))
        return
    with open(source.path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def encode_conversations(
    inputs: Sequence[str], settings: ChatSettings, *, workers: int
) -> Iterator[list[ChatDocument]]:
    """Yield, for every record, its conversations in the order of the keys.

    Raises:
        DataError: a record cannot be used, naming its file and line.
    """
    chat_tokenizer(settings.tokenizer_path)
    encode = partial(encode_record, settings=settings)
    records = read_conversations(inputs)
    if workers == 1:
        yield from map(encode, records)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(encode, records, chunksize=_CHUNK)


def encode_record(record: tuple[str, str], settings: ChatSettings) -> list[ChatDocument]:
    """Encode the conversations of one line; see :func:`encode_conversations`."""
    place, line = record
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: no JSON") from None
    if not isinstance(content, dict):
        raise DataError(f"{place}: not a JSON object")
    found = []
    reward = _reward(content, settings, place)
    for key in settings.keys:
        if key not in content:
            raise DataError(f"{place}: there is no key '{key}' (there are {', '.join(content)})")
        turns = _turns(content[key], settings, f"{place}, '{key}'")
        try:
            tokens, labels = build_chat(turns, chat_tokenizer(settings.tokenizer_path), settings)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{place}, '{key}': {error}") from None
        except Exception as error:  # templates raise what jinja's classes are
            raise DataError(f"{place}, '{key}': the chat template refuses it: {error}") from None
        size = sum(len(str(turn["content"]).encode()) for turn in turns)
        document = ChatDocument(tokens=tokens, labels=labels, text_bytes=size, reward=reward)
        found.append(document)
    return found


def build_chat(
    turns: Sequence[Mapping[str, Any]], tokenizer: Any, settings: ChatSettings
) -> tuple[list[int], list[int]]:
    """Return a conversation's tokens and labels.

    The template is applied to the turns so far, one turn more each time, and what is new belongs
    to that turn; what it says before an answer (``add_generation_prompt``) belongs to the turn
    before.  An end-of-sequence token ends the document.

    Raises:
        ValueError: the template changes earlier turns, so that tokens belong to none; or a
            reward model's data is asked for, and there is no end-of-sequence token.
    """
    if not settings.mask:
        tokens = _template(tokenizer, turns)
        return tokens, list(tokens)
    end = tokenizer.eos_token_id
    if settings.for_rm:
        if end is None:
            raise ValueError("the tokenizer has no end-of-sequence token, which --for-rm trains on")
        tokens = _template(tokenizer, turns)
        # The label of a token stands at its own place, so the one that is predicted is the last.
        labels = [UNTRAINED] * (len(tokens) + 1) + [end]
        return [*tokens, end, end], labels
    tokens, labels = [], []
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        prompts = not last and turns[number + 1]["role"] == settings.role
        whole = _template(tokenizer, turns[: number + 1])
        if prompts:
            asked = _template(tokenizer, turns[: number + 1], prompts=True)
            # A template may have no such words before this role's turns.
            if _template(tokenizer, turns[: number + 2])[: len(asked)] == asked:
                whole = asked
        if whole[: len(tokens)] != tokens:
            raise ValueError(
                f"the chat template writes earlier turns anew at turn {number + 1}, so that no "
                "token can be said to be an answer's; use --no-mask, or another template"
            )
        new = whole[len(tokens) :]
        trained = turn["role"] == settings.role and (last or not settings.only_last)
        tokens.extend(new)
        labels.extend(new if trained else [UNTRAINED] * len(new))
    if end is not None:
        labels.append(end if labels and labels[-1] != UNTRAINED else UNTRAINED)
        tokens.append(end)
    return tokens, labels


def _template(tokenizer: Any, turns: Sequence[Any], *, prompts: bool = False) -> list[int]:
    ids = tokenizer.apply_chat_template(
        list(turns), tokenize=True, add_generation_prompt=prompts, return_dict=False
    )
    return [int(token) for token in ids]


def _turns(value: Any, settings: ChatSettings, place: str) -> list[dict[str, Any]]:
    sound = isinstance(value, list) and value
    if not sound or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in value):
        raise DataError(f"{place}: should be a list of turns: {{'role': …, 'content': …}}")
    if not settings.ftfy:
        return list(value)
    try:
        from ftfy import fix_text
    except ImportError:
        raise MissingExtraError("ftfy", "train", "--ftfy") from None
    return [
        {**turn, "content": fix_text(turn["content"])}
        if isinstance(turn["content"], str)
        else dict(turn)
        for turn in value
    ]


def _reward(content: Mapping[str, Any], settings: ChatSettings, place: str) -> int | None:
    key = settings.reward_key
    if key is None:
        return None
    if key not in content:
        raise DataError(f"{place}: there is no key '{key}', which --reward-key names")
    reward = content[key]
    if settings.binary_reward:
        return 1 if reward else -1
    if not isinstance(reward, (int, float)) or reward != int(reward):
        raise DataError(
            f"{place}: '{key}' is {reward!r}, and rewards are stored as whole numbers; scale them, "
            "or use --binary-reward"
        )
    return int(reward)


def check_settings(settings: ChatSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: naming the flags.
    """
    if settings.for_rm and not settings.mask:
        raise ConfigError("--for-rm trains on one token, --no-mask on all; give one of the two")
    if settings.binary_reward and settings.reward_key is None:
        raise ConfigError("--binary-reward needs --reward-key, the field that holds it")
