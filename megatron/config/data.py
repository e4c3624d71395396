"""Domains: what is read, and which part of it is for training, validation and test."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from megatron.config.base import Fraction, Group, NonNegative, NonNegativeInt, Text, Texts, invalid
from megatron.config.curriculum import Curriculum

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
    train_labels: Texts | None = None
    """For each path of `train` one of labels, as `tools/preprocess_data_with_mask.py` writes them:
    the token where it is trained on, -100 where not. Under `split` they serve all parts."""
    valid_labels: Texts | None = None
    """The same for `valid`."""
    test_labels: Texts | None = None
    """The same for `test`."""
    weight: NonNegative | None = None
    """Start weight in the mixture, relative to the other domains' (any scale)."""
    valid_weight: NonNegative | None = None
    """Weight in the weighted averages over the domains' validation losses. Default: the share in
    the mixture; where one domain has one, those without count for nothing."""
    test_weight: NonNegative | None = None
    """The same for the final test."""
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

    def labels(self, part: Part) -> tuple[str, ...] | None:
        """Return the paths that hold the labels of a part, beside :meth:`prefixes`, or None."""
        if self.uses_split or part == "train":
            return self.train_labels
        return self.valid_labels if part == "valid" else self.test_labels

    @model_validator(mode="after")
    def _labels(self) -> DomainConfig:
        for part in ("train", "valid", "test"):
            labels, paths = getattr(self, f"{part}_labels"), getattr(self, part)
            if labels is not None and len(labels) != len(paths or ()):
                raise PydanticCustomError(
                    "labels",
                    "{part}_labels has {labels} paths and {part} has {paths}; give one for each",
                    {"part": part, "labels": len(labels), "paths": len(paths or ())},
                )
        return self


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
    """How data is read, and how data that has changed is met."""

    data_impl: Literal["infer", "mmap", "cached", "lazy"] = "infer"
    """Format of the files: `mmap` (what `tools/preprocess_data.py` writes), `cached` and `lazy`
    (GPT-NeoX's older format, with TNTIDX in the index). `infer` takes both, by their first bytes;
    any other refuses files that are not of it."""
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    """What a window holds: `packed`, a stretch of the stream, whatever documents it cuts;
    `pack_until_overflow`, whole neighbouring documents, as many as fit; `unpacked`, one document.
    What they leave free is padding that no loss counts."""
    allow_chopped: bool = True
    """Cut a document off that is longer than a window; `false` leaves it out. (`packed` leaves
    nothing out.)"""
    fim_rate: Fraction = 0.0
    """Share of the training documents that are rearranged to fill in the middle (Bavarian et al.
    2022, arXiv 2207.14255)."""
    fim_spm_rate: Fraction = 0.5
    """Share of those that are in the order suffix, prefix, middle; the others are in the order
    prefix, suffix, middle."""
    fim_level: Literal["character", "token"] = "character"
    """Where a document is cut: between characters (needs the tokenizer) or between tokens."""
    fim_unit: Literal["document", "window"] = "document"
    """What is cut: what a window holds of each document, or the window as a whole."""
    fim_prefix_token: NonNegativeInt | Text = "<fim_prefix>"
    """Token before the prefix, by name (needs the tokenizer) or id."""
    fim_suffix_token: NonNegativeInt | Text = "<fim_suffix>"
    """Token before the suffix."""
    fim_middle_token: NonNegativeInt | Text = "<fim_middle>"
    """Token before the middle."""
    curriculum_learning: Curriculum | None = None
    """Shorter rows in the first steps, in DeepSpeed's words."""
    allow_changed_data: bool = False
    """Resume although the data's fingerprint is not the checkpoint's."""
    allow_domain_edits: bool = False
    """Resume although domains were added or removed since the checkpoint: those that stay go on
    where they were, a removed one keeps its place for its return."""

    def row_length(self, step: int, seq_length: int) -> int:
        """Return the tokens of a row in a step, from 1: S, or what a curriculum says."""
        curriculum = self.curriculum_learning
        if curriculum is None or not curriculum.enabled:
            return seq_length
        return curriculum.length(step, seq_length)

    def tokens_per_row(self, steps: int, seq_length: int) -> int:
        """Return the tokens of one row in each of the steps 1 to ``steps``, together."""
        curriculum = self.curriculum_learning
        if curriculum is None or not curriculum.enabled:
            return steps * seq_length
        growing = curriculum.lengths(min(steps, curriculum.steps), seq_length)
        return sum(growing) + (steps - len(growing)) * curriculum.length(steps, seq_length)

    @model_validator(mode="after")
    def _distinct_marks(self) -> DataConfig:
        marks = [self.fim_prefix_token, self.fim_suffix_token, self.fim_middle_token]
        if self.fim_rate and len(set(marks)) < len(marks):
            raise invalid("fim_rate", "the tokens of prefix, suffix and middle must differ")
        return self


Domains = Annotated[
    dict[DomainName, DomainConfig],
    Field(min_length=1, max_length=10_000),
    AfterValidator(_valid_parents),
]
