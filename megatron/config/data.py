"""Domains: what is read, and which part of it is for training, validation and test."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from megatron.config.base import Group, NonNegative, Texts

Part = Literal["train", "valid", "test"]
DEFAULT_SPLIT = "969, 30, 1"
_PART = r"[^\s/\\](?:[^\x00-\x1f\x7f/\\]*[^\s/\\])?"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")


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
    parts = name.split("/")
    if not _NAME.fullmatch(name) or len(name) > 128 or {".", ".."} & set(parts):
        raise PydanticCustomError(
            "domain_name",
            "a domain's name has 1 to 128 characters, no space at either end, and slashes only "
            "between a group and its parts (web/high)",
        )
    return name


Split = Annotated[str, AfterValidator(_valid_split)]
DomainName = Annotated[str, AfterValidator(_valid_name)]


class DomainConfig(Group):
    """One domain: a block under `domains:` by the domain's name."""

    train: Texts
    """Path without `.bin`/`.idx` of the training data, or a list of them. A `target` with `valid`
    needs none."""
    valid: Texts | None = None
    """The same for validation. Without `valid` and `test`, both are cut from `train` by `split`."""
    test: Texts | None = None
    """The same for the final test."""
    weight: NonNegative | None = None
    """Start weight in the mixture, relative to the other domains' (any scale)."""
    target: bool = False
    """Measure this domain and never train on it: its held-out losses count where an `objective`
    names it, and are reported."""
    split_of: DomainName | None = None
    """The earlier domain that this one is a part of: with `allow_domain_edits` it takes over what
    was learnt of it, and its part of that one's weight."""

    @model_validator(mode="before")
    @classmethod
    def _target_without_train(cls, given: Any) -> Any:
        """Let a domain that is never trained on name its held-out data alone."""
        if isinstance(given, dict) and given.get("target") is True and not given.get("train"):
            held_out = given.get("valid") or given.get("test")
            return {**given, "train": held_out} if held_out else given
        return given

    @property
    def uses_split(self) -> bool:
        """Whether `split` cuts the training data into train, valid and test."""
        return self.valid is None and self.test is None

    def prefixes(self, part: Part) -> tuple[str, ...]:
        """Return the paths that hold a part; with :attr:`uses_split`, the same for all parts."""
        if self.uses_split or part == "train":
            return self.train
        return (self.valid if part == "valid" else self.test) or ()


def _valid_parents(domains: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
    for name, domain in domains.items():
        if domain.split_of == name:
            raise PydanticCustomError(
                "split_of",
                "domain '{name}' is a split of itself; name the domain that it was a part of",
                {"name": name},
            )
    return domains


class DataConfig(Group):
    """How data that has changed is met."""

    allow_changed_data: bool = False
    """Resume although the data's fingerprint is not the checkpoint's."""
    allow_domain_edits: bool = False
    """Resume although domains were added or removed since the checkpoint: those that stay go on
    where they were, a removed one keeps its place for its return."""


Domains = Annotated[
    dict[DomainName, DomainConfig],
    Field(min_length=1, max_length=10_000),
    AfterValidator(_valid_parents),
]
