"""What forward passes leave behind for backward, and what the passes need beside it.

Counted operation by operation as the layers of ``megatron.model`` are written, in the manner of
Korthikanti et al. (2022, section 4), whose 34 bytes per token and hidden unit of a 16-bit block
are here 36 without dropout: a fused projection is kept whole beside the rotated queries and
keys, and masks of dropout come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.model.accounting import block_kinds
from megatron.model.spec import (
    GATED_ACTIVATIONS,
    MIXERS,
    ModelSpec,
    ffn_width,
    head_size,
    kv_heads,
    shares_norm,
)

_CHUNK = 1024  # tokens whose logits exist at a time (DomainLoss)
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 19, 1 << 26  # elements that its softmax widens at a time


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What activations depend on beside the architecture.

    Attributes:
        micro_batch: samples in a pass.
        width: bytes of a number as the model computes.
        tensor_size: ranks that share each layer.
        sequence_parallel: they also share the sequence between those layers.
        on_cpu: CPU kernels, which keep more.
        inputs_on_host: recomputed blocks keep their inputs in the host's memory.
    """

    micro_batch: int
    width: int
    tensor_size: int = 1
    sequence_parallel: bool = False
    on_cpu: bool = False
    inputs_on_host: bool = False

    def tokens(self, spec: ModelSpec) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * (spec.seq_length or 0)

    def residual(self, spec: ModelSpec) -> float:
        """Bytes of the residual stream of one micro-batch on one rank."""
        ranks = self.tensor_size if self.sequence_parallel else 1
        return self.tokens(spec) * spec.hidden_size * self.width / ranks


@dataclass(frozen=True, kw_only=True)
class StageActivations:
    """Bytes on one rank of a stage.

    Attributes:
        saved: kept from forward to backward by one micro-batch.
        in_flight: micro-batches that are between the two at the same time.
        workspace: the most that running one block or the loss adds for a while.
    """

    saved: float
    in_flight: int
    workspace: float

    @property
    def total(self) -> float:
        """At the worst moment."""
        return self.saved * self.in_flight + self.workspace


def stage_activations(
    spec: ModelSpec, setting: Setting, first: int, last: int, in_flight: int
) -> StageActivations:
    """Count the activations of the layers from ``first`` up to before ``last``."""
    total = spec.num_layers + 3
    blocks = block_kinds(spec)[max(first, 1) - 1 : max(last - 1, 0)]
    tokens = setting.tokens(spec)
    saved = blocks_saved(spec, setting, blocks)
    saved += tokens * 24  # ids, targets, mask, weights
    saved += embedding_saved(spec, setting) if first == 0 else 0
    saved += norm_saved(spec, setting) if first <= spec.num_layers + 1 < last else 0
    # A stage keeps its output for backward; tensor ranks that hold the same share it out.
    handed_on = tokens * spec.hidden_size * setting.width / setting.tensor_size
    saved += handed_on if last < total else loss_saved(spec, setting)
    workspace = _block_workspace(spec, setting, blocks) if blocks else 0.0
    if last == total:
        workspace = max(workspace, loss_workspace(spec, setting))
    return StageActivations(saved=saved, in_flight=in_flight, workspace=workspace)


def block_saved(spec: ModelSpec, setting: Setting, kind: str = "global", experts: int = 1) -> float:
    """Return the bytes that one block keeps when it is not recomputed, its input included."""
    if kind in MIXERS:
        return _gmlp_saved(spec, setting, kind)
    tokens, residual = setting.tokens(spec), setting.residual(spec)
    share = tokens * setting.width / setting.tensor_size
    query = spec.hidden_size
    shared = kv_heads(spec) * head_size(spec)
    rotated = spec.pos_emb == "rotary"
    attention = share * (query + 2 * shared + (query + shared if rotated else 0) + query)
    attention += tokens * spec.num_attention_heads / setting.tensor_size * 4  # log-sum-exp
    norms = (1 if shares_norm(spec) else 2) * norm_saved(spec, setting)
    widened = spec.norm == "rmsnorm" and setting.on_cpu and setting.width < 4
    if spec.gpt_j_residual and not spec.gpt_j_tied and not widened:
        norms -= residual  # both norms keep the same input
    inputs = residual * (1 if shares_norm(spec) else 2)  # of the two column-parallel projections
    masks = _hidden_mask(spec, setting) * 2 + _attention_masks(spec, setting)
    mlp = share * ffn_width(spec) * _mlp_copies(spec)
    if experts > 1:
        mlp = mlp * spec.moe_top_k + _dispatch_saved(spec, setting, experts)
    return attention + mlp + norms + inputs + masks


def _dispatch_saved(spec: ModelSpec, setting: Setting, experts: int) -> float:
    """Rows sorted by expert and as they came back, the router's numbers, and places of rows."""
    tokens, chosen = setting.tokens(spec), spec.moe_top_k
    ranks = setting.tensor_size if setting.sequence_parallel else 1
    rows = 2 * chosen * tokens * spec.hidden_size * setting.width
    routed = tokens / ranks * (2 * experts * 4 + chosen * 8)
    noise = 2 * setting.residual(spec) if spec.moe_jitter_eps else 0.0
    return rows + routed + tokens * chosen * (2 * 8 + setting.width) + noise


