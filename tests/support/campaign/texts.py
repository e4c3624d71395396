"""R14 and the JSON Lines reader: mutated configurations and mutated corpora."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from support.campaign.config_fuzz import RICH, misspellings, mutated, outcome
from support.campaign.row import Bench, Trial, attempt, must

from megatron.config.canonical import accepted_keys
from megatron.data.ingest.pipeline import PreprocessSettings, preprocess
from megatron.data.reader import TokenReader
from megatron.errors import NeomixError

SUGGESTIONS = 200


def mutated_configurations(bench: Bench, trials: int) -> Iterator[Trial]:
    """R14: mutated files and overrides end in a configuration or in one error."""
    file = bench.folder / "config.yml"
    for number in range(trials):
        chance = bench.chance(number)
        yield attempt(partial(_mutation, file, chance))
    yield attempt(partial(_suggestions, file, bench.chance("suggestions")))


def _mutation(file: Path, chance: random.Random) -> None:
    text, overrides = mutated(chance)
    try:
        outcome(file, text, overrides)
    except Exception as error:
        raise AssertionError(f"{error!r}\n{overrides}\n{text}") from error


def _suggestions(file: Path, chance: random.Random) -> None:
    own = [key for key in accepted_keys() if key not in RICH.replace("-", "_")]
    pairs = misspellings(chance, own, SUGGESTIONS)
    right = sum(
        f"did you mean '{name}'?" in str(outcome(file, RICH + f"{wrong}: 1\n", []))
        for name, wrong in pairs
    )
    must(right >= 0.95 * len(pairs), f"{right} of {len(pairs)} suggestions were right")


LINES = (
    '{"text": "good", "id": 1}', '{"text": ""}', '{"text": ["a", "b"]}', '"bare"', "", "  ",
    '{"text": "\\ud83d\\ude00 \\u00e9"}', '{"text": "a\\nb", "meta": {"x": [1, null]}}',
)  # fmt: skip
PIECES = (
    b"\xff\xfe", b"\x00", b"{", b"}", b'"', b"\\u", b"\\ud800", b"[" * 3000, b"1e999", b"NaN",
    b"\r", b"\r\n", b"\xef\xbb\xbf", b"null", b"\xe2\x80\xa8", b"9" * 5000, b'{"text": 1}',
)  # fmt: skip


def mutated_lines(bench: Bench, trials: int) -> Iterator[Trial]:
    """Mutated JSON Lines are read whole, or end in one error that names the line."""
    for number in range(trials):
        yield attempt(partial(_lines_once, bench, number))


def corpus(chance: random.Random) -> bytes:
    """Return JSON Lines with a few random changes of bytes."""
    lines = [chance.choice(LINES).encode() for _ in range(chance.randint(1, 8))]
    content = bytearray(b"\n".join([*lines, b""]))
    for _ in range(chance.randint(1, 3)):
        at, kind = chance.randrange(len(content) + 1), chance.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[at:at] = chance.choice(PIECES)
        elif kind == 2:
            del content[at : at + chance.randint(1, 20)]
        elif kind == 3:
            content[at:at] = chance.randbytes(chance.randint(1, 6))
        else:
            del content[at:]
    return bytes(content)


def _lines_once(bench: Bench, number: int) -> None:
    folder, chance = bench.fresh(f"lines{number}"), bench.chance(number)
    (folder / "x.jsonl").write_bytes(content := corpus(chance))
    settings = PreprocessSettings(
        inputs=(str(folder / "x.jsonl"),),
        output_prefix=str(folder / "out"),
        tokenizer_type="CharLevelTokenizer",
    )
    try:
        preprocess(settings)
    except NeomixError as error:
        text = str(error)
        must("x.jsonl" in text, f"does not name the file: {text}\n{content!r}")
        must(error.exit_code == 2, f"exit code {error.exit_code}")
        must(not (folder / "out_text_document.idx").exists(), "an output looks complete")
        return
    expected = [text for text in map(_document, content.split(b"\n")) if text]
    with TokenReader(str(folder / "out_text_document")) as reader:
        found = [
            reader.read(reader.document_start(place), reader.document_start(place + 1)).tolist()
            for place in range(reader.num_documents)
        ]
    must(
        found == [list(text.encode()) for text in expected],
        f"{found}\nis not what Python reads of\n{content!r}",
    )


def _document(line: bytes) -> str:
    """Return a line's text as Python's own reader sees it."""
    text = line.decode("utf-8").removeprefix("\ufeff")
    if not text.strip():
        return ""
    record = json.loads(text)
    value = record if isinstance(record, str) else record["text"]
    return value if isinstance(value, str) else "\n\n".join(value)
