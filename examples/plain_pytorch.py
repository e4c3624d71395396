r"""A training loop in plain PyTorch whose mixture is decided by one of neomix's controllers.

    python examples/plain_pytorch.py --method odm
    python examples/plain_pytorch.py --method aioli --option lp_rounds=1 --option lp_steps=2 \
        --option update_every=24
    python examples/plain_pytorch.py --method static --model reference.pt
    python examples/plain_pytorch.py --method doremi --reference reference.pt

The loop is the usual one.  What a controller adds to it is marked with numbers:

 1. build the controller, tell it what is known of the run;
 2. ask it for the step's distribution, and draw the step by that;
 3. if it asks for a validation, measure the held-out losses, tell it, and ask again;
 4. if it asks to foresee the step, measure that on the batch which was drawn, and tell it;
 5. train, with its loss weights if it gives any, and keep loss sums and counts by domain;
 6. tell it what the step showed;
 7. save its state with the model's.

A controller says in ``needs`` which signals it reads.  Losses by domain, their squares and the
learning rate cost nothing; held-out losses cost forward passes, and are measured when asked for.
The three dearer signals are functions in this file, in MEASURES: a loop that leaves one out cannot
run the methods that need it, and says so at the start.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_sampling_utils import Decision, Observation, RunContext, Signal, build_mixer
from examples.drawing import Draw
from examples.generated_data import VOCABULARY, IntArray, counter, make_domains, split
from megatron.errors import ConfigError, run_command

FloatArray = npt.NDArray[np.float64]
LENGTH = 24


class Model(nn.Module):
    """A small recurrent language model."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.recur = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def losses(self, windows: Tensor) -> Tensor:
        """Return the loss of every predicted token, [B, S - 1]."""
        hidden, _ = self.recur(self.embed(windows[:, :-1]))
        logits = self.head(hidden)
        return functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none")


class Batch:
    """The windows of a step and whose they are."""

    def __init__(self, samples: Sequence[tuple[int, int]], data: Sequence[IntArray]) -> None:
        self.domain = np.array([domain for domain, _ in samples])
        self.windows = torch.from_numpy(np.stack([data[domain][i] for domain, i in samples]))
        self.count = len(data)

    def by_domain(self, values: FloatArray) -> FloatArray:
        """Sum a value per sample over the samples of each domain, [K]."""
        return np.bincount(self.domain, weights=values, minlength=self.count)

    def mean_by_domain(self, per_token: Tensor) -> FloatArray:
        """Return each domain's mean over its tokens, [K]; NaN where it is absent."""
        sums = self.by_domain(per_token.double().sum(dim=1).numpy())
        counts = self.by_domain(np.full(len(self.domain), per_token.shape[1]))
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


class Measuring:
    """What this loop can measure beside the losses of its steps."""

    def __init__(
        self, model: Model, held_out: Sequence[IntArray], reference: Model | None, seed: int
    ) -> None:
        self.model, self.held_out, self.reference = model, held_out, reference
        self._seed = seed

    @torch.no_grad()
    def validation(self) -> FloatArray:
        """Return every domain's mean held-out loss, [K] (for ``valid_loss``)."""
        return np.array(
            [float(self.model.losses(torch.from_numpy(part)).mean()) for part in self.held_out]
        )

    @torch.no_grad()
    def batch_validation(self, batch: Batch, step: int) -> dict[str, Any]:
        """Measure held-out windows, as many of each domain as the batch has."""
        random = np.random.default_rng([self._seed, step])
        samples = [(d, int(random.integers(len(self.held_out[d])))) for d in batch.domain]
        held_out = Batch(samples, self.held_out)
        return {"batch_valid_loss": held_out.mean_by_domain(self.model.losses(held_out.windows))}

    @torch.no_grad()
    def excess(self, batch: Batch, step: int) -> dict[str, Any]:
        """Compare every token's loss with that of a frozen reference model."""
        assert self.reference is not None
        own, other = self.model.losses(batch.windows), self.reference.losses(batch.windows)
        return {
            **sums(batch, own),
            "excess_loss": batch.mean_by_domain((own - other).clamp(min=0)),
            "reference_loss": batch.mean_by_domain(other),
        }

    def alignment(self, batch: Batch, step: int) -> dict[str, Any]:
        """Measure <g_i, g_v> / mean norm of the g_i, one backward pass per domain."""
        parts = list(self.model.parameters())

        def gradient(windows: Tensor) -> Tensor:
            found = torch.autograd.grad(self.model.losses(windows).mean(), parts)
            return torch.cat([part.flatten() for part in found])

        target = gradient(torch.from_numpy(np.concatenate([part[:8] for part in self.held_out])))
        own = [
            gradient(batch.windows[torch.from_numpy(batch.domain == k)])
            if (batch.domain == k).any()
            else torch.zeros_like(target)
            for k in range(batch.count)
        ]
        norms = torch.stack([g.norm() for g in own])
        mean = float(norms[norms > 0].mean())
        return {"gradient_alignment": np.array([float(g @ target) / mean for g in own])}


