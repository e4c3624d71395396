"""What is trained beside a frozen model: a prompt, or low-rank updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron.config.base import Count, Dropout, Group, Positive, invalid, listed

if TYPE_CHECKING:
    from megatron.config.model import ModelConfig


class SoftPromptConfig(Group):
    """Prompt tuning: the block `soft_prompt_tuning: {enabled, n_tokens, …}`."""

    enabled: bool = False
    """Train a prompt, and nothing else."""
    n_tokens: Count = 10
    """Vectors in the prompt."""
    num_tokens: Count | None = None
    """Another name of `n_tokens`."""
    init_string: str = ""
    """Text whose tokens' embeddings the prompt starts as, repeated or cut to its length."""
    init_range: Positive = 0.5
    """Without a text the prompt starts uniformly between this and its negative."""

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        if self.num_tokens is not None:
            if "n_tokens" in self.model_fields_set and self.n_tokens != self.num_tokens:
                raise invalid("soft_prompt_tuning", "n_tokens and num_tokens mean the same")
            self.__dict__.update(n_tokens=self.num_tokens, num_tokens=None)
        return self


LoraTargets = Annotated[
    tuple[Literal["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], ...],
    Field(min_length=1),
    BeforeValidator(listed),
]


class LoraConfig(Group):
    """Low-rank updates: the block `lora: {rank, alpha, dropout, targets}`."""

    rank: Count = 8
    """Rank of each update."""
    alpha: Positive = 32.0
    """An update is multiplied with alpha / rank."""
    dropout: Dropout = 0.0
    """Dropout of the inputs of updates."""
    targets: LoraTargets = ("query_key_value", "dense")
    """Layers of every block that have one: `query_key_value` and `dense` of attention,
    `dense_h_to_4h` and `dense_4h_to_h` of the MLP."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if len(set(self.targets)) != len(self.targets):
            raise invalid("lora", "targets names a layer twice")
        return self


def trained_prompt(model: ModelConfig) -> SoftPromptConfig | None:
    """Return the prompt that is trained; None if there is none.

    Raises:
        PydanticCustomError: naming the key that it does not go with.
    """
    prompt = model.soft_prompt_tuning
    if prompt is None or not prompt.enabled:
        return None
    if model.reset_attention_mask or model.reset_position_ids:
        raise invalid(
            "soft_prompt_tuning",
            "does not go with reset_attention_mask and reset_position_ids: later documents of "
            "a window would not see the prompt; switch them off",
        )
    if model.mixers:
        raise invalid(
            "soft_prompt_tuning",
            "does not go with gmlp and amlp blocks, whose matrix knows the places of tokens",
        )
    return prompt


def trained_updates(model: ModelConfig) -> LoraConfig | None:
    """Return the updates that are trained; None if there are none.

    Raises:
        PydanticCustomError: naming the key that they do not go with.
    """
    if model.lora is None:
        return None
    if trained_prompt(model) is not None:
        raise invalid("lora", "does not go with soft_prompt_tuning; train one of the two")
    if model.use_mup:
        raise invalid("lora", "is not worked out for use_mup; switch one of them off")
    if model.mixers:
        raise invalid("lora", "does not go with gmlp and amlp blocks")
    inner = [target for target in model.lora.targets if target.startswith("dense_")]
    if model.moe_num_experts > 1 and inner:
        raise invalid(
            "lora",
            f"targets {' and '.join(inner)} do not go with moe_num_experts, whose experts have "
            "no updates; name query_key_value and dense",
        )
    return model.lora
