"""Where and how the run is spread: layout, ZeRO, launcher, tokenizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megatron.config.base import Count, Group, NonNegativeInt, Text


class ParallelConfig(Group):
    """How the model is divided."""

    pipe_parallel_size: NonNegativeInt = 0
    """Pipeline stages; 0 and 1 both mean the whole model on every rank."""
    model_parallel_size: Count = 1
    """Tensor-parallel ranks: how many share every layer."""
    sequence_parallel: bool = False
    """Divide activations between the layers that tensor ranks share along the sequence too."""
    pipe_partition_method: Text = "type:transformer"
    """How layers are dealt out to stages: `uniform` (as many layers each), `parameters` (as many
    parameters each) or `type:REGEX` (as many layers each whose class matches)."""
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format in which gradients are summed over ranks. Default: that of the gradients."""

    @property
    def stages(self) -> int:
        """Number of pipeline stages, at least 1."""
        return max(1, self.pipe_parallel_size)


class ZeroConfig(Group):
    """DeepSpeed's ZeRO: the block `zero_optimization: {stage, …}`."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    """0 to 3: what is divided over data ranks (1 optimizer state, 2 also gradients, 3 also
    parameters). 0 runs as 1: same numbers, and its state can be laid out anew."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Bucket sizes and the like, handed to DeepSpeed as they are."""

    @property
    def effective_stage(self) -> int:
        """The stage that is run: 1 for 0."""
        return max(1, self.stage)


class LaunchConfig(Group):
    """Where ranks are started."""

    num_gpus: Count | None = None
    """Ranks on this node. Default: one per GPU, or one on CPU."""
    num_nodes: Count | None = None
    """Number of nodes."""
    hostfile: Text | None = None
    """File of hosts and slots. (Several nodes come with a later release.)"""
    include: Text | None = None
    """Devices to use, in DeepSpeed's form (`localhost:0,2`)."""
    exclude: Text | None = None
    """Devices to leave out, in the same form."""
    master_addr: Text | None = None
    """Address of rank 0. Default: this node."""
    master_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of rank 0. Default: a free one."""


class TokenizerConfig(Group):
    """The tokenizer that made the data: its vocabulary size and its end-of-document token."""

    tokenizer_type: (
        Literal[
            "GPT2BPETokenizer",
            "HFTokenizer",
            "HFGPT2Tokenizer",
            "SPMTokenizer",
            "CharLevelTokenizer",
            "TiktokenTokenizer",
        ]
        | None
    ) = None
    """Kind of tokenizer. Default: none; the vocabulary size then comes from `vocab_size` or from
    the data."""
    vocab_file: Text | None = None
    """Vocabulary: `tokenizer.json`, `vocab.json`, a sentencepiece model or a tiktoken file."""
    merge_file: Text | None = None
    """Merges of GPT2BPETokenizer."""
