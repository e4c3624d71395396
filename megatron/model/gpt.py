"""The model as a list of layers, and the plain module that runs the list in order.

The list is the one description of the model.  :class:`GPT` builds all of it in one place; a
pipeline builds each stage's part from the same descriptions, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron.model.attention import build_rotary
from megatron.model.block import TransformerBlock
from megatron.model.embedding import (
    Embedding,
    FinalNorm,
    Output,
    OutputLayer,
    OutputWeight,
    tied_output,
)
from megatron.model.gmlp import GMLPTransformerBlock
from megatron.model.layer_run import LayerFunction, LayerRun, recomputed_blocks
from megatron.model.lora import freeze_all_but_lora
from megatron.model.masking import MaskTables
from megatron.model.norm import Norm
from megatron.model.soft_prompt import freeze_all_but_prompt
from megatron.model.spec import MIXERS, ModelSpec, attention_types
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.rng import DropoutRng
from megatron.parallel.topology import Topology

LossFunction = Callable[[Output, tuple[torch.Tensor, ...]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """A layer that has not been built yet.

    Attributes:
        module_type: class of the layer.
        arguments: keyword arguments that build it.
        tied_key: layers with the same key are one module; None for a module of its own.
        tied_weights: names of the weights that make them tied.
        forward: how this use of the tied module is called, ``forward(module, input)``; None
            calls the module itself.
        recomputable: whether activation checkpointing may recompute it.
    """

    module_type: type[nn.Module]
    arguments: dict[str, Any] = field(repr=False)
    tied_key: str | None = None
    tied_weights: tuple[str, ...] = ()
    forward: Callable[[Any, Any], Any] | None = None
    recomputable: bool = False

    def build(self) -> nn.Module:
        """Make the layer, with its initial weights."""
        return self.module_type(**self.arguments)


def layers(
    spec: ModelSpec,
    topology: Topology,
    *,
    seed: int,
    dropout: DropoutRng | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[LayerDescription]:
    """Describe the whole model: embedding, blocks, final norm, output.

    Args:
        spec: the architecture.
        topology: decides which part of divided parameters this rank builds.
        seed: of the initial weights.
        dropout: source of dropout masks; None makes one from ``seed``.
        dtype: type of the parameters.
        device: where parameters are made ("meta" makes shapes only).

    Returns:
        ``num_layers + 3`` descriptions; number i is built under the name ``str(i)``, tied
        ones under ``tied_modules.embed``: the names DeepSpeed's ``PipelineModule`` gives.

    Raises:
        ConfigError: when built, if sizes do not fit or a name is unknown.
    """
    rng = dropout or DropoutRng(seed=seed, topology=topology)
    root = ParameterScope(seed=seed, topology=topology, dtype=dtype, device=device)
    tied = not spec.no_weight_tying
    embedding = {
        "scope": root.child("tied_modules.embed" if tied else "0"),
        "spec": spec,
        "dropout": rng,
    }
    tie: dict[str, Any] = (
        {"tied_key": "embed", "tied_weights": ("word_embeddings.weight",)} if tied else {}
    )
    # One table of angles and one mask of each kind serve all blocks.
    shared = {"rotary": build_rotary(spec), "masks": MaskTables()}
    blocks = [
        _block(kind, shared, scope=root.child(str(layer + 1)), spec=spec, layer=layer, dropout=rng)
        for layer, kind in enumerate(attention_types(spec))
    ]
    norm, last = root.child(str(spec.num_layers + 1)), root.child(str(spec.num_layers + 2))
    output = (
        # Where a stage holds this one alone, it is the output weight and nothing of positions.
        LayerDescription(
            module_type=Embedding,
            arguments={**embedding, "positions": False},
            forward=tied_output,
            **tie,
        )
        if tied
        else LayerDescription(module_type=OutputLayer, arguments={"scope": last, "spec": spec})
    )
    return [
        LayerDescription(module_type=Embedding, arguments=embedding, **tie),
        *blocks,
        LayerDescription(module_type=FinalNorm, arguments={"scope": norm, "spec": spec}),
        output,
    ]


def _block(kind: str, shared: dict[str, Any], **arguments: Any) -> LayerDescription:
    """Describe a block by its kind of attention; ``shared`` is for those that attend."""
    if kind in MIXERS:
        return LayerDescription(
            module_type=GMLPTransformerBlock, arguments=arguments, recomputable=True
        )
    return LayerDescription(
        module_type=TransformerBlock, arguments={**arguments, **shared}, recomputable=True
    )


class GPT(nn.Module):
    """All layers in one module, run in order.

    Attributes:
        dropout: source of dropout masks; the loop tells it the step and micro-batch.
        loss_fn: what :meth:`forward` applies when it is given labels.
    """

    def __init__(
        self,
        spec: ModelSpec,
        topology: Topology | None = None,
        *,
        seed: int,
        loss_fn: LossFunction | None = None,
        dropout: DropoutRng | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Build the model.

        Args:
            spec: the architecture.
            topology: this rank's place; None for one process by itself.
            seed: of initial weights and dropout.
            loss_fn: maps (hidden states, output weight) and labels to a scalar.
            dropout: source of dropout masks; None makes one from ``seed``.
            dtype: type of the parameters.
            device: where to build ("cpu", or "meta" for shapes only).
        """
        super().__init__()
        topology = topology or Topology.single()
        self.dropout = dropout or DropoutRng(seed=seed, topology=topology)
        self.loss_fn = loss_fn
        self.tied_modules = nn.ModuleDict()
        functions: list[tuple[LayerFunction, bool]] = []
        described = layers(
            spec, topology, seed=seed, dropout=self.dropout, dtype=dtype, device=device
        )
        for index, description in enumerate(described):
            module = self._module(index, description)
            function: LayerFunction = (
                module if description.forward is None else partial(description.forward, module)
            )
            functions.append((function, description.recomputable))
        freeze_base(self, spec)
        self._run = LayerRun(functions, dropout=self.dropout, recomputed=recomputed_blocks(spec))

    def _module(self, index: int, description: LayerDescription) -> nn.Module:
        key = description.tied_key
        if key is None:
            module = description.build()
            self.add_module(str(index), module)
            return module
        if key not in self.tied_modules:
            self.tied_modules[key] = description.build()
        return self.tied_modules[key]

    def forward(
        self, tokens: torch.Tensor, labels: tuple[torch.Tensor, ...] | None = None
    ) -> Output | torch.Tensor:
        """Run the model.

        The loss is taken in here, not by the caller, so that ZeRO-3 still holds the gathered
        output weight when it is multiplied.

        Args:
            tokens: int64 ``[B, S]``.
            labels: what ``loss_fn`` compares with; see :class:`megatron.model.DomainLoss`.

        Returns:
            Without labels the hidden states ``[B, S, hidden]`` and the output weight ``[V,
            hidden]`` (this rank's rows); with labels the loss, a scalar.
        """
        value = self._run(tokens)
        if labels is None:
            output: Output = value
            return output[:2]
        if self.loss_fn is None:
            raise ValueError("labels were given to a model that was built without loss_fn")
        return self.loss_fn(value, labels)