def _gmlp_saved(spec: ModelSpec, setting: Setting, kind: str) -> float:
    """Both halves before and after the activation, the gate normalised and mixed, the product."""
    tokens, width = setting.tokens(spec) * setting.width, ffn_width(spec)
    gate = tokens * width
    rows = (spec.seq_length or 0) ** 2 * setting.width
    numbers = 7 * gate + rows + setting.residual(spec) + norm_saved(spec, setting)
    if kind == "amlp":
        numbers += 4 * tokens * spec.gmlp_attn_dim
        if setting.on_cpu:  # the plain kernel: queries and keys scaled, and the chances
            float32 = 2 * spec.gmlp_attn_dim + (spec.seq_length or 0)
            numbers += 4 * setting.tokens(spec) * float32
    return numbers + _hidden_mask(spec, setting)


def blocks_saved(spec: ModelSpec, setting: Setting, blocks: Sequence[tuple[str, int]]) -> float:
    """Return what neighbouring blocks keep, given their kinds: all, or their groups' inputs."""
    if not spec.checkpoint_activations:
        return sum(block_saved(spec, setting, *kind) for kind in blocks)
    if setting.inputs_on_host and not setting.on_cpu:
        return setting.residual(spec) if blocks else 0.0  # on its way there or back
    return -(-len(blocks) // spec.checkpoint_num_layers) * setting.residual(spec)


def norm_saved(spec: ModelSpec, setting: Setting) -> float:
    """Return the bytes that a norm keeps: its input and a statistic or two per token."""
    residual, tokens = setting.residual(spec), setting.tokens(spec)
    ranks = setting.tensor_size if setting.sequence_parallel else 1
    statistic = tokens * (setting.width if setting.on_cpu else 4) / ranks
    if spec.norm.endswith("layernorm"):
        return residual + 2 * statistic
    if spec.norm == "scalenorm":
        # The stream, widened once where it is narrow, and one length per token.
        return residual * (1 if setting.width == 4 else 4 / setting.width) + 3 * statistic
    # Unfused on a CPU, where half precision is widened on the way.
    return residual * ((2 if setting.width == 4 else 4) if setting.on_cpu else 1) + statistic


def embedding_saved(spec: ModelSpec, setting: Setting) -> float:
    """Return the bytes that the embedding keeps beside the ids."""
    return _hidden_mask(spec, setting)


def loss_saved(spec: ModelSpec, setting: Setting) -> float:
    """Return the bytes that the loss keeps: the gradients it has taken in forward."""
    tokens = setting.tokens(spec)
    width = 4 if tokens > _CHUNK else setting.width
    return tokens * spec.hidden_size * setting.width + _head(spec, setting) * width


def loss_workspace(spec: ModelSpec, setting: Setting) -> float:
    """Return the bytes of one chunk's logits, of its widened part and of its products."""
    tokens = setting.tokens(spec)
    rows = min(tokens, _CHUNK)
    columns = spec.padded_vocab_size(setting.tensor_size) // setting.tensor_size
    workspace = float(rows * columns * setting.width)
    if setting.width < 4:
        block = (_CPU_BLOCK if setting.on_cpu else _DEVICE_BLOCK) // columns + 1
        workspace += (rows if setting.tensor_size > 1 else min(rows, block)) * columns * 4
        workspace += _head(spec, setting) * setting.width if tokens > _CHUNK else 0
    return workspace + tokens * spec.hidden_size * setting.width  # the final norm's output


def _block_workspace(spec: ModelSpec, setting: Setting, blocks: Sequence[tuple[str, int]]) -> float:
    """Return what one block's backward adds: its gradients, and what is recomputed for it."""
    share = setting.tokens(spec) * setting.width / setting.tensor_size
    chosen = spec.moe_top_k if max(experts for _, experts in blocks) > 1 else 1
    gradients = 2 * share * ffn_width(spec) * (2 if spec.activation in GATED_ACTIVATIONS else 1)
    gradients = (gradients + 2 * setting.residual(spec)) * chosen
    if not spec.checkpoint_activations:
        return gradients
    repeated = min(spec.checkpoint_num_layers, spec.num_layers)
    largest = max(block_saved(spec, setting, *kind) for kind in set(blocks))
    again = repeated * largest - setting.residual(spec)
    return gradients + again


def _mlp_copies(spec: ModelSpec) -> float:
    """How many times its width the MLP keeps per token."""
    if spec.activation in GATED_ACTIVATIONS:
        return 3 if spec.activation == "bilinear" else 4
    return {"relu": 1, "softsign": 3}.get(spec.activation, 2)


def _hidden_mask(spec: ModelSpec, setting: Setting) -> float:
    if spec.hidden_dropout == 0:
        return 0.0
    return setting.residual(spec) / (1 if setting.on_cpu else setting.width)


def _attention_masks(spec: ModelSpec, setting: Setting) -> float:
    """Attention matrices, which only unfused kernels keep, and masks that no two blocks share."""
    heads = spec.num_attention_heads / setting.tensor_size
    matrix = setting.tokens(spec) * (spec.seq_length or 0) * heads
    if spec.pos_emb == "rpe":
        # Probabilities and the bias, by head and block.
        return matrix * setting.width * 2
    own = setting.tokens(spec) * (spec.seq_length or 0) if spec.reset_attention_mask else 0.0
    if spec.attention_dropout == 0 or not setting.on_cpu:
        return own * (heads * setting.width if spec.pos_emb == "alibi" else 1)
    return own + matrix * setting.width * (3 if setting.width == 4 else 6)


def _head(spec: ModelSpec, setting: Setting) -> int:
    """Numbers in this rank's part of the output weight."""
    return spec.padded_vocab_size(setting.tensor_size) // setting.tensor_size * spec.hidden_size
