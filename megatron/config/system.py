"""Where and how the run is spread: layout, ZeRO, launcher, tokenizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megatron.config.base import Count, Group, NonNegativeInt, Positive, Text


class ParallelConfig(Group):
    """How the model is divided."""

    pipe_parallel_size: NonNegativeInt = 0
    """Pipeline stages; 0 and 1 both mean the whole model on every rank."""
    model_parallel_size: Count = 1
    """Tensor-parallel ranks: how many share every layer."""
    sequence_parallel: bool = False
    """Divide activations between the layers that tensor ranks share along the sequence too."""
    moe_expert_parallel_size: Count = 1
    """Neighbouring data ranks that share the experts of `moe_num_experts` out among themselves;
    divides both numbers. 1: every data rank holds all experts."""
    pipe_partition_method: Text = "type:transformer"
    """How layers are dealt out to stages: `uniform` (as many layers each), `parameters` (as many
    parameters each) or `type:REGEX` (as many layers each whose class matches)."""
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format in which gradients are summed over ranks. Default: that of the gradients."""
    prescale_gradients: bool = False
    """Divide gradients by the number of data ranks before they are summed, so that no sum leaves
    fp16's range, instead of after. Gradients are then summed whole (`reduce_scatter: false`)."""
    gradient_predivide_factor: Positive = 1.0
    """Divide gradients by this before they are summed and by the rest after. Likewise; has no
    effect with `prescale_gradients`, which divides by all before."""

    @property
    def divides_before_sum(self) -> bool:
        """Whether gradients are divided before they are summed over ranks."""
        return self.prescale_gradients or self.gradient_predivide_factor != 1.0

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
    """Where ranks are started, and by what."""

    launcher: Literal["local", "pdsh", "openmpi", "mpich", "impi", "slurm", "torchrun"] | None = (
        None
    )
    """What starts the ranks. Default: `pdsh` if the hostfile has several hosts, `slurm` in a
    Slurm job of several nodes, else `local`."""
    num_gpus: Count | None = None
    """Ranks on each node. Default: one per slot of the hostfile, or per GPU, or one on CPU."""
    num_nodes: Count | None = None
    """Number of nodes. Default: all of the hostfile or of the Slurm job."""
    node_rank: NonNegativeInt | None = None
    """Number of this node under `launcher: torchrun` on several; also the variable NODE_RANK."""
    hostfile: Text | None = None
    """File of hosts and slots, with lines such as `worker-0 slots=8`."""
    include: Text | None = None
    """Hosts and devices to use, in DeepSpeed's form (`worker-0:0,2@worker-1`)."""
    exclude: Text | None = None
    """Hosts and devices to leave out, in the same form."""
    force_multi: bool = False
    """Start the ranks through the remote launcher even if there is one host."""
    master_addr: Text | None = None
    """Address of rank 0. Default: this node, or the first of several hosts."""
    master_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of rank 0. Default: a free one, or 29500 with several hosts."""
    launcher_args: Text | None = None
    """Further words for pdsh, mpirun or srun (`--partition=gpu`), quoted as for a shell."""
    comment: Text | None = None
    """Comment of the Slurm job."""
    account: Text | None = None
    """Account that the Slurm job is charged to."""


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
