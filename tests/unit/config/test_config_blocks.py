"""Blocks of options within a mixing method's options: read, refused, documented."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
import yaml
from pydantic import ValidationError

from megatron.config.mixing import option_model, typed_options
from megatron.config.option_blocks import keys_at
from megatron.config.reference import _rows
from megatron.config.schema import properties
from megatron.errors import ConfigError
from megatron.mixing.options import CommonOptions, read_options
from megatron.mixing.reading import Block, describe_type
from megatron.registry import MixingMethod


@dataclass(frozen=True, kw_only=True)
class Watch(Block):
    """A block with a shorter form."""

    shorthand: ClassVar[Any] = Literal["strict", "mild"]

    mode: Literal["strict", "mild"] = field(default="mild", metadata={"help": "how much"})
    retry_after: int = field(default=10, metadata={"help": "rest", "unit": "steps"})
    shares: dict[str, float] | None = field(default=None, metadata={"help": "by name"})

    def __post_init__(self) -> None:
        """Check the range."""
        if self.retry_after < 1:
            raise ConfigError(f"retry_after is {self.retry_after}; it must be at least 1")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Take the mode alone."""
        return {"mode": value} if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Blocks wherever one can stand."""

    watch: Watch = field(default=Watch(), metadata={"help": "the watch"})
    other: Watch | None = field(default=None, metadata={"help": "another or none"})
    named: dict[str, Watch] | None = field(default=None, metadata={"help": "by name"})
    listed: list[Watch] | None = field(default=None, metadata={"help": "in order"})


METHOD = MixingMethod(name="made", options=Options, needs=frozenset(), build=lambda **_: None)
STRICT = {"mode": "strict", "retry_after": 10, "shares": None}


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({}, "watch", Watch()),
        ({}, "other", None),
        ({"watch": "strict"}, "watch", Watch(mode="strict")),
        ({"watch": {"mode": "strict"}}, "watch", Watch(mode="strict")),
        ({"other": {"retry_after": 3}}, "other", Watch(retry_after=3)),
        ({"other": None}, "other", None),
        ({"named": {"a": "strict", "b": {}}}, "named", {"a": Watch(mode="strict"), "b": Watch()}),
        ({"listed": ["mild", {"shares": {"x": 1}}]}, "listed", [Watch(), Watch(shares={"x": 1})]),
    ],
)
def test_both_readers_agree(given, name, value):
    assert getattr(read_options(Options, "made", given), name) == value
    resolved = typed_options(METHOD, given)
    assert getattr(read_options(Options, "made", resolved), name) == value
    assert typed_options(METHOD, resolved) == resolved


def test_a_built_block_is_taken_as_it_is():
    assert read_options(Options, "made", {"watch": Watch(mode="strict")}).watch.mode == "strict"


def test_what_is_resolved_is_plain():
    resolved = typed_options(METHOD, {"watch": "strict", "named": {"a-b": "strict"}})
    assert resolved["watch"] == STRICT
    assert resolved["named"] == {"a-b": STRICT}  # a name keeps its hyphen


def test_whole_numbers_and_hyphens_are_read_within_a_block():
    resolved = typed_options(METHOD, {"watch": {"retry-after": 1e3}})
    assert resolved["watch"]["retry_after"] == 1000
    assert isinstance(resolved["watch"]["retry_after"], int)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"watch": {"retry_aftr": 1}}, "watch has no option 'retry_aftr'; did you mean 'retry_a"),
        ({"named": {"a": {"mod": "mild"}}}, "named.a has no option 'mod'; did you mean 'mode'"),
        ({"listed": [{}, {"mod": "mild"}]}, r"listed\[1\] has no option 'mod'"),
        ({"watch": {"retry_after": 0}}, "made': watch: retry_after is 0; it must be at least 1"),
        ({"watch": {"retry_after": "x"}}, "watch: retry_after is 'x'"),
        ({"watch": 3}, "it must be one of 'strict', 'mild' or a mapping of mode, retry_after"),
        ({"watch": None}, "watch is None"),
        ({"other": [1]}, "other is "),
    ],
)
def test_mistakes_within_a_block_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        read_options(Options, "made", given)
    with pytest.raises((ValidationError, ConfigError)):
        typed_options(METHOD, given)


def test_keys_of_a_block_are_found_by_path():
    fields = ["mode", "retry_after", "shares"]
    assert keys_at(Options, ["watch"]) == fields
    assert keys_at(Options, ["other"]) == fields
    assert keys_at(Options, ["named", "a"]) == fields
    assert keys_at(Options, ["listed", 1]) == fields
    assert keys_at(Options, ["watch", "shares"]) == []
    assert "watch" in keys_at(Options, [])


def test_a_block_is_described_in_words():
    assert describe_type(Watch | None).endswith("retry_after, shares or null")


def test_the_reference_lists_what_is_in_a_block():
    rows = _rows(properties(option_model(METHOD)), set())
    assert "| `watch.retry_after` | whole number | `10` | rest (steps) |" in rows
    assert "| `other.mode` |" in rows
    assert "| `watch` | block or `strict` \\| `mild` | `as below` | the watch |" in rows


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("watch: strict", True),
        ("watch: {mode: strict, retry-after: 3}", True),
        ("watch: lenient", False),
        ("watch: {mod: strict}", False),
        ("other: null", True),
        ("other: {retry_after: x}", False),
    ],
)
def test_the_schema_knows_what_is_in_a_block(text, valid):
    jsonschema = pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": properties(option_model(METHOD))}
    jsonschema.Draft7Validator.check_schema(schema)
    assert jsonschema.Draft7Validator(schema).is_valid(yaml.safe_load(text)) is valid


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{kind: worst, abov: {code: 1}}", "objective.abov: unknown key; did you mean 'above'?"),
        ("{weights: {code: x}}", "objective.weights.code: 'x': should be a number"),
        ("wurst", "'wurst': should be 'uniform', 'worst' or 'weights'; did you mean 'worst'?"),
        ("3", "should be a block"),
        ("{kind: worst, weights: {code: 1}}", "give weights with the kind 'weights'"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(load, given, message):
    with pytest.raises(ConfigError) as caught:
        load(f"mixing: {{method: aioli, update_every: 100, objective: {given}}}\n")
    assert message in str(caught.value)
    assert "a.yml:11" in str(caught.value)


def test_a_resolved_file_with_blocks_loads_to_an_equal_one(load, files):
    config = load("mixing: {method: aioli, update_every: 100, objective: {code: 2, prose: 1}}\n")
    objective = config.mixing.options["objective"]
    assert objective == {"kind": "weights", "weights": {"code": 2.0, "prose": 1.0}, "above": None}
    assert files.load(config.resolved_yaml()).mixing == config.mixing
    assert load("mixing: {method: aioli, update_every: 100}\n", "mixing.objective=worst") != config
