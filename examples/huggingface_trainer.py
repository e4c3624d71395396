"""Hugging Face's Trainer, with its training data drawn by one of neomix's controllers.

    python examples/huggingface_trainer.py --method odm
    python examples/huggingface_trainer.py --method skillit --option update_every=10
    python examples/huggingface_trainer.py --output_dir out --save_steps 10 --stop_after 20
    python examples/huggingface_trainer.py --output_dir out --resume

Four parts, to be taken into another program as they are:

* :class:`Mixture` holds the controller and the draw.  It decides a step when its first sample is
  asked for, which data loaders do ahead of time: with workers, prefetching or accumulation a step
  is decided from what was known when its batch was fetched.  The decision is kept until the step
  has trained, so the controller is told by which weights a step was really drawn.
* :class:`MixtureSampler`, a torch Sampler: the indices of the whole run, one step after the other.
* :class:`MixtureTrainer` computes the loss, weighed by domain if the method weighs losses, and
  sums it up by domain.  These sums are taken where the losses are: the Trainer's callbacks see
  only a mean.  It is the mean over the tokens of the whole batch on any number of processes and
  accumulation steps, as the Trainer's own.
* :class:`MixtureCallback` adds the sums of all processes after every optimizer step, tells the
  controller, and puts the state into ``trainer_state.json``, where checkpoints keep it.

Methods that read training losses or held-out losses can be used.  Those that compare with a
reference model or with gradients need more than a Trainer gives and are refused: see
``examples/plain_pytorch.py`` for what they want to be told.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Sampler
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_sampling_utils import Decision, Mixer, Observation, RunContext, Signal, build_mixer
from examples.drawing import Draw
from examples.generated_data import VOCABULARY, counter, make_domains, split
from megatron.errors import ConfigError, run_command

FloatArray = npt.NDArray[np.float64]

PROVIDED = {Signal.LOSS, Signal.VALID_LOSS, Signal.LOSS_VARIANCE, Signal.LEARNING_RATE}
STATE = "mixture"
"""Key of the mixture's state in ``trainer_state.json``."""


