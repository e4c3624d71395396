"""Do activations grow with the width?  Trains small models of several widths for a few steps.

The coordinate check of Yang et al. 2022 (Tensor Programs V, appendix D.1): under µP the size of
every activation's numbers stays bounded however wide the model, after each step; in the standard
parametrisation some grow.  A multiplier at the wrong place shows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from megatron.config import ModelConfig
from megatron.errors import ConfigError
from megatron.model.carried import Carried
from megatron.model.gpt import GPT, param_groups
from megatron.model.mup import width_multiplier

GROWS = 0.2
"""Exponent of the width from which on an activation counts as growing."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How the models are trained.

    Attributes:
        widths: values of ``hidden_size``, ascending; the first is the base model's.
        steps: updates.
        lr: learning rate of Adam at the base width.
        seed: of weights and tokens; models of several seeds are averaged.
        seeds: how many.
        rows: samples in the one batch that every step takes.
        length: tokens of a sample.
        vocabulary: token ids.
    """

    widths: Sequence[int]
    steps: int = 4
    lr: float = 1e-2
    seed: int = 1234
    seeds: int = 3
    rows: int = 4
    length: int = 32
    vocabulary: int = 128


def sizes(model: ModelConfig, trial: Trial, *, use_mup: bool) -> dict[str, Any]:
    """Return the mean absolute value of activations, ``[steps + 1, widths]`` by name.

    Args:
        model: the architecture; its width, vocabulary and context are replaced.
        trial: how the models are trained.
        use_mup: in which parametrisation.

    Raises:
        ConfigError: a width does not go with the number of heads.
    """
    columns = [
        np.mean([_run(_resized(model, trial, width, use_mup=use_mup), trial, trial.seed + number)
                 for number in range(trial.seeds)], axis=0)
        for width in trial.widths
    ]  # fmt: skip
    names = _names(model.num_layers)
    table = np.stack(columns, axis=-1)
    return {name: table[:, number] for number, name in enumerate(names)}


def exponents(found: Mapping[str, Any], widths: Sequence[int]) -> dict[str, float]:
    """Return with which power of the width each activation goes after the last step."""
    logarithm = np.log(np.asarray(widths, dtype=np.float64))
    return {
        name: float(np.polyfit(logarithm, np.log(values[-1] + 1e-30), 1)[0])
        for name, values in found.items()
    }


def _names(layers: int) -> list[str]:
    inside = [f"block {n}{part}" for n in range(layers) for part in (" attention", " MLP", "")]
    return ["embedding", *inside, "logits"]


def _resized(model: ModelConfig, trial: Trial, width: int, *, use_mup: bool) -> ModelConfig:
    if width % model.num_attention_heads or width % 2:
        raise ConfigError(
            f"width {width} is not divisible by num_attention_heads ({model.num_attention_heads})"
        )
    given = model.model_dump()
    ratio = (model.intermediate_size or 4 * model.hidden_size) / model.hidden_size
    changed = {
        "hidden_size": width,
        "intermediate_size": max(1, round(ratio * width)),
        "expansion_factor": None,
        "mlp_multiple_of": None,
        "seq_length": trial.length,
        "max_position_embeddings": trial.length,
        "vocab_size": trial.vocabulary,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "checkpoint_activations": False,
        "soft_prompt_tuning": None,
        "use_mup": use_mup,
        "mup_base_hidden_size": trial.widths[0],
    }
    try:
        return ModelConfig(**{**given, **changed})
    except ValidationError as error:
        problem = error.errors()[0]
        name = problem.get("ctx", {}).get("field") or ".".join(map(str, problem["loc"]))
        raise ConfigError(f"width {width}: {name} {problem['msg']}") from error


def _run(spec: ModelConfig, trial: Trial, seed: int) -> Any:
    """Train one model; return ``[steps + 1, activations]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (trial.rows, trial.length + 1)
    tokens = torch.randint(0, trial.vocabulary, shape, generator=generator)
    model = GPT(spec, seed=seed)
    optimizer = torch.optim.AdamW(
        param_groups(model, 0.0, width=width_multiplier(spec)), lr=trial.lr, betas=(0.9, 0.95)
    )
    for group in optimizer.param_groups:
        group["lr"] = trial.lr * group.get("lr_scale", 1.0)
    seen: dict[str, float] = {}
    for name, module in _watched(model, spec.num_layers).items():
        module.register_forward_hook(_recorder(seen, name))
    rows = []
    for _ in range(trial.steps + 1):
        hidden, weight = model(tokens[:, :-1])
        logits = (hidden @ weight.T)[..., : trial.vocabulary]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        seen["logits"] = logits.detach().abs().mean().item()
        rows.append([seen[name] for name in _names(spec.num_layers)])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return np.array(rows)


def _watched(model: GPT, layers: int) -> dict[str, nn.Module]:
    tied = "embed" in model.tied_modules
    embedding = model.tied_modules["embed"] if tied else model.get_submodule("0")
    watched: dict[str, nn.Module] = {"embedding": embedding}
    for number in range(layers):
        block = model.get_submodule(str(number + 1))
        watched[f"block {number}"] = block
        watched[f"block {number} attention"] = block.get_submodule("attention")
        watched[f"block {number} MLP"] = block.get_submodule("mlp")
    return watched


def _recorder(seen: dict[str, float], name: str) -> Callable[..., None]:
    def record(module: nn.Module, arguments: Any, result: Any) -> None:
        seen[name] = Carried.of(result).hidden.detach().abs().mean().item()

    return record
