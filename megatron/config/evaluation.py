"""Using a trained model: evaluation by tasks, and generating text."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from megatron.config.base import (
    Count,
    Fraction,
    Group,
    NonNegative,
    NonNegativeInt,
    Positive,
    Text,
    Texts,
    invalid,
)


def _list(value: Any) -> Any:
    """Let one text stand for a list of one, and nothing for an empty list."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[
    tuple[Text, ...],
    BeforeValidator(_list),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string", "minLength": 1}},
            ]
        }
    ),
]


class EvaluationConfig(Group):
    """Evaluation by tasks of lm-eval, with `evaluate.py` or during training."""

    eval_tasks: Names = ()
    """Tasks, groups or tags of lm-eval; `*` and `?` stand for any part of a name. In a
    training run they are measured on the live model (see `eval_tasks_interval`)."""
    eval_tasks_interval: Count | None = None
    """Steps between two evaluations by `eval_tasks` during training (there is one at the end).
    Default: `eval_interval`."""
    eval_num_fewshot: NonNegativeInt | None = None
    """Examples put before every question. Default: as each task says (GPT-NeoX: 0)."""
    eval_include_path: Texts | None = None
    """Folders with task files (YAML) of your own, beside those of lm-eval."""
    eval_limit: Positive | None = None
    """Questions per task: a number, or a share of them if below 1. Default: all."""
    eval_batch_size: Count | None = None
    """Sequences that a data rank runs at once. Default: `train_micro_batch_size_per_gpu`."""
    eval_bootstrap_iters: NonNegativeInt = 10_000
    """Resamples for the standard errors of metrics that have no formula for it, in
    `evaluate.py`; 0 = no standard errors. During training there are at most 100."""
    eval_results_prefix: str = ""
    """Beginning of the path of the results: `PREFIX_eval_results_….json`."""
    eval_all_checkpoints: bool = False
    """Let `evaluate.py` measure every checkpoint of the run, and write one table."""
    eval_perplexity: Literal["valid", "test"] | None = None
    """Let `evaluate.py` also measure the loss of every domain on this split of the data."""


class GenerationConfig(Group):
    """Text from a trained model, with `generate.py`."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] | None = None
    """Where prompts come from: nowhere, a file, or the keyboard."""
    temperature: NonNegative = 0.0
    """What logits are divided by before a token is drawn. 0 = the most probable token, or, with
    `top_k` or `top_p`, a draw from the logits as they are."""
    top_k: NonNegativeInt = 0
    """Draw among this many most probable tokens. 0 = all."""
    top_p: Fraction = 0.0
    """Draw among the most probable tokens that together have this probability. 0 = all."""
    return_logits: bool = False
    """Write the logits of every generated token beside the text."""
    maximum_tokens: Count = 64
    """Longest continuation, in tokens."""
    prompt_end: Annotated[str, Field(min_length=1)] = "\n"
    """What ends a prompt in the input file, and at the keyboard."""
    stop_strings: Names = ()
    """Texts that end a continuation, which does not contain them."""
    sample_input_file: Text | None = None
    """File of prompts, for `text_gen_type: input-file`."""
    sample_output_file: Text | None = None
    """Where samples are written, one JSON object on a line. Default: `samples.txt` without
    prompts (as GPT-NeoX), the input file's name with `.output.jsonl` with them."""
    num_samples: Count = 1
    """Samples without a prompt; with an input file, samples for each prompt."""
    recompute: bool = False
    """Run the whole sequence for every token instead of keeping keys and values."""
    generation_batch_size: Count | None = None
    """Sequences that a data rank continues at once. Default: `train_micro_batch_size_per_gpu`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text_gen_type == "input-file" and self.sample_input_file is None:
            raise invalid("text_gen_type", "is input-file: give sample_input_file (-i FILE), too")
        return self
