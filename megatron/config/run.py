"""The run: how long, how it is measured, where it is kept, and what is logged."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from megatron.config.base import (
    Count,
    Group,
    NonNegative,
    NonNegativeInt,
    Positive,
    Text,
    invalid,
    listed,
)
from megatron.config.policies import SpikePolicy, SpikeReaction, split_policy
from megatron.config.profiling import CommsLoggerConfig, CsvMonitorConfig, FlopsProfilerConfig

_SKIP = re.compile(r"skip\(([1-9][0-9]{0,8})\)")

STEPS_OF_EPOCHS = 2**40
"""Stands for ``train_iters`` until the data has been opened, under ``train_epochs``."""


def _nonfinite(value: Any) -> Any:
    if isinstance(value, str):
        text = value.replace(" ", "").lower()
        if text == "stop" or _SKIP.fullmatch(text):
            return text
        raise PydanticCustomError("on_nonfinite", "should be 'stop' or 'skip(k)', such as skip(3)")
    return value


class TrainingConfig(Group):
    """Length of the run, validation, and what makes it repeatable."""

    train_iters: Count
    """Optimizer steps of the whole run; or give `train_epochs`."""
    train_epochs: Count | None = None
    """Where no `train_iters` are given: as many steps as this many passes over all training data
    have whole batches, each domain's windows counted once a pass. How often each domain itself is
    read follows from the mixture; with `mixing: {weights: natural}` it is so often, too."""
    seed: NonNegativeInt = 1234
    """Seed of the weights, the order of the data and dropout."""
    eval_interval: Count = 1000
    """Steps between two validations (there is one before the first step and one at the end)."""
    eval_iters: NonNegativeInt = 100
    """Size of a validation: this many global batches per domain (or all of it); 0 = none."""
    max_validation_samples_per_dataset: Count | None = None
    """Upper bound of a validation, in samples per domain."""
    max_test_samples_per_dataset: Count | None = None
    """Upper bound of the final test, in samples per domain."""
    exit_interval: Count | None = None
    """Save and end at every multiple of this many steps."""
    on_nonfinite: Annotated[
        Text,
        BeforeValidator(_nonfinite),
        WithJsonSchema({"type": "string", "pattern": r"^\s*([sS]top|[sS]kip\([1-9][0-9]*\))\s*$"}),
    ] = "stop"
    """What a step with a non-finite loss does: `stop` ends the run and keeps the last checkpoint;
    `skip(k)` leaves the step out and stops after k in a row."""
    on_loss_spike: SpikePolicy = "off"
    """What a step does whose loss is far above what its domains' losses lead to expect: `warn`
    says so; `stop` ends the run; `skip(k)` leaves its update out, and stops after k in a row (it
    has to know the loss before the update, one wait for the device more a step); `rollback(k)`
    takes weights and optimizer back to the newest checkpoint and goes on with the data that comes
    next, up to k times to one checkpoint."""
    loss_spike_sigma: Positive = 6.0
    """Standard deviations above the expected loss that make a spike."""
    loss_spike_window: Count = 100
    """Steps that the expectation reaches back, and that are watched before any is judged."""
    state_check_interval: NonNegativeInt = 100
    """Steps between two comparisons of the ranks' mixing and data state (a hash of a few bytes;
    the run ends if they differ). 0 = only before a checkpoint is written."""
    stall_report: NonNegative = 300.0
    """Seconds without a move after which a rank says where it waits, and rank 0 where all do.
    0 = never."""
    stall_timeout: NonNegative = 1800.0
    """Seconds without a move after which the run ends, with that message. Planning, saving,
    restoring and validating may take longer as long as every rank answers. 0 = never; a
    collective then fails by itself after half an hour."""
    deterministic: bool = False
    """Deterministic kernels on GPU, so that a resumed run is bit-identical there too (on CPU it
    always is)."""
    torch_compile: bool = False
    """Compile what each transformer block computes, forward and backward, with `torch.compile`
    (Hugging Face's `torch_compile`). Needs a C++ compiler on CPU, Triton and a C compiler on GPU.
    Losses equal those without it to rounding; dropout draws other masks."""
    audit_samples: bool = False
    """Write the ordered list of [domain, epoch, sample] of every step to `samples.jsonl`."""
    char_level_ppl: bool = False
    """Report perplexity per character, too: exp(loss × tokens / characters), with characters
    counted in decoded held-out text (200 windows of a domain). Needs `tokenizer_type`."""
    eod_mask_loss: bool = False
    """Leave the loss of end-of-document tokens out."""
    fp16_lm_cross_entropy: bool = False
    """Take the softmax of the loss in fp16, as the logits are. Needs `precision: fp16`; saves the
    memory of one block of logits, and losses have three digits."""
    z_loss: NonNegative = 0.0
    """Add this times the mean square of log Σ exp(logits) to what is trained on (PaLM's z-loss;
    Chowdhery et al. 2022, section 5), which keeps logits from drifting; 1e-4 is usual. The
    reported losses are without it. (GPT-NeoX reads the key for reward models alone.)"""
    epoch_offset: bool = True
    """Let each epoch of a domain cut its windows at another offset."""

    @property
    def counts_epochs(self) -> bool:
        """Whether the number of steps is still to be worked out from the data."""
        return self.train_iters == STEPS_OF_EPOCHS

    @property
    def nonfinite_limit(self) -> int:
        """Skipped steps in a row that are allowed: 0 for `stop`, k for `skip(k)`."""
        match = _SKIP.fullmatch(self.on_nonfinite)
        return int(match.group(1)) if match else 0

    @property
    def spike_policy(self) -> tuple[SpikeReaction, int]:
        """What a spike of the loss does, and the policy's k (0 where it has none)."""
        return split_policy(self.on_loss_spike)

    def validation_samples(
        self, global_batch: int, part: Literal["valid", "test"] = "valid"
    ) -> int:
        """Return the samples per domain of a reported validation or test, before the data's end.

        Args:
            global_batch: samples per optimizer step.
            part: which bound applies.
        """
        bound = (
            self.max_validation_samples_per_dataset
            if part == "valid"
            else self.max_test_samples_per_dataset
        )
        wanted = self.eval_iters * global_batch
        return wanted if bound is None else min(wanted, bound)


_NAME = re.compile(r"[A-Za-z0-9_.+-]+")


def is_run_name(value: object) -> bool:
    """Tell whether a value can be appended to a folder's name."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


RunName = Annotated[str, Field(pattern=f"^{_NAME.pattern}$", max_length=128)]


class CheckpointConfig(Group):
    """Where the run lives, and when it is saved."""

    run_dir: Text = "runs/default"
    """Folder of the run: resolved config, metrics, mixture ledger, checkpoints, report."""
    run_name: RunName | None = None
    """Appended to `run_dir` with a hyphen when the files are read, so that one file beside others
    makes runs of different names. A `run_dir` given by `--set` is taken as it is."""
    save: Text | None = None
    """Folder of the checkpoints. Default: `checkpoints` in `run_dir`."""
    load: Text | None = None
    """Folder of checkpoints, or of a run, whose newest the run starts from when `save` holds none
    yet; or the folder of one checkpoint. Default: `save`."""
    iteration: NonNegativeInt | None = None
    """Which checkpoint is used: by `evaluate.py` and `generate.py`, and of `load` by a run that
    starts there. Default: the newest."""
    save_interval: Count | None = None
    """Save every so many steps (GPT-NeoX: `checkpoint_factor`). The last step is always saved."""
    checkpoint_scale: Literal["linear", "log"] = "linear"
    """`log`: save at steps 1, f, f², … with f = `checkpoint_factor`."""
    checkpoint_factor: Annotated[float, Field(ge=1.01)] | None = None
    """Growth of the distance between saves under `checkpoint_scale: log`; under `linear` it is
    another name for `save_interval`."""
    extra_save_iters: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(listed)] = ()
    """Further steps to save at (0 = before the first)."""
    keep_last_n_checkpoints: Count | None = None
    """Delete all but this many newest checkpoints. Default: keep all."""
    load_universal: bool = False
    """The checkpoint in `load` is in DeepSpeed's universal format, which
    `tools/convert_checkpoint.py` writes and a run in any layout can start from."""
    finetune: bool = False
    """Take only the weights from `load` and start at step 0."""
    finetune_optimizer: bool = False
    """With `finetune`: take the optimizer's state, too, so that the first steps are no colder than
    those that they follow."""
    no_load_optim: bool = False
    """Leave the optimizer's state of a checkpoint where it is: weights, data, mixing and the step
    go on, and the optimizer starts afresh. Every launch does so as long as it is set."""
    no_save_optim: bool = False
    """Leave the optimizer's state out of checkpoints, which are then a third as large or less. To
    go on from one set `no_load_optim` or `finetune`. The weights have the model's number format.
    Not under ZeRO 3."""
    checkpoint_validation_with_forward_pass: bool = False
    """Keep the loss of a forward pass on fixed tokens with each checkpoint, and compare it after
    loading. (That every byte is what was written is checked anyway.)"""
    async_save: bool = False
    """Copy the state to host memory at a save and go on training, while a thread writes the
    checkpoint behind the next steps (Megatron-LM's `--async-save`). The files are those of a save
    that is waited for. Takes as much host memory as the checkpoint has bytes, shared among the
    ranks; of a GPU's state the memory is pinned."""
    save_timeout: Positive = 600.0
    """Seconds that a stopped run may take to save before it is killed (with `async_save`, what is
    being written then and the last checkpoint together)."""

    @model_validator(mode="after")
    def _factor(self) -> Self:
        if self.checkpoint_scale == "log" and self.checkpoint_factor is None:
            raise invalid("checkpoint_scale", "'log' needs checkpoint_factor, a number above 1")
        if self.checkpoint_scale == "linear" and self.checkpoint_factor is not None:
            raise invalid("checkpoint_factor", "under checkpoint_scale: linear, give save_interval")
        if self.finetune_optimizer and not self.finetune:
            raise invalid("finetune_optimizer", "it belongs to finetune: true")
        if self.finetune_optimizer and self.no_load_optim:
            raise invalid("no_load_optim", "contradicts finetune_optimizer")
        return self

    @property
    def save_dir(self) -> str:
        """Folder that checkpoints are written to."""
        return self.save or f"{self.run_dir}/checkpoints"

    @property
    def load_dir(self) -> str:
        """Folder that the run starts from."""
        return self.load or self.save_dir

    def takes_optimizer(self, *, weights_only: bool) -> bool:
        """Tell whether the optimizer's state is taken from a checkpoint.

        Args:
            weights_only: whether a new run begins with the checkpoint's weights.
        """
        return self.finetune_optimizer if weights_only else not self.no_load_optim

    def saves_at(self, step: int, train_iters: int) -> bool:
        """Tell whether a checkpoint is due after ``step`` (0 = before the first step)."""
        if step == train_iters or step in self.extra_save_iters:
            return True
        if step < 1:
            return False
        if self.save_interval is not None and step % self.save_interval == 0:
            return True
        if self.checkpoint_factor is None:
            return False
        due = 1.0
        while round(due) < step:
            due *= self.checkpoint_factor
        return round(due) == step


_STATISTICS = {
    "log_grad_norm": "gradient_norms",
    "log_param_norm": "parameter_norms",
    "log_grad_pct_zeros": "pct_grad_zeros",
    "log_optimizer_states": "optimizer_state_norms",
}


class LoggingConfig(Group):
    """What is shown and recorded beside the ledgers in `run_dir`."""

    log_interval: Count = 10
    """Steps between two lines on the console and in `metrics.jsonl`."""
    steps_per_print: Count | None = None
    """Steps between two lines on the console, where they shall be others than those of
    `metrics.jsonl`. Default: `log_interval`."""
    log_dir: Text | None = None
    """Folder of the ranks' output files. Default: `logs` in `run_dir`."""
    log_grad_norm: bool = False
    """Record the gradient norm of every parameter, before clipping, under `gradient_norms/…`."""
    log_param_norm: bool = False
    """Record the norm of every parameter's fp32 weights under `parameter_norms/…`."""
    log_grad_pct_zeros: bool = False
    """Record how many numbers of every gradient are 0, in per cent, under `pct_grad_zeros/…`."""
    log_optimizer_states: bool = False
    """Record the norm of every parameter's optimizer state under `optimizer_state_norms/…`."""
    log_gradient_noise_scale: bool = False
    """Record the simple gradient noise scale (McCandlish et al. 2018, appendix A) in samples, from
    the gradients of micro-batches and that of the whole batch, as `noise_scale`."""
    gradient_noise_scale_n_batches: Count = 5
    """Steps that a noise scale is averaged over, the logged step the last of them."""
    wall_clock_breakdown: bool = False
    """Record the seconds of rank 0's reading, forward and backward passes, sums over ranks and
    updates of logged steps, as `timers/…`. Waits for the GPU around each of them."""
    flops_profiler: FlopsProfilerConfig | None = None
    """Count the floating-point operations of one step by module: the block `flops_profiler:
    {enabled, profile_step, module_depth, top_modules, detailed, output_file}`, as DeepSpeed's."""
    comms_logger: CommsLoggerConfig | None = None
    """Let DeepSpeed log what it sends: the block `comms_logger: {enabled, verbose, prof_all,
    prof_ops, debug}`. The totals are written to `profile/communication.json` in `run_dir`."""
    dump_state: bool = False
    """Write what DeepSpeed was given and what it made of that to `deepspeed.json` in `run_dir`."""
    profile: bool = False
    """Write a trace of torch's profiler for rank 0 into `profile` in `run_dir`."""
    profile_step_start: Count = 10
    """First step of the trace."""
    profile_step_stop: Count = 12
    """Step before which the trace ends."""
    memory_profiling: bool = False
    """Keep the allocations of the same steps in rank 0's CUDA memory, for torch's memory viewer."""
    memory_profiling_path: Text | None = None
    """File that they are written to. Default: `profile/memory.pickle` in `run_dir`."""
    use_tensorboard: bool = False
    """Write TensorBoard events."""
    tensorboard_dir: Text | None = None
    """Folder of the events; giving it switches `use_tensorboard` on. Default: `tensorboard` in
    `run_dir`."""
    csv_monitor: CsvMonitorConfig | None = None
    """Write every number that charts have to a file of its own: the block `csv_monitor: {enabled,
    output_path, job_name}`, as DeepSpeed's."""
    use_wandb: bool = False
    """Record to Weights & Biases (offline where WANDB_MODE says so)."""
    wandb_group: Text | None = None
    """Group of the run."""
    wandb_run_name: Text | None = None
    """Name of the run."""
    wandb_team: Text | None = None
    """Team or user that owns the run."""
    wandb_project: Text = "neox"
    """Project of the run."""
    wandb_host: Text = "https://api.wandb.ai"
    """Server that runs are sent to."""
    use_comet: bool = False
    """Record to Comet (offline where COMET_MODE says so)."""
    comet_workspace: Text | None = None
    """Workspace of the experiment."""
    comet_project: Text | None = None
    """Project of the experiment."""
    comet_experiment_name: Text | None = None
    """Name of the experiment."""
    comet_tags: Annotated[tuple[Text, ...], BeforeValidator(listed)] = ()
    """Tags of the experiment."""
    comet_others: dict[str, Any] = Field(default_factory=dict)
    """Further facts to record with the experiment, by name."""
    peak_theoretical_tflops: Positive | None = None
    """Peak TFLOP/s of one device; gives the model FLOP utilisation in the log."""

    @model_validator(mode="after")
    def _trace(self) -> Self:
        traced = self.profile or self.memory_profiling
        if traced and self.profile_step_stop <= self.profile_step_start:
            raise invalid("profile_step_stop", "should be above profile_step_start")
        return self

    @property
    def statistics_keys(self) -> tuple[str, ...]:
        """The keys that ask for numbers of every parameter."""
        return tuple(key for key in _STATISTICS if getattr(self, key))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Which numbers of every parameter are recorded, by their names in the log."""
        return tuple(_STATISTICS[key] for key in self.statistics_keys)