MEASURES: Mapping[Signal, Callable[[Measuring, Batch, int], dict[str, Any]]] = {
    Signal.BATCH_VALID_LOSS: Measuring.batch_validation,
    Signal.EXCESS_LOSS: Measuring.excess,
    Signal.GRADIENT_ALIGNMENT: Measuring.alignment,
}
ALWAYS = {Signal.LOSS, Signal.VALID_LOSS, Signal.LOSS_VARIANCE, Signal.LEARNING_RATE}


def sums(batch: Batch, losses: Tensor) -> dict[str, Any]:
    """Return what every step tells: sums and counts by domain, [K] each."""
    losses = losses.detach().double()
    mean = losses.mean(dim=1).numpy()
    return {
        "loss_sum": batch.by_domain(losses.sum(dim=1).numpy()),
        "token_count": batch.by_domain(np.full(len(mean), losses.shape[1])),
        "loss_square_sum": batch.by_domain(mean**2),
        "sample_count": batch.by_domain(np.ones(len(mean))),
    }


class Run:
    """One training run: model, data and controller."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, seed = arguments, arguments.seed
        domains = make_domains(windows=400, length=LENGTH, seed=seed)
        train, held_out = split(domains, 32)
        self.names = list(domains)
        self.train, self.held_out = list(train.values()), list(held_out.values())
        torch.manual_seed(seed)
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=arguments.lr)
        # 1. The controller.  Everything it is told here is optional but where it says otherwise.
        self.mixer = build_mixer(
            arguments.method,
            domains=self.names,
            context=RunContext(
                total_steps=arguments.steps,
                samples_per_step=arguments.batch,
                draws_per_step=arguments.batch,
                tokens_per_step=arguments.batch * (LENGTH - 1),
                samples_per_epoch=tuple(float(len(part)) for part in self.train),
                vocab_size=VOCABULARY,
                count_losses=counter(train),
            ),
            **arguments.option,
        )
        missing = self.mixer.needs - ALWAYS - MEASURES.keys()
        if missing:
            raise ConfigError(
                f"'{arguments.method}' reads {', '.join(sorted(missing))}, which this loop "
                f"does not measure; add a function for it to MEASURES"
            )
        self.measuring = Measuring(self.model, self.held_out, self._reference(), seed)
        self.draw = Draw([len(p) for p in self.train], seed=seed, multinomial=arguments.multinomial)
        self.step = 0
        self.course: list[FloatArray] = []

    def _reference(self) -> Model | None:
        path = self.arguments.reference
        if Signal.EXCESS_LOSS in self.mixer.needs and path is None:
            raise ConfigError(
                f"'{self.arguments.method}' compares with a reference model; make one with "
                f"--method static --model FILE, and give it with --reference FILE"
            )
        if path is None:
            return None
        reference = Model()
        reference.load_state_dict(torch.load(path, weights_only=True))
        return reference.eval().requires_grad_(False)

    def decide(self, step: int) -> Decision:
        """Ask for a step's decision, with the validation that it may ask for first."""
        decision = self.mixer.decide(step=step)  # 2.
        if decision.validate:  # 3.
            losses = self.measuring.validation()
            # It follows the step before: no training tokens, hence counts of 0.
            nothing = np.zeros(len(losses))
            self.mixer.observe(
                Observation(step - 1, loss_sum=nothing, token_count=nothing, valid_loss=losses)
            )
            decision = self.mixer.decide(step=step)
        return decision

    def train_step(self) -> None:
        """Do the next step."""
        step, decision = self.step + 1, self.decide(self.step + 1)
        weights, lr = decision.sampling_weights, self.optimizer.param_groups[0]["lr"]
        samples = self.draw.step(
            step, weights, self.arguments.batch, fresh_quota=decision.fresh_quota is not None
        )
        batch = Batch(samples, self.train)
        # 4. Signals of this very batch, before it trains.  Some methods only want them told
        # with the step; for those they are measured here as well.
        measured: dict[str, Any] = {}
        for signal in sorted((decision.measure or self.mixer.needs) & MEASURES.keys()):
            measured |= MEASURES[signal](self.measuring, batch, step)
        if decision.measure:
            told = {"sample_count": batch.by_domain(np.ones(len(batch.domain))), **measured}
            told |= {"sampling_weights": weights, "learning_rate": lr}
            decision = self.mixer.foresee(Observation(step, **told))
        # 5. The step.  Loss weights count per token: sum w l / sum w over the whole batch.
        losses = self.model.losses(batch.windows)
        shares = torch.ones(len(batch.domain))
        if decision.loss_weights is not None:
            shares = torch.from_numpy(decision.loss_weights[batch.domain]).float()
        loss = (losses * shares[:, None]).sum() / (shares.sum() * losses.shape[1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # 6. What it showed.  A step that was dropped (overflow) would not be observed.
        seen = {"samples_seen": self.draw.seen, "sampling_weights": weights, "learning_rate": lr}
        self.mixer.observe(Observation(step, **{**measured, **seen, **sums(batch, losses)}))
        self.step = step
        self.course.append(weights)

    def save(self, path: Path) -> None:
        """Save everything that the next step depends on."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            # 7. Plain JSON, the same on every rank of a parallel run.
            "mixture": json.dumps([self.mixer.state_dict(), self.draw.state_dict()]),
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        """Go on from a saved state, with the bits that the saved run would have had."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        mixer, draw = json.loads(state["mixture"])
        self.mixer.load_state_dict(mixer)
        self.draw.load_state_dict(draw)
        self.step = state["step"]


def option(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value is JSON where it can be, else a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main(given: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
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
    parser.add_argument("--steps", type=int, default=60, help="length of the run")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="end early, to resume later")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--multinomial", action="store_true", help="draw at random, not as closely as possible"
    )
    parser.add_argument("--state", type=Path, help="go on from this file if it exists; save to it")
    parser.add_argument("--model", type=Path, help="write the trained weights to this file")
    parser.add_argument("--reference", type=Path, help="weights of a reference model (doremi)")
    arguments = parser.parse_args(given)
    arguments.option = dict(arguments.option)
    if arguments.method == "doremi" and arguments.reference is not None:
        arguments.option.setdefault("reference", str(arguments.reference))

    torch.set_num_threads(1)
    run = Run(arguments)
    if arguments.state is not None and arguments.state.exists():
        run.load(arguments.state)
        print(f"going on after step {run.step}")
    last = min(arguments.steps, arguments.stop_after or arguments.steps)
    every = max(1, arguments.steps // 10)
    while run.step < last:
        run.train_step()
        if run.step == 1 or run.step % every == 0:
            shown = " ".join(
                f"{name} {share:6.1%}"
                for name, share in zip(run.names, run.course[-1], strict=True)
            )
            print(f"step {run.step:4d}  {shown}")
    if arguments.state is not None:
        run.save(arguments.state)
    if arguments.model is not None:
        torch.save(run.model.state_dict(), arguments.model)
    losses = zip(run.names, run.measuring.validation(), strict=True)
    print("held-out loss  " + " ".join(f"{name} {loss:.4f}" for name, loss in losses))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
