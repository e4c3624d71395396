"""The checks of instructions that come with the ready task files."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from support.runs import ROOT


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    file = ROOT / "configs" / "tasks" / "ifeval_local.py"
    spec = importlib.util.spec_from_file_location("ifeval_local", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = [
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, "A dog and a CAT.", "A dog."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "Concatenate.", "The Cat sat."),
    (
        "keywords:frequency",
        {"keyword": "ha", "frequency": 2, "relation": "at least"},
        "Ha, ha",
        "ha",
    ),
    (
        "keywords:frequency",
        {"keyword": "ha", "frequency": 2, "relation": "less than"},
        "ha",
        "ha ha",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 2, "let_relation": "at least"},
        "bee",
        "be",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "two words",
        "three words here",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one *** two ***", "one"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
    ("detectable_format:title", {}, "<<A title>> text", "<<>> text"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("change_case:english_capital", {}, "LOUD!", "Loud!"),
    ("change_case:english_lowercase", {}, "soft.", "Soft."),
    ("punctuation:no_comma", {}, "no.", "no, no."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So it was. the end."', "The end. No."),
    ("startend:quotation", {}, ' "said" ', '"'),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_instructions_are_told_from_their_breach(checks, name, arguments, good, bad):
    assert checks.follows(name, good, arguments)
    assert not checks.follows(name, bad, arguments)
    assert not checks.follows(name, " \n", arguments)


def test_every_instruction_has_a_case(checks):
    assert {name for name, *_ in CASES} == set(checks.CHECKS)


def test_questions_and_instructions_are_counted(checks):
    doc = {
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        # Rows of a table have every argument, most of them empty.
        "kwargs": [{"keywords": None}, {"keywords": None}],
    }
    results = [checks.process_results(doc, [answer]) for answer in ("fine", "Fine", "Bad, bad")]
    assert [one["prompt_level_strict_acc"] for one in results] == [True, False, False]
    assert checks.share_followed([one["inst_level_strict_acc"] for one in results]) == 0.5


def test_an_unknown_instruction_is_named(checks):
    with pytest.raises(ValueError, match=r"language:response_language.*cannot be checked here"):
        checks.follows("language:response_language", "text", {"language": "de"})
