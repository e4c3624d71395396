"""Domains: what is read, and which part of it is for training, validation and test."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megatron.config.base import Group, NonNegative, Texts

Part = Literal["train", "valid", "test"]
DEFAULT_SPLIT = "969, 30, 1"
_NAME = re.compile(r"[^\s/\\](?:[^\x00-\x1f\x7f/\\]*[^\s/\\])?")


def split_shares(split: str) -> tuple[float, float, float]:
    """Read a split such as ``"969, 30, 1"`` (or with ``/``) as shares that sum to 1.

    Raises:
        ValueError: not one to three numbers ≥ 0 with a positive sum.
    """
    try:
        numbers = [float(part) for part in re.split(r"[,/]", split)]
    except ValueError:
        numbers = []
    numbers += [0.0] * (3 - len(numbers))
    total = sum(numbers)
    if split.strip() == "" or len(numbers) != 3 or not 0 < total < float("inf"):
        raise ValueError("is not a split such as '969, 30, 1' (train, valid, test)")
    if min(numbers) < 0 or numbers[0] == 0:
        raise ValueError("no share may be negative, and that of train must be above 0")
    return numbers[0] / total, numbers[1] / total, numbers[2] / total


def _valid_split(split: str) -> str:
    try:
        split_shares(split)
    except ValueError as error:
        raise PydanticCustomError("split", "{text}", {"text": str(error)}) from None
    return split


def _valid_name(name: str) -> str:
    if not _NAME.fullmatch(name) or len(name) > 128:
        raise PydanticCustomError(
            "domain_name",
            "a domain's name has 1 to 128 characters, no slash, and no space at either end",
        )
    return name


Split = Annotated[str, AfterValidator(_valid_split)]
DomainName = Annotated[str, AfterValidator(_valid_name)]


class DomainConfig(Group):
    """One domain: a block under `domains:` by the domain's name."""

    train: Texts
    """Path without `.bin`/`.idx` of the training data, or a list of them."""
    valid: Texts | None = None
    """The same for validation. Without `valid` and `test`, both are cut from `train` by `split`."""
    test: Texts | None = None
    """The same for the final test."""
    weight: NonNegative | None = None
    """Start weight in the mixture, relative to the other domains' (any scale)."""

    @property
    def uses_split(self) -> bool:
        """Whether `split` cuts the training data into train, valid and test."""
        return self.valid is None and self.test is None

    def prefixes(self, part: Part) -> tuple[str, ...]:
        """Return the paths that hold a part; with :attr:`uses_split`, the same for all parts."""
        if self.uses_split or part == "train":
            return self.train
        return (self.valid if part == "valid" else self.test) or ()


class DataConfig(Group):
    """How data that has changed is met."""

    allow_changed_data: bool = False
    """Resume although the data's fingerprint is not the checkpoint's."""


Domains = Annotated[dict[DomainName, DomainConfig], Field(min_length=1, max_length=10_000)]