class DomainDataset(Dataset[dict[str, Any]]):
    """Several datasets as one; every item says which one it is of.

    Args:
        domains: sequences of token ids, all of one length, by domain.
    """

    def __init__(self, domains: Mapping[str, Sequence[Any]]) -> None:
        self.names, self.parts = list(domains), list(domains.values())
        self.first = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self) -> int:
        """Count the items of all domains."""
        return int(self.first[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an item as the model takes it, and its domain's number."""
        domain = int(np.searchsorted(self.first, index, side="right")) - 1
        tokens = torch.as_tensor(self.parts[domain][index - self.first[domain]])
        return {"input_ids": tokens, "labels": tokens, "domain": domain}


class Mixture:
    """The controller, the draw, and the steps that are drawn and have not trained yet.

    Args:
        mixer: the controller.
        dataset: what is drawn from.
        batch: samples of an optimizer step, over all processes and accumulation steps.
        seed: of the draw.
        multinomial: see :class:`examples.drawing.Draw`.

    Raises:
        ConfigError: the method reads a signal that a Trainer does not give.
    """

    def __init__(
        self, mixer: Mixer, dataset: DomainDataset, *, batch: int, seed: int, multinomial: bool
    ) -> None:
        if missing := mixer.needs - PROVIDED:
            raise ConfigError(
                f"'{mixer.method}' reads {', '.join(sorted(missing))}, which the Trainer does not "
                f"give; choose a method that reads losses, or a loop of your own "
                f"(examples/plain_pytorch.py)"
            )
        self.mixer, self.dataset, self.batch = mixer, dataset, batch
        self._draw = Draw([len(p) for p in dataset.parts], seed=seed, multinomial=multinomial)
        self._pending: dict[int, Decision] = {}
        self._before: dict[int, dict[str, Any]] = {}
        self._kept: dict[int, FloatArray] = {}
        self.measure: Any = None
        """Measures the held-out losses, [K]; the trainer's."""
        self.trained = 0
        """The last step that has trained."""
        self.course: dict[int, FloatArray] = {}

    def indices(self, step: int) -> list[int]:
        """Draw a step; return where its samples are in the dataset."""
        if step <= self.trained:
            # A resumed Trainer runs through what has trained already, and reads none of it.
            return [0] * self.batch
        self._before[step] = self._draw.state_dict()
        decision = self._decide(step)
        self._pending[step] = decision
        samples = self._draw.step(
            step,
            decision.sampling_weights,
            self.batch,
            fresh_quota=decision.fresh_quota is not None,
        )
        return [int(self.dataset.first[domain]) + index for domain, index in samples]

    def _decide(self, step: int) -> Decision:
        decision = self._kept.pop(step, None)
        if decision is not None:  # drawn by the run that was interrupted
            return decision
        decision = self.mixer.decide(step=step)
        if decision.validate:
            losses = self.measure()
            nothing = np.zeros(len(losses))
            self.mixer.observe(
                Observation(step - 1, loss_sum=nothing, token_count=nothing, valid_loss=losses)
            )
            decision = self.mixer.decide(step=step)
        return decision

    def loss_weights(self, step: int) -> FloatArray | None:
        """Return the weight of a token of each domain in a step's loss, [K]; None = all 1."""
        return self._pending[step].loss_weights

    def observe(self, step: int, sums: FloatArray | None, lr: float) -> None:
        """Tell the controller what a step showed.

        Args:
            step: its number.
            sums: losses, tokens, squared mean losses and samples by domain, over all
                processes, [4, K]; None for a step whose update was dropped.
            lr: its learning rate.
        """
        decision = self._pending.pop(step)
        self._before.pop(step)
        self.trained = step
        self.course[step] = decision.sampling_weights
        if sums is not None:
            names = ("loss_sum", "token_count", "loss_square_sum", "sample_count")
            told = dict(zip(names, sums, strict=True))
            told |= {"sampling_weights": decision.sampling_weights, "learning_rate": lr}
            self.mixer.observe(Observation(step, **told))

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last trained step, JSON-able and the same on every process.

        Steps that a data loader has fetched ahead are kept as their decisions: the draw is the
        one before the first of them, and drawing them again gives the same samples.
        """
        ahead = sorted(self._pending)
        return {
            "trained": self.trained,
            "mixer": self.mixer.state_dict(),
            "draw": self._before[ahead[0]] if ahead else self._draw.state_dict(),
            "ahead": {str(step): _encode(self._pending[step]) for step in ahead},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.trained = state["trained"]
        self.mixer.load_state_dict(state["mixer"])
        self._draw.load_state_dict(state["draw"])
        self._kept = {int(step): _decode(kept) for step, kept in state["ahead"].items()}


def _encode(decision: Decision) -> dict[str, Any]:
    weights = decision.loss_weights
    return {
        "sampling_weights": decision.sampling_weights.tolist(),
        "loss_weights": None if weights is None else weights.tolist(),
        "fresh_quota": decision.fresh_quota,
        "probe": decision.probe,
    }


def _decode(state: Mapping[str, Any]) -> Decision:
    arrays = {
        name: None if state[name] is None else np.array(state[name], dtype=np.float64)
        for name in ("sampling_weights", "loss_weights")
    }
    return Decision(**{**state, **arrays})


class MixtureSampler(Sampler[int]):
    """The indices of a whole run, step by step.

    Every process runs through all of them, decides alike, and takes its own part.
    """

    def __init__(self, mixture: Mixture, steps: int) -> None:
        self.mixture, self.steps = mixture, steps

    def __len__(self) -> int:
        """Count the samples of the run."""
        return self.steps * self.mixture.batch

    def __iter__(self) -> Iterator[int]:
        """Draw one step after the other, each when its first index is asked for."""
        for step in range(1, self.steps + 1):
            yield from self.mixture.indices(step)


class MixtureTrainer(Trainer):
    """A Trainer that samples by a mixture and sums up its losses by domain.

    Args:
        mixer: the controller.
        dataset: the training data.
        held_out: the validation data.
        multinomial: see :class:`examples.drawing.Draw`.
        arguments: the Trainer's own; ``remove_unused_columns`` must be off, and the run's length
            given as ``max_steps``.
        **others: what else the Trainer takes.
    """

    # The loss is divided by the tokens of the whole step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        mixer: Mixer,
        dataset: DomainDataset,
        held_out: DomainDataset,
        multinomial: bool,
        arguments: TrainingArguments,
        **others: Any,
    ) -> None:
        if arguments.remove_unused_columns or arguments.max_steps <= 0:
            raise ConfigError(
                "a mixture needs remove_unused_columns=False, to know whose a sample is, and the "
                "run's length as max_steps"
            )
        if arguments.n_gpu > 1:
            raise ConfigError(
                f"one process drives {arguments.n_gpu} GPUs; start one for each: torchrun "
                f"--nproc_per_node {arguments.n_gpu} SCRIPT"
            )
        super().__init__(args=arguments, train_dataset=dataset, eval_dataset=held_out, **others)
        self.mixture = Mixture(
            mixer,
            dataset,
            batch=arguments.train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size,
            seed=arguments.data_seed if arguments.data_seed is not None else arguments.seed,
            multinomial=multinomial,
        )
        self.mixture.measure = self._held_out_losses
        self._weights: Tensor | None = None
        self._sums = torch.zeros(4, len(dataset.parts), dtype=torch.float64)
        self.add_callback(MixtureCallback(self))

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> MixtureSampler:
        return MixtureSampler(self.mixture, self.args.max_steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Fetch the micro-batches of a step; return them and what its loss is divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._sums = torch.zeros_like(self._sums, device=device)
        given = self.mixture.loss_weights(self.state.global_step + 1)
        self._weights = None if given is None else torch.as_tensor(given, device=device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            counts = (batch["labels"][:, 1:] != -100).sum(dim=1).to(device)
            total += (counts * self._shares(batch["domain"].to(device))).sum()
        return batches, self.accelerator.reduce(total, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, and sum it up by domain."""
        inputs = dict(inputs)
        domain = inputs.pop("domain")
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses, counts = sample_losses(outputs.logits, labels)
        self._add(losses.detach(), counts, domain)
        assert num_items_in_batch is not None
        # Processes' gradients are averaged, hence their number.
        scale = self.accelerator.num_processes / num_items_in_batch
        loss = (losses * self._shares(domain)).sum() * scale
        return (loss.float(), outputs) if return_outputs else loss.float()

    def _shares(self, domain: Tensor) -> Tensor:
        """Return the weight of every sample's tokens, [B]."""
        if self._weights is None:
            return torch.ones(len(domain), dtype=torch.float64, device=domain.device)
        return self._weights[domain]

    def _add(self, losses: Tensor, counts: Tensor, domain: Tensor) -> None:
        present = counts > 0
        mean = losses.double() / torch.where(present, counts, 1)
        rows = [losses.double(), counts.double(), mean * mean, present.double()]
        self._sums.index_add_(1, domain, torch.stack(rows))

    def step_sums(self) -> FloatArray:
        """Return the sums of the step over all processes, [4, K]; collective."""
        return np.asarray(self.accelerator.reduce(self._sums, reduction="sum").cpu())

    @torch.no_grad()
    def _held_out_losses(self) -> FloatArray:
        """Return the mean held-out loss of every domain, [K]; every process measures all."""
        model = self.model_wrapped
        model.eval()
        means = []
        for tokens in self.eval_dataset.parts:
            batch = torch.as_tensor(np.asarray(tokens), device=self.args.device)
            with self.compute_loss_context_manager():
                losses, counts = sample_losses(model(input_ids=batch).logits, batch)
            means.append(losses.double().sum() / counts.sum())
        model.train()
        # Averaged, so that rounding of one device does not set processes apart.
        return np.asarray(self.accelerator.reduce(torch.stack(means), reduction="mean").cpu())


def sample_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return every sample's summed token loss and its number of predicted tokens, each [B]."""
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].float().mT, targets, reduction="none", ignore_index=-100
    )
    return losses.sum(dim=1), (targets != -100).sum(dim=1)


