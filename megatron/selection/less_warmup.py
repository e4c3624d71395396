"""LESS's warm-up: a few epochs of LoRA training on a sample of the corpus, kept epoch by epoch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.checkpoint.files import sync_file
from megatron.data.permutation import hash_key, permute_one
from megatron.errors import DataError
from megatron.selection.base import Corpus, Say
from megatron.selection.devices import enough_memory
from megatron.selection.less_examples import Example, ExampleFile, ExampleMaker, write_examples
from megatron.selection.less_gradients import (
    BETA_1,
    BETA_2,
    EPSILON,
    LoraState,
    by_length,
    example_losses,
    padded,
)
from megatron.selection.libraries import load
from megatron.selection.lora_model import LoraModel

_SAMPLE_NAME = "sample.bin"
_RATES_RISE = 0.03
_HEAD = "neomix"


@dataclass(frozen=True, kw_only=True)
class WarmupSettings:
    """How the adapters are trained before gradients are compared.

    Attributes:
        share: of the corpus' documents that is trained on.
        epochs: over those; each leaves a checkpoint.
        batch: examples of a step.
        rate: largest learning rate; it rises over the first 3 % of the steps and then falls to 0
            in a straight line.
        seed: of the sample and its order.
    """

    share: float = 0.05
    epochs: int = 4
    batch: int = 32
    rate: float = 2e-5
    seed: int = 0

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of so many."""
        rise = math.ceil(_RATES_RISE * steps)
        if step < rise:
            return self.rate * (step + 1) / rise
        return self.rate * (steps - step) / max(steps - rise, 1)


def sample(
    corpus: Corpus, maker: ExampleMaker, settings: WarmupSettings, folder: Path, say: Say
) -> ExampleFile:
    """Return the examples of the warm-up, drawn without replacement by the seed.

    Args:
        corpus: read once from its beginning, unless the file is there already.
        maker: turns documents into examples.
        settings: share and seed.
        folder: keeps the file.
        say: takes a line for the console.

    Raises:
        DataError: none of the drawn documents has anything to learn.
    """
    path = folder / _SAMPLE_NAME
    if not path.is_file():
        size = len(corpus)
        count = min(size, max(1, round(settings.share * size)))
        key = hash_key("less-sample", settings.seed)
        chosen = {permute_one(number, size, key) for number in range(count)}
        say(f"warm-up: drawing {count:,} of {size:,} documents")
        write_examples(path, _drawn(corpus, maker, chosen))
    found = ExampleFile(path)
    if not len(found):
        raise DataError(
            "--warmup-share: none of the documents drawn for the warm-up has anything to learn "
            "(an answer, for conversations); draw more of them"
        )
    return found


def _drawn(corpus: Corpus, maker: ExampleMaker, chosen: set[int]) -> Iterator[Example]:
    for number, document in enumerate(corpus.read(0, max(chosen) + 1)):
        if number in chosen and (example := maker.make(document)) is not None:
            yield example


def epoch_path(folder: Path, epoch: int) -> Path:
    """Return the file that an epoch, counted from 0, leaves behind."""
    return folder / f"epoch-{epoch + 1}.safetensors"


def warm_up(
    lora: LoraModel,
    examples: ExampleFile,
    settings: WarmupSettings,
    folder: Path,
    say: Say,
    *,
    batch_tokens: int,
) -> None:
    """Train the epochs that are not in the folder yet.

    A step's gradient is the mean over its examples of the gradient of each one's mean loss, so
    that it is the mean of what is compared later.  AdamW without decay of weights; gradients are
    not clipped, so that the moments are theirs.

    Args:
        lora: the model; its adapters change.
        examples: of the sample.
        settings: of the training.
        folder: takes a file for each epoch.
        say: takes a line for the console.
        batch_tokens: read in one pass; decides memory alone.
    """
    done = 0
    while done < settings.epochs and epoch_path(folder, done).is_file():
        done += 1
    if done == settings.epochs:
        return
    parameters = lora.parameters()
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=settings.rate, betas=(BETA_1, BETA_2), eps=EPSILON,
        weight_decay=0.0,
    )  # fmt: skip
    if done:
        _take_up(lora, optimizer, read_state(folder, done - 1))
    for epoch in range(done, settings.epochs):
        rate, loss = _epoch(lora, optimizer, examples, settings, epoch, batch_tokens)
        write_state(folder, epoch, _state(lora, optimizer, rate))
        say(f"warm-up: epoch {epoch + 1} of {settings.epochs}, mean loss {loss:.4f}")


