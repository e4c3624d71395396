"""What selectors cost, by the formula that prices training."""

from __future__ import annotations

import pytest
from support.model_spec import TestSpec

from megatron.errors import ConfigError
from megatron.model.accounting import forward_flops, parameter_count, training_flops
from megatron.selection.cost_model import (
    Reading,
    base_method,
    known_model,
    read_number,
    selector_flops,
    size_name,
    sized_model,
)

READING = Reading(corpus=1e9, targets=1e6)


def test_each_selector_costs_its_passes():
    seven = sized_model("7B")
    assert seven.training(1e9) == 6 * 7e9 * 1e9
    assert selector_flops("random", READING, None) == 0
    assert selector_flops("bm25", READING, None) == 0
    assert selector_flops("embed", READING, sized_model(110e6)) == 2 * 110e6 * 1.001e9
    assert selector_flops("ppl", READING, seven) == 2 * 7e9 * 1e9
    passes = 3 * 2 * 7e9 * 1.001e9
    warm_up = 6 * 7e9 * 0.2e9
    assert selector_flops("less", READING, seven) == pytest.approx(passes + warm_up)
    four = Reading(corpus=1e9, targets=1e6, checkpoints=4, warm_up=0.0)
    assert selector_flops("less", four, seven) == pytest.approx(4 * passes)


def test_a_known_architecture_is_priced_as_its_training_is():
    spec = TestSpec()
    model = known_model(spec, "tiny")
    assert model.parameters == parameter_count(spec)
    assert model.training(1000) == training_flops(spec, 1000)
    assert selector_flops("ppl", Reading(corpus=500), model) == forward_flops(spec, 500)


def test_what_cannot_be_priced_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'ppl'"):
        selector_flops("pppl", READING, None)
    with pytest.raises(ConfigError, match="'less' scores by a model"):
        selector_flops("less", READING, None)
    with pytest.raises(ConfigError, match="corpus is -1"):
        Reading(corpus=-1)
    with pytest.raises(ConfigError, match="at least one"):
        Reading(corpus=1, checkpoints=0)


@pytest.mark.parametrize(
    ("text", "number"),
    [("7B", 7e9), ("160m", 160e6), ("1.4B", 1.4e9), ("7e9", 7e9), ("2_000", 2e3), ("1.5T", 1.5e12)],
)
def test_numbers_are_read_as_people_write_them(text, number):
    assert read_number(text, "it") == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "7X", "-7B", "0", "seven", "1,5B", "inf", "7BB"])
def test_other_numbers_are_refused(text):
    with pytest.raises(ConfigError, match="it is"):
        read_number(text, "it")


def test_sizes_have_short_names():
    assert [size_name(n) for n in (7e9, 1.4e9, 160e6, 1e12, 999.9e6, 12)] == [
        "7B",
        "1.4B",
        "160M",
        "1T",
        "1B",
        "12",
    ]
    assert sized_model("llama"[:0] + "7B").name == "7B"
    assert sized_model(13e9).name == "13B"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ppl-top", "ppl"),
        ("ppl_mid", "ppl"),
        ("embedding", "embed"),
        ("less-seed3", "less"),
        ("perplexity", "ppl"),
        ("mmlu-bm25", "bm25"),
        ("lesson", "lesson"),
        ("none", "random"),
        ("other", "other"),
    ],
)
def test_variants_belong_to_their_selector(name, kind):
    assert base_method(name) == kind