class MixtureCallback(TrainerCallback):
    """Tells the controller of every step, and keeps its state in the Trainer's."""

    def __init__(self, trainer: MixtureTrainer) -> None:
        self._trainer = trainer
        self._lr = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take up the state of the checkpoint that the Trainer resumes from."""
        if saved := state.stateful_callbacks.get(STATE):
            self._trainer.mixture.load_state_dict(saved)
        elif state.global_step:
            raise ConfigError(
                f"the checkpoint of step {state.global_step} holds no state of a mixture; resume "
                f"from one that this trainer saved"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Note the learning rate that the step uses; afterwards it is the next one's."""
        self._lr = float(more["optimizer"].param_groups[0]["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Observe the step; a dropped update (overflow) moves nothing."""
        trainer = self._trainer
        dropped = trainer.accelerator.optimizer_step_was_skipped
        sums = trainer.step_sums()
        trainer.mixture.observe(state.global_step, None if dropped else sums, self._lr)
        state.stateful_callbacks[STATE] = trainer.mixture.state_dict()
        if state.global_step == 1 or state.global_step % args.logging_steps == 0:
            shares = zip(
                trainer.mixture.dataset.names,
                trainer.mixture.course[state.global_step],
                strict=True,
            )
            if state.is_world_process_zero:
                text = " ".join(f"{name} {share:6.1%}" for name, share in shares)
                print(f"step {state.global_step:4d}  {text}", flush=True)


class StopAfter(TrainerCallback):
    """Ends the run early, as an interruption would."""

    def __init__(self, step: int | None) -> None:
        self._step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop when the step has come."""
        if state.global_step == self._step:
            control.should_training_stop = True


def build_trainer(options: argparse.Namespace) -> MixtureTrainer:
    """Put a small random model, generated data and a controller together."""
    domains = make_domains(windows=300, length=24, seed=options.seed)
    train, held_out = split(domains, 16)
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
        dataloader_num_workers=options.workers,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        logging_steps=max(1, options.steps // 10),
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        seed=options.seed,
        use_cpu=options.cpu,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    samples = arguments.train_batch_size * options.accumulation * arguments.world_size
    mixer = build_mixer(
        options.method,
        domains=list(train),
        context=RunContext(
            total_steps=options.steps,
            samples_per_step=samples,
            draws_per_step=samples,
            tokens_per_step=samples * 23,
            samples_per_epoch=tuple(float(len(part)) for part in train.values()),
            vocab_size=VOCABULARY,
            count_losses=counter(train),
        ),
        **dict(options.option),
    )
    return MixtureTrainer(
        mixer=mixer,
        dataset=DomainDataset(train),
        held_out=DomainDataset(held_out),
        multinomial=options.multinomial,
        arguments=arguments,
        model=model,
        callbacks=[StopAfter(options.stop_after)],
    )


def option(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value is JSON where it can be, else a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="odm", help="mixing method (default: odm)")
    parser.add_argument(
        "--option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method; may be given several times",
    )
    parser.add_argument("--steps", type=int, default=40, help="length of the run")
    parser.add_argument("--stop_after", type=int, metavar="STEP", help="end early, to resume later")
    parser.add_argument("--batch", type=int, default=8, help="samples per device and micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save_steps", type=int, default=0, help="steps between two checkpoints")
    parser.add_argument("--output_dir", default="runs/huggingface", help="folder of checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument(
        "--multinomial", action="store_true", help="draw at random, not as closely as possible"
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Train from the command line."""
    options = parse()
    trainer = build_trainer(options)
    checkpoint = get_last_checkpoint(options.output_dir) if options.resume else None
    if options.resume and checkpoint is None:
        raise ConfigError(f"{options.output_dir} holds no checkpoint; leave out --resume")
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = zip(trainer.mixture.dataset.names, trainer.mixture.measure(), strict=True)
    if trainer.is_world_process_zero():
        print("held-out loss  " + " ".join(f"{name} {loss:.4f}" for name, loss in losses))
    # Processes take their leave of each other, or the first to go disturbs the others.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