def _epoch(
    lora: LoraModel,
    optimizer: torch.optim.Optimizer,
    examples: ExampleFile,
    settings: WarmupSettings,
    epoch: int,
    batch_tokens: int,
) -> tuple[float, float]:
    """Train one epoch; return its mean learning rate and loss."""
    count, size = len(examples), settings.batch
    each = -(-count // size)
    key = hash_key("less-order", settings.seed, epoch)
    order = [permute_one(number, count, key) for number in range(count)]
    rates, losses = [], 0.0
    lora.model.train()
    try:
        for number in range(each):
            batch = [examples[place] for place in order[number * size : (number + 1) * size]]
            rates.append(settings.rate_at(epoch * each + number, each * settings.epochs))
            lora.begin_step(epoch, number)
            optimizer.zero_grad(set_to_none=True)
            losses += _add_gradients(lora, batch, batch_tokens)
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            optimizer.step()
    finally:
        lora.model.eval()
    return sum(rates) / each, losses / count


def _add_gradients(lora: LoraModel, batch: list[Example], batch_tokens: int) -> float:
    """Leave a batch's mean gradient in the parameters; return the sum of its losses."""
    total = 0.0
    for numbers in by_length([len(one.tokens) for one in batch], batch_tokens):
        tokens, labels = padded([batch[number] for number in numbers], lora.device)
        with enough_memory():
            logits = lora.model(input_ids=tokens, use_cache=False).logits
            losses = example_losses(logits, labels)
            (losses.sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
        total += float(losses.detach().double().sum())
    return total


def _state(lora: LoraModel, optimizer: torch.optim.Optimizer, rate: float) -> LoraState:
    parameters = lora.parameters()
    kept = {name: optimizer.state[one] for name, one in parameters.items()}
    return LoraState(
        values=lora.pack({name: one.detach() for name, one in parameters.items()}).cpu(),
        first=lora.pack({name: one["exp_avg"] for name, one in kept.items()}).cpu(),
        second=lora.pack({name: one["exp_avg_sq"] for name, one in kept.items()}).cpu(),
        step=int(next(iter(kept.values()))["step"]),
        rate=rate,
    )


def _take_up(lora: LoraModel, optimizer: torch.optim.Optimizer, state: LoraState) -> None:
    parts = [lora.unpack(one.to(lora.device)) for one in (state.values, state.first, state.second)]
    with torch.no_grad():
        for name, parameter in lora.parameters().items():
            parameter.copy_(parts[0][name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": parts[1][name].clone(),
                "exp_avg_sq": parts[2][name].clone(),
            }


def write_state(folder: Path, epoch: int, state: LoraState) -> None:
    """Write an epoch's checkpoint atomically."""
    save_file = load("safetensors.torch", "less").save_file
    path = epoch_path(folder, epoch)
    temporary = path.with_name(path.name + ".tmp")
    head = json.dumps({"step": state.step, "rate": state.rate})
    tensors = {"values": state.values, "first": state.first, "second": state.second}
    save_file(tensors, str(temporary), metadata={_HEAD: head})
    sync_file(temporary)
    os.replace(temporary, path)


def read_state(folder: Path, epoch: int) -> LoraState:
    """Read an epoch's checkpoint."""
    safe_open = load("safetensors", "less").safe_open
    with safe_open(str(epoch_path(folder, epoch)), framework="pt") as found:
        head = json.loads(found.metadata()[_HEAD])
        return LoraState(
            values=found.get_tensor("values"),
            first=found.get_tensor("first"),
            second=found.get_tensor("second"),
            step=int(head["step"]),
            rate=float(head["rate"]),
        )
