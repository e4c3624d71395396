"""Whether an answer follows instructions of IFEval (Zhou et al. 2023, table 1), without a library.

Names, arguments and meanings of the instructions are that benchmark's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Check = Callable[[str, Mapping[str, Any]], bool]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Judge one answer; called by lm-eval.

    Args:
        doc: with ``instruction_id_list`` and, for each instruction, ``kwargs``.
        results: the answer.

    Raises:
        ValueError: an instruction is not known here.
    """
    followed = [
        follows(name, results[0], {key: one for key, one in kwargs.items() if one is not None})
        for name, kwargs in zip(doc["instruction_id_list"], doc["kwargs"], strict=True)
    ]
    return {"prompt_level_strict_acc": all(followed), "inst_level_strict_acc": followed}


def share_followed(items: Iterable[Sequence[bool]]) -> float:
    """Return the share of all instructions that were followed; called by lm-eval."""
    flat = [one for item in items for one in item]
    return sum(flat) / len(flat)


def follows(instruction: str, answer: str, arguments: Mapping[str, Any]) -> bool:
    """Tell whether an answer follows an instruction; an empty answer follows none.

    Raises:
        ValueError: the instruction is not known.
    """
    if instruction not in CHECKS:
        raise ValueError(
            f"instruction '{instruction}' cannot be checked here (known: {', '.join(CHECKS)}); "
            "leave the question out, or use lm-eval's own task ifeval"
        )
    return bool(answer.strip()) and CHECKS[instruction](answer, arguments)


def _compared(count: int, wanted: int, relation: str) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _occurs(word: str, answer: str) -> int:
    return len(re.findall(word, answer, flags=re.IGNORECASE))


def _forbidden(answer: str, arguments: Mapping[str, Any]) -> bool:
    return not any(
        re.search(rf"\b{word}\b", answer, flags=re.IGNORECASE)
        for word in arguments["forbidden_words"]
    )


def _paragraphs(answer: str, arguments: Mapping[str, Any]) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    # An end mark before the first or after the last paragraph is no paragraph more.
    inner = parts[int(not parts[0]) : len(parts) - int(len(parts) > 1 and not parts[-1])]
    return all(inner) and len(inner) == arguments["num_paragraphs"]


def _is_json(answer: str, arguments: Mapping[str, Any]) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, a: all(_occurs(word, text) for word in a["keywords"]),
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": lambda text, a: _compared(
        _occurs(a["keyword"], text), a["frequency"], a["relation"]
    ),
    "keywords:letter_frequency": lambda text, a: _compared(
        text.lower().count(a["letter"].lower()), a["let_frequency"], a["let_relation"]
    ),
    "length_constraints:number_words": lambda text, a: _compared(
        len(re.findall(r"\w+", text)), a["num_words"], a["relation"]
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "detectable_format:number_bullet_lists": lambda text, a: (
        len(re.findall(r"^\s*(?:\*[^\*]|-).*$", text, flags=re.MULTILINE)) == a["num_bullets"]
    ),
    "detectable_format:title": lambda text, a: any(
        title.strip(" <>") for title in re.findall(r"<<[^\n]+>>", text)
    ),
    "detectable_format:json_format": _is_json,
    "change_case:english_capital": lambda text, a: text.isupper(),
    "change_case:english_lowercase": lambda text, a: text.islower(),
    "punctuation:no_comma": lambda text, a: "," not in text,
    "startend:end_checker": lambda text, a: (
        text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower())
    ),
    "startend:quotation": lambda text, a: (
        len(text.strip()) > 1 and text.strip()[0] == '"' and text.strip()[-1] == '"'
    ),
}
"""By their names in the benchmark."""
