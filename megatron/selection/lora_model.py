"""A model of transformers with LoRA adapters (Hu et al. 2021) of peft, seeded by itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.data.permutation import hash_key
from megatron.errors import ConfigError, did_you_mean
from megatron.selection.libraries import load
from megatron.selection.model_folder import forward_matrices, load_causal

_PURPOSE = "less"
_LLAMA = ("q_proj", "k_proj", "v_proj")
_OUTPUTS = ("o_proj", "out_proj")
_FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapters.

    Attributes:
        rank: r, columns of each low-rank matrix.
        alpha: updates are multiplied with alpha / r.
        dropout: of an adapter's input, in training.
        targets: names of the modules that get one; () for those of attention.
        seed: of the first values and the dropout.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ()
    seed: int = 0


class SeededDropout(nn.Module):
    """Dropout whose masks come from a generator that is begun anew with every step."""

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        """Share the generator with all others of the model."""
        super().__init__()
        self.rate, self.generator = rate, generator

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Drop numbers in training, and multiply the rest to keep the mean."""
        if not self.training or self.rate == 0:
            return value
        drawn = torch.rand(value.shape, generator=self.generator, device=value.device)
        return value * (drawn >= self.rate).to(value.dtype) / (1 - self.rate)


class LoraModel:
    """The model, of which the adapters alone have gradients.

    Attributes:
        model: peft's module around transformers'.
        names: of the adapters' parameters, in the order in which they are laid end to end.
        shapes: of those.
        device: where it runs.
        config: of transformers' model.
        matrices: numbers of the model, without adapters, that multiply one of every token.
        targets: names of the modules that have adapters.
        size: numbers in all adapters.
    """

    def __init__(
        self, folder: Path, settings: LoraSettings, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Load a model and give it adapters with their first values.

        Args:
            folder: that transformers loads.
            settings: of the adapters, which are float32.
            dtype: of the model's own weights.
            device: where it runs.

        Raises:
            CheckpointError: transformers does not load it.
            ConfigError: no module has a target's name.
            MissingExtraError: peft is not installed.
        """
        peft = load("peft", _PURPOSE)
        base = load_causal(folder, _PURPOSE, dtype)
        self.config, self.matrices = base.config, forward_matrices(base)
        self.targets = attention_modules(base, settings.targets)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Conv1D, which peft then sees to
            model = peft.get_peft_model(
                base,
                peft.LoraConfig(
                    r=settings.rank,
                    lora_alpha=settings.alpha,
                    lora_dropout=settings.dropout,
                    target_modules=list(self.targets),
                ),
            )
        self.device = device
        self._seed, self._generator = settings.seed, torch.Generator(device=device)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = SeededDropout(settings.dropout, self._generator)
        self.model: Any = model.to(device).eval()
        own = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.names = tuple(own)
        self.shapes = {name: tuple(one.shape) for name, one in own.items()}
        self.size = sum(one.numel() for one in own.values())
        self._begin(own)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapters' parameters by name."""
        every = dict(self.model.named_parameters())
        return {name: every[name] for name in self.names}

    def unpack(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return parts of a vector [size] under the parameters' names and shapes."""
        sizes = [torch.Size(self.shapes[name]).numel() for name in self.names]
        parts = torch.split(flat, sizes)
        return {
            name: part.view(self.shapes[name]) for name, part in zip(self.names, parts, strict=True)
        }

    def pack(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return tensors by name laid end to end, [size]."""
        return torch.cat([tensors[name].flatten() for name in self.names])

    def begin_step(self, *place: int) -> None:
        """Draw the masks of dropout anew from the seed and a place (epoch, step)."""
        self._generator.manual_seed(hash_key("less-dropout", self._seed, *place) >> 1)

    def _begin(self, own: dict[str, nn.Parameter]) -> None:
        """Draw A evenly from ±1/√inputs, as peft does, and let B be 0."""
        with torch.no_grad():
            for name, parameter in own.items():
                if "lora_A" not in name:
                    parameter.zero_()
                    continue
                generator = torch.Generator().manual_seed(
                    hash_key("less-lora", self._seed, name) >> 1
                )
                bound = parameter.shape[1] ** -0.5
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((2 * drawn - 1) * bound)


def attention_modules(model: Any, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the modules that get adapters.

    Args:
        model: transformers'.
        asked: names; () takes those of attention: queries, keys, values and what follows them
            where they are separate (Llama and its like), the one that has all three where they
            are not (GPT-NeoX and its like).

    Raises:
        ConfigError: there is no module of such a name.
    """
    kinds = ("Linear", "Conv1D")
    there = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module).__name__ in kinds
    }
    for name in asked:
        if name not in there:
            raise ConfigError(
                f"--lora-targets {name}: the model has no such module{did_you_mean(name, there)} "
                f"(it has {', '.join(sorted(there))})"
            )
    if asked:
        return tuple(asked)
    if there.issuperset(_LLAMA):
        return (*_LLAMA, *(name for name in _OUTPUTS if name in there))
    if fused := tuple(name for name in _FUSED if name in there):
        return fused
    raise ConfigError(
        "--lora-targets: it is not known which modules of this model are attention's; name some of "
        f"{', '.join(sorted(there))}"
    )
