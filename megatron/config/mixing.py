"""The mixture: which method decides it, from which start, and how decisions become samples."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from megatron.config.base import Count as PositiveInt
from megatron.config.base import Group, NonNegative, Text
from megatron.config.option_blocks import block_model, built, describe, prepared
from megatron.registry import MixingMethod


class MixingConfig(Group):
    """The mixture: a block `mixing:` with the keys below and the method's own options."""

    method: Text = "static"
    """The method that decides the sampling weights."""
    weights: Literal["given", "uniform", "natural", "nopack", "temperature", "documents"] | None = (
        None
    )
    """Start weights: `given` by the domains' `weight`; `uniform`; `natural` by tokens; `nopack` by
    windows if documents were padded instead of packed; `temperature` by tokens to the power of
    `weights_alpha`; `documents` by numbers of documents (GPT-NeoX's `weight_by_num_documents`).
    A mapping of domain names to numbers is `given` with these. Default: `given` if the domains
    have weights, else `natural`."""
    weights_alpha: NonNegative = 0.3
    """Exponent of `temperature` and `documents`."""
    lag: Annotated[int, Field(ge=0, le=1)] = 0
    """Steps by which a decision trails its observation; 1 lets the next batch be ready early."""
    unit: Literal["sample", "micro_batch", "step"] = "sample"
    """What is drawn from one domain at a time."""
    draw: Literal["apportion", "multinomial"] = "apportion"
    """How weights become counts: `apportion` keeps to them as closely as whole numbers can;
    `multinomial` draws at random, as importance-weighted rules assume."""
    on_exhausted: Literal["repeat", "stop", "drop"] = "repeat"
    """When a domain has been read to its end: read it again, end the run, or leave it out."""
    validation_samples: PositiveInt = 32
    """Samples per domain of a validation that a method asks for."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own options, every one with its value. (In a file they stand beside the keys
    above.)"""


def option_names(method: MixingMethod) -> list[str]:
    """Name the options of a method."""
    return [field.name for field in dataclasses.fields(method.options) if field.init]


def option_model(method: MixingMethod) -> type[BaseModel]:
    """Build the strict model of a method's options from its registered dataclass."""
    return block_model(method.options, f"{method.name}_options")


def typed_options(method: MixingMethod, given: dict[str, Any]) -> dict[str, Any]:
    """Check the given options and return all of them, JSON-able, defaults filled in.

    Raises:
        ValidationError: an unknown option, or a value of the wrong type.
        NeomixError, ValueError, TypeError: from the dataclasses' own checks.
    """
    model = option_model(method)
    # Through JSON, strictness still lets a list be a tuple and a text an enumeration.
    checked = model.model_validate_json(json.dumps(prepared(method.options, given)))
    plain = checked.model_dump(mode="json")
    built(method.options, plain)
    return plain


__all__ = [
    "MixingConfig",
    "ValidationError",
    "describe",
    "option_model",
    "option_names",
    "typed_options",
]
