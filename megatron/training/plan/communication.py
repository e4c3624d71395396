"""How many bytes one rank sends in a step, by kind.

Collectives are counted as rings send them: an all-reduce of n bytes over k ranks is
2 (k − 1) / k · n from each, an all-gather or a reduce-scatter half of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.model.spec import ModelSpec, block_experts
from megatron.training.plan.activations import Setting
from megatron.training.plan.zero import ZeroSettings


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """A stage as communication sees it.

    Attributes:
        first: number of its first layer.
        last: number of the layer after its last.
        stage: which it is.
        stages: how many there are.
        parameters: that one of its tensor ranks holds.
        weight_bytes: of those, padded as they are sent.
        experts: of those, parameters of experts that data ranks share out.
    """

    first: int
    last: int
    stage: int
    stages: int
    parameters: int
    weight_bytes: float
    experts: int = 0


def step_volume(
    spec: ModelSpec,
    setting: Setting,
    zero: ZeroSettings,
    shape: StageShape,
    *,
    data_size: int,
    accumulation: int,
    domains: int,
    expert_size: int = 1,
) -> dict[str, float]:
    """Return the bytes that one rank of a stage sends in a step, by kind (no kind with none).

    Args:
        spec: the architecture.
        setting: micro-batch, number format, tensor ranks.
        zero: DeepSpeed's settings.
        shape: the stage.
        data_size: data-parallel ranks.
        accumulation: micro-batches per step.
        domains: K, for the ledger.
        expert_size: data ranks that share experts out.
    """
    volume = {
        "tensor": _tensor(spec, setting, shape) * accumulation,
        "pipeline": _pipeline(spec, setting, shape) * accumulation,
        "tied embedding": _tied(spec, setting, zero, shape),
        "experts": _experts(spec, setting, shape, expert_size) * accumulation,
        **_zero(zero, shape, data_size, accumulation, expert_size),
        "ledger": _all_reduce(data_size) * (4 * domains + 4) * 8,
    }
    return {kind: sent for kind, sent in volume.items() if sent}


def seconds(volume: Mapping[str, float], bandwidth: float) -> float:
    """Return how long sending takes if nothing else is done meanwhile."""
    return sum(volume.values()) / bandwidth


def _all_reduce(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def _tensor(spec: ModelSpec, setting: Setting, shape: StageShape) -> float:
    """One micro-batch: two sums a block on the way forward and two on the way back.

    Under sequence parallelism each is a reduce-scatter and an all-gather instead, and the
    input of the two column-parallel projections is gathered once more in backward.
    """
    ranks = setting.tensor_size
    tokens = setting.tokens(spec)
    whole = tokens * spec.hidden_size * setting.width
    once = _all_reduce(ranks) * whole
    blocks = max(0, min(shape.last, spec.num_layers + 1) - max(shape.first, 1))
    sums = blocks * 4
    if spec.checkpoint_activations:
        # Forward again, up to the last result that backward needs: not a group's last sum.
        sums += blocks * 2 - -(-blocks // spec.checkpoint_num_layers)
    if setting.sequence_parallel:
        sums += blocks  # twice the half of a sum
    if shape.first == 0:
        sums += 1
    sent = sums * once
    if shape.last == spec.num_layers + 3:
        # The gradient of the hidden states; largest logit, sum and target's logit per token.
        sent += once + _all_reduce(ranks) * tokens * 3 * 4
    if not setting.sequence_parallel:
        # What stages hand over in parts is put together again: activations that arrive, the
        # stage's own output for backward, and its gradient.
        sent += ((shape.stage > 0) + 2 * (shape.stage < shape.stages - 1)) * once / 2
    return sent


def _pipeline(spec: ModelSpec, setting: Setting, shape: StageShape) -> float:
    """One micro-batch: activations forward, their gradients back; tensor ranks share them out."""
    sent = setting.tokens(spec) * spec.hidden_size * setting.width / setting.tensor_size
    return sent * ((shape.stage < shape.stages - 1) + (shape.stage > 0))


def _tied(spec: ModelSpec, setting: Setting, zero: ZeroSettings, shape: StageShape) -> float:
    """The two ends of a pipeline add up their gradients of the embedding that they share."""
    ends = shape.stage in (0, shape.stages - 1)
    if spec.no_weight_tying or shape.stages == 1 or not ends:
        return 0.0
    rows = spec.padded_vocab_size(setting.tensor_size) // setting.tensor_size
    return _all_reduce(2) * rows * spec.hidden_size * zero.accumulated_width


def _experts(spec: ModelSpec, setting: Setting, shape: StageShape, ranks: int) -> float:
    """One micro-batch: rows to their experts and back, twice with the gradients; spread evenly."""
    if ranks == 1:
        return 0.0
    held = block_experts(spec)[max(shape.first, 1) - 1 : max(shape.last - 1, 0)]
    blocks = sum(number > 1 for number in held)
    rows = setting.tokens(spec) * spec.moe_top_k
    passes = 6 if spec.checkpoint_activations else 4
    return blocks * passes * rows * spec.hidden_size * setting.width * (ranks - 1) / ranks


def _zero(
    zero: ZeroSettings, shape: StageShape, data_size: int, accumulation: int, expert_size: int
) -> dict[str, float]:
    """Gradients to their owners, weights back (Rajbhandari et al. 2020, section 7)."""
    # Shared experts go around among their copies alone.
    half, own = _all_reduce(data_size) / 2, _all_reduce(data_size // expert_size) / 2
    gradients = zero.communicated_width * (
        (shape.parameters - shape.experts) * half + shape.experts * own
    )
    each = shape.weight_bytes / max(shape.parameters, 1)
    weights = each * ((shape.parameters - shape.experts) * half + shape.experts * own)
    if zero.stage == 3:
        # Gathered for forward and for backward, reduce-scattered, with every micro-batch.
        return {
            "gradients": gradients * accumulation,
            "weights": 2 * weights * accumulation,
        }
    gradients *= 2 if zero.all_reduced else 1
    gradients *= accumulation if zero.stage == 2 else 1
    return {"gradients": gradients, "weights": weights if zero.stage else 0.0}
