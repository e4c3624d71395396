"""What every group of settings has in common: frozen, strict, and no unknown names."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

_INT64_MAX = 2**63 - 1


def _whole(value: Any) -> Any:
    """Let ``1e6`` stand for 1000000 where a whole number is wanted."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def listed(value: Any) -> Any:
    """Let a list stand for a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _tuple(value: Any) -> Any:
    """Let one text stand for a list of one, and a list for a tuple."""
    return (value,) if isinstance(value, str) else listed(value)


Int = Annotated[int, Field(ge=-_INT64_MAX, le=_INT64_MAX), BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1, le=_INT64_MAX), BeforeValidator(_whole)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_INT64_MAX), BeforeValidator(_whole)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[
    tuple[Text, ...],
    Field(min_length=1),
    BeforeValidator(_tuple),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            ]
        }
    ),
]


def literals(annotation: Any) -> Iterator[str]:
    """Yield the texts that an annotation's ``Literal`` parts allow."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from (value for value in get_args(annotation) if isinstance(value, str))
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from literals(part)
    elif origin is Annotated:
        yield from literals(get_args(annotation)[0])


def invalid(field: str, message: str) -> PydanticCustomError:
    """Make the error of a rule between several fields, placed at the line of ``field``."""
    return PydanticCustomError("rule", "{text}", {"text": message, "field": field})


class Group(BaseModel):
    """A frozen group of settings.

    A fixed choice may be written in any case (``Cosine``), a whole number as ``1e6``, and a
    list of one text as the text; nothing else is converted.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _any_case(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        result = dict(data)
        for name, field in cls.model_fields.items():
            value = result.get(name)
            if isinstance(value, str):
                for choice in literals(field.annotation):
                    if choice.lower() == value.lower():
                        result[name] = choice
        return result
