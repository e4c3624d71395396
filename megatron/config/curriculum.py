"""A curriculum by sequence length: DeepSpeed's block ``curriculum_learning``."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import model_validator

from megatron.config.base import Count, Group, Positive, invalid


class CurriculumSchedule(Group):
    """How the length grows from `min_difficulty` to `max_difficulty`."""

    total_curriculum_step: Count | None = None
    """`fixed_linear` and `fixed_root`: steps until the full length is reached."""
    difficulty_step: Count | None = None
    """`fixed_linear` and `fixed_root`: lengths are multiples of this (8 or more suits GPUs)."""
    root_degree: Positive | None = None
    """`fixed_root`: degree of the root; 2 is the square root."""
    difficulty: tuple[Count, ...] | None = None
    """`fixed_discrete`: the lengths, one after the other."""
    max_step: tuple[Count, ...] | None = None
    """`fixed_discrete`: last step of each length but the last."""

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


class Curriculum(Group):
    """Shorter rows in the first steps (Li, Zhang and He 2022, arXiv 2108.06084).

    A step's rows are cut behind so many tokens; what is cut off is not read again in that epoch.
    Held-out data is measured at full length.
    """

    enabled: bool = True
    """Whether the curriculum is on."""
    curriculum_type: Literal["seqlen"] = "seqlen"
    """What grows: the length of the rows."""
    min_difficulty: Count = 8
    """Tokens of a row in the first step."""
    max_difficulty: Count | None = None
    """Tokens of a row in the end. Default: `seq_length`."""
    schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete"] = "fixed_linear"
    """`fixed_linear` and `fixed_root` grow by a line or a root, `fixed_discrete` by a list."""
    schedule_config: CurriculumSchedule
    """How it grows."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        config, kind = self.schedule_config, self.schedule_type
        wanted = {
            "fixed_linear": ("total_curriculum_step", "difficulty_step"),
            "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
            "fixed_discrete": ("difficulty", "max_step"),
        }[kind]
        for name in type(config).model_fields:
            if (getattr(config, name) is None) == (name in wanted):
                what = f"needs {name}" if name in wanted else f"has no {name}"
                raise invalid("curriculum_learning", f"schedule_type {kind} {what}")
        if self.max_difficulty is not None and self.max_difficulty < self.min_difficulty:
            raise invalid("curriculum_learning", "max_difficulty is below min_difficulty")
        if config.difficulty is not None and config.max_step is not None:
            if len(config.difficulty) != len(config.max_step) + 1:
                raise invalid(
                    "curriculum_learning", "max_step has one entry fewer than difficulty has"
                )
            if list(config.max_step) != sorted(set(config.max_step)):
                raise invalid("curriculum_learning", "max_step should be ascending")
        return self

    @property
    def steps(self) -> int:
        """Steps after which the length stays."""
        config = self.schedule_config
        return config.total_curriculum_step or (config.max_step or (0,))[-1]

    def length(self, step: int, full: int) -> int:
        """Return the tokens of a row in a step, as DeepSpeed's scheduler counts them.

        Args:
            step: from 1.
            full: ``seq_length``, which stands for a ``max_difficulty`` that is not given.
        """
        config = self.schedule_config
        if config.difficulty is not None and config.max_step is not None:
            for given, last in zip(config.difficulty, config.max_step, strict=False):
                if step <= last:
                    return given
            return config.difficulty[-1]
        assert config.total_curriculum_step is not None
        assert config.difficulty_step is not None
        most, unit = self.max_difficulty or full, config.difficulty_step
        share: float = (step / config.total_curriculum_step) ** (1.0 / (config.root_degree or 1.0))
        length: int = math.floor(share * (most - self.min_difficulty) + self.min_difficulty)
        # The first length is a multiple of the unit, too.
        least = -(-self.min_difficulty // unit) * unit
        return min(max(length - length % unit, least), most)

    def lengths(self, steps: int, full: int) -> list[int]:
        """Return the tokens of a row in each of the steps 1 to ``steps``."""
        return [self.length(step, full) for step in range(1, steps + 1)]
