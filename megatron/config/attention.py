"""Which kind of attention every block has, and how the sparse kinds look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from megatron.config.base import Count, Group, NonNegativeInt, invalid, listed
from megatron.config.suggest import did_you_mean

DENSE = ("global", "flash")
SPARSE = ("local", "sparse_fixed", "sparse_variable", "bigbird", "bslongformer")
MIXERS = ("gmlp", "amlp")
KINDS = (*DENSE, *SPARSE, *MIXERS)
_ABSENT = {
    "mamba": "Mamba blocks are not offered; use global",
    "rwkv": "RWKV blocks are not offered; use global",
}


def expand(value: Sequence[Any], layers: int) -> tuple[str, ...]:
    """Return the kind of every block.

    Args:
        value: GPT-NeoX's forms: the kinds themselves, or ``[[kinds, times], …]`` where "all"
            stands for as many times as there are blocks left.
        layers: number of blocks.

    Raises:
        PydanticCustomError: the form is wrong, a kind is unknown, or the number is another.
    """
    kinds: list[str] = []
    for entry in value:
        if isinstance(entry, str):
            kinds.append(_kind(entry))
            continue
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2):
            raise _wrong("should be kinds of attention, or pairs such as [[global, local], 6]")
        names, times = entry
        if not (isinstance(names, (list, tuple)) and names):
            raise _wrong("should begin every pair with a list of kinds, as in [[global], all]")
        part = [_kind(name) for name in names]
        kinds += part * _times(times, len(part), layers - len(kinds))
    if len(kinds) != layers:
        raise _wrong(f"names {len(kinds)} blocks, but num_layers is {layers}")
    return tuple(kinds)


def _times(times: Any, size: int, left: int) -> int:
    if isinstance(times, str) and times.lower() == "all":
        if left % size:
            raise _wrong(f"'all' cannot repeat {size} kinds over the {left} blocks that are left")
        return left // size
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise _wrong("should end every pair with how often it is repeated, or all")
    # More than there are blocks is an error anyway, and need not be written out first.
    return min(times, left // size + 1)


def _kind(name: Any) -> str:
    kind = name.lower() if isinstance(name, str) else str(name)
    if kind in _ABSENT:
        raise _wrong(f"refused: {_ABSENT[kind]}")
    if kind not in KINDS:
        near = did_you_mean(kind, KINDS)
        raise _wrong(f"'{kind}' is no kind of attention{near} (available: {', '.join(KINDS)})")
    return "global" if kind == "flash" else kind


def _wrong(text: str) -> PydanticCustomError:
    return PydanticCustomError("attention", "{text}", {"text": text})


def _expanded(value: Any, info: ValidationInfo) -> Any:
    layers = info.data.get("num_layers")
    if not isinstance(value, (list, tuple)) or not isinstance(layers, int):
        return value  # what is wrong is said elsewhere
    kinds = expand(value, layers)
    return None if set(kinds) == {"global"} else kinds


_KINDS_SCHEMA: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "string"}}
AttentionKinds = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_expanded),
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "anyOf": [
                                _KINDS_SCHEMA,
                                {"const": "all"},
                                {"type": "integer", "minimum": 1},
                            ]
                        },
                    },
                ]
            },
        }
    ),
]


Counts = Annotated[tuple[Count, ...], Field(min_length=1), BeforeValidator(listed)]
Blocks = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(listed)]


class SparsityConfig(Group):
    """Settings of the block-sparse kinds of attention, in GPT-NeoX's names and with its defaults.

    All are causal.  GPT-NeoX's `mode` is ignored there and here: `attention_config` says it.
    """

    block: Count = 16
    """Tokens of a block."""
    different_layout_per_head: bool = False
    """Let heads differ, in their random blocks and in what `num_different_global_patterns` says."""
    num_local_blocks: Count | None = None
    """`sparse_fixed`: blocks of a local window; `local`: width of the sliding one. Default: 4."""
    num_global_blocks: Count = 1
    """`sparse_fixed`: blocks at the end of every window that all later blocks see; `bigbird`:
    blocks at the beginning that all see."""
    num_different_global_patterns: Count = 1
    """`sparse_fixed`: so many heads in turn take other blocks of the window as global ones (needs
    `different_layout_per_head`)."""
    num_random_blocks: NonNegativeInt | None = None
    """`bigbird` and `sparse_variable`: earlier blocks drawn for every block, the same in every run.
    Default: 1 with `bigbird`, else 0."""
    local_window_blocks: Counts = (4,)
    """`sparse_variable`: blocks of each local window, the last one repeated."""
    global_block_indices: Blocks = (0,)
    """`sparse_variable`, `bslongformer`: blocks that all later ones see."""
    global_block_end_indices: Counts | None = None
    """Makes ranges of `global_block_indices`: where each ends (not included)."""
    num_sliding_window_blocks: Count | None = None
    """`bigbird`, `bslongformer`, `local`: width of the sliding window in blocks, as if it reached
    to both sides: half of it, rounded down, lies before a block. Default: 3; with `local` 4."""

    @model_validator(mode="before")
    @classmethod
    def _without_fixed(cls, data: Any) -> Any:
        """Drop the keys that say what is so anyway, and refuse them where they ask for else."""
        if not isinstance(data, dict):
            return data
        for key, only in (("attention", "unidirectional"), ("horizontal_global_attention", False)):
            if data.get(key, only) not in (only, None):
                raise _wrong(
                    f"{key} {data[key]!r}: a language model sees no later token; use {only}"
                )
        dropped = ("mode", "attention", "horizontal_global_attention")
        return {key: value for key, value in data.items() if key not in dropped}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        window, shared = self.num_local_blocks or 4, self.num_global_blocks
        patterns = self.num_different_global_patterns
        if patterns > 1 and not self.different_layout_per_head:
            raise invalid(
                "sparsity_config",
                f"num_different_global_patterns ({patterns}) needs different_layout_per_head: true",
            )
        if patterns > 1 and patterns * shared > window:
            raise invalid(
                "sparsity_config",
                f"num_different_global_patterns ({patterns}) × num_global_blocks ({shared}) is "
                f"more than num_local_blocks ({window})",
            )
        starts, ends = self.global_block_indices, self.global_block_end_indices
        if ends is not None and (
            len(ends) != len(starts)
            or any(end <= start for start, end in zip(starts, ends, strict=True))
        ):
            raise invalid(
                "sparsity_config",
                "global_block_end_indices should have an end behind every one of "
                "global_block_indices",
            )
        return self