def freeze_base(model: nn.Module, spec: ModelSpec) -> None:
    """Let what the specification adds to a model be all that is trained, if it adds something.

    Args:
        model: the whole model, or a pipeline's stage.
        spec: the architecture.
    """
    if spec.soft_prompt_tuning is not None:
        freeze_all_but_prompt(model)
    if spec.lora is not None:
        freeze_all_but_lora(model)


def param_groups(
    model: nn.Module, weight_decay: float, *, width: float = 1.0, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Divide what is trained into what decays and what does not (norms and biases).

    Args:
        model: any module of this package's layers.
        weight_decay: of the first group.
        width: multiple of the base model's width under µP.  Matrices between hidden layers are a
            group of their own then, with an ``lr_scale`` of one over it; they decay by as much
            per step as they would in the base model.
        decay_embeddings: whether input, position and output embeddings decay.

    Returns:
        Groups for a torch optimizer, with a ``name``; an empty one is left out.
    """
    decayed: list[nn.Parameter] = []
    hidden: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for module in model.modules():
        norm = isinstance(module, Norm)
        spare = isinstance(module, VocabParallelEmbedding | Embedding | OutputWeight)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if norm or name == "bias" or (spare and not decay_embeddings):
                spared.append(parameter)
            elif width != 1.0 and isinstance(module, ColumnParallelLinear | RowParallelLinear):
                hidden.append(parameter)
            else:
                decayed.append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": hidden,
            "weight_decay": weight_decay * width,
            "name": "hidden",
            "lr_scale": 1.0 / width,
        },
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": spared, "weight_decay": 0.0, "name": "not_decayed"},
    ]
    return [group for group in groups if group["params"]]
