"""``generate.py``'s samples: prompts in, JSON lines out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.inference.crew import Crew, Decoding
from megatron.inference.generate import Prompt
from megatron.inference.stop import StopStrings


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What became of one prompt; the fields are GPT-NeoX's.

    Attributes:
        context: the prompt.
        text: what follows it.
        length: tokens of that.
        finished: whether it came to an end before it was as long as allowed.
        message: what hindered it, if anything.
        duration_seconds: that its batch took.
        logits: of every token id for each token of the text, where they were asked for.
    """

    context: str
    text: str
    length: int
    finished: bool
    message: str | None
    duration_seconds: float
    logits: list[list[float]] | None = None

    def line(self) -> dict[str, Any]:
        """Return the sample as it is written."""
        line: dict[str, Any] = {
            "context": self.context,
            "text": self.text,
            "length": self.length,
            "finished": self.finished,
            "message": self.message,
            "duration_seconds": self.duration_seconds,
        }
        return line if self.logits is None else {**line, "logits": self.logits}


def write_samples(
    crew: Crew,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    maximum_tokens: int,
    repeats: int = 1,
    first: int = 0,
) -> Iterator[Sample]:
    """Yield samples in the order of the prompts, in groups of what the ranks run at once.

    On rank 0, while it leads the crew.

    Args:
        crew: writes.
        prompts: texts; an empty one begins a document.
        decoding: how tokens are drawn.
        maximum_tokens: longest text.
        repeats: samples for each prompt.
        first: number of the first sample; with the seed it decides what is drawn.
    """
    texts = [prompt for prompt in prompts for _ in range(repeats)]
    together = crew.model.rows * crew.model.topology.data_size
    stop = StopStrings(decoding.stop, crew.tokenizer.decode)
    for begin in range(0, len(texts), together):
        group = texts[begin : begin + together]
        started = time.perf_counter()
        tokens = [crew.tokenizer.encode(text) or [crew.tokenizer.eod] for text in group]
        room = [crew.model.longest - len(row) for row in tokens]
        asked = [
            Prompt(
                tokens=row,
                number=first + begin + place,
                new_tokens=min(maximum_tokens, room[place]),
            )
            for place, row in enumerate(tokens)
            if room[place] > 0
        ]
        found = {
            prompt.number: one
            for prompt, one in zip(asked, crew.generate(asked, decoding), strict=True)
        }
        seconds = time.perf_counter() - started
        for place, text in enumerate(group):
            one = found.get(first + begin + place)
            kept = [] if one is None else one.tokens
            yield Sample(
                context=text,
                text=stop.cut(crew.tokenizer.decode(kept)) if kept else "",
                length=len(kept),
                finished=one is not None and one.finished,
                message=_message(len(tokens[place]), room[place], maximum_tokens, crew),
                duration_seconds=seconds,
                logits=(one.logits if one is not None else []) if decoding.logits else None,
            )


def _message(length: int, room: int, wanted: int, crew: Crew) -> str | None:
    longest = crew.model.longest
    if room <= 0:
        return (
            f"text generation did not start: the context has {length} tokens, and the model takes "
            f"{longest} in all"
        )
    if room < wanted:
        return f"only {room} tokens fit behind the context of {length}: the model takes {longest}"
    return None
