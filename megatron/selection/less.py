"""Influence on the targets' loss by gradients of LoRA adapters (LESS: Xia et al. 2024).

A model (--model, a folder that transformers loads, or a run of ours, which is exported first) gets
LoRA adapters and is warmed up on a sample of the corpus; each epoch leaves a checkpoint.  At each
checkpoint the gradient of every target example and, turned into Adam's update, of every document is
projected to --dimension numbers.  A document's score for a subtask is the mean over the subtask's
examples of the cosine between the two, summed over checkpoints by their learning rates; its score
is the highest over the subtasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from megatron.checkpoint.files import replacing
from megatron.errors import ConfigError, DataError
from megatron.selection.base import Corpus, Cost, Document, FloatArray, Say, Target
from megatron.selection.flags import positive
from megatron.selection.influence import checkpoint_weights, influence, target_mean
from megatron.selection.language_model import is_transformers, model_identity, named_model
from megatron.selection.less_settings import LessSettings, add_settings, settings_of

if TYPE_CHECKING:
    from megatron.selection.less_examples import Example, ExampleMaker
    from megatron.selection.less_features import FeatureMaker
    from megatron.selection.less_gradients import LoraState
    from megatron.selection.less_warmup import WarmupSettings

Exporter = Callable[[str, Path, Say], None]
"""Writes the checkpoint that ``RUN`` or ``RUN,ITERATION`` names as a folder for transformers."""

_EXPORTED = "exported"


@dataclass(kw_only=True)
class Less:
    """Scores documents by influence.

    A document's scores do not depend on which documents it is scored with beyond the rounding of
    sums in float32: about 1e-5.

    Attributes:
        model: a folder of transformers, or ``RUN`` or ``RUN,ITERATION`` of ours.
        settings: what decides the scores.
        batch_tokens: read in one pass; decides memory alone.
        device: see :func:`megatron.selection.devices.choose_device`.
        exporter: is called for a run of ours; whoever makes the selector sets it, since what
            exports lies above this package.
    """

    model: str
    settings: LessSettings = field(default_factory=LessSettings)
    batch_tokens: int = 4096
    device: str = "auto"
    exporter: Exporter | None = None
    method: ClassVar[str] = "less"
    aggregate: ClassVar[str] = "max"
    needs_targets: ClassVar[bool] = True
    _opened: _Opened | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        named_model(self.model)

    def parameters(self) -> Mapping[str, Any]:
        """Return the settings, and the model by a hash of it."""
        facts = {**vars(self.settings), "lora_targets": list(self.settings.lora_targets)}
        return {"model": model_identity(named_model(self.model)), **facts}

    def prepare(self, corpus: Corpus, targets: Sequence[Target], folder: Path, say: Say) -> Cost:
        """Warm up, and take the targets' gradients; each epoch and subtask is done once.

        Raises:
            ConfigError: the model is a run of ours, and there is no exporter.
            DataError: a subtask, or the sample of the warm-up, has nothing to learn.
        """
        from megatron.selection.devices import choose_device
        from megatron.selection.less_warmup import sample, warm_up

        choose_device(self.device)
        folder.mkdir(parents=True, exist_ok=True)
        self._export(folder, say)
        tools = self._tools(folder)
        # Before anything takes long.
        asked = [_learned(target, tools.maker) for target in targets]
        examples = sample(corpus, tools.maker, self._warmup(), folder, say)
        warm_up(tools.lora, examples, self._warmup(), folder, say, batch_tokens=self.batch_tokens)
        lengths = [int(size) for size in examples.sizes] * self.settings.epochs
        for epoch in range(self.settings.epochs):
            self._target_features(tools, asked, targets, folder, epoch, say)
        for known in asked:
            lengths += [len(one.tokens) for one in known] * self.settings.epochs
        return tools.cost(lengths)

    def open(self, folder: Path, targets: Sequence[Target]) -> None:
        """Load the model, the warm-up's checkpoints and the targets' features."""
        from megatron.selection.less_warmup import read_state

        tools = self._tools(folder)
        epochs = range(self.settings.epochs)
        self._opened = _Opened(
            tools=tools,
            states=[read_state(folder, epoch) for epoch in epochs],
            means=[
                np.stack([np.load(_means(folder, epoch, n)) for n in range(len(targets))])
                for epoch in epochs
            ],
        )

    def score(self, documents: Sequence[Document]) -> tuple[FloatArray, Cost]:
        """Return [n, subtasks] influences; NaN for a document with nothing to learn."""
        assert self._opened is not None, "open() comes before score()"
        opened = self._opened
        made = [opened.tools.maker.make(one) for one in documents]
        places = [number for number, one in enumerate(made) if one is not None]
        examples = [one for one in made if one is not None]
        scores = np.full((len(documents), opened.means[0].shape[0]), np.nan)
        if not examples:
            return scores, Cost()
        weights = checkpoint_weights([state.rate for state in opened.states])
        total = np.zeros((len(examples), scores.shape[1]))
        for state, means, weight in zip(opened.states, opened.means, weights, strict=True):
            found = opened.tools.features(examples, state, self.settings.gradient_type)
            total += weight * influence(found, means)
        scores[places] = total
        lengths = [len(one.tokens) for one in examples]
        return scores, opened.tools.cost(lengths * len(opened.states))

    def _folder(self, work: Path) -> Path:
        path = named_model(self.model).path
        return path if is_transformers(path) else work / _EXPORTED

    def _export(self, work: Path, say: Say) -> None:
        folder = self._folder(work)
        if is_transformers(folder):
            return
        if self.exporter is None:
            raise ConfigError(
                f"--model {self.model}: less needs a folder of transformers; write one with "
                "tools/convert_checkpoint.py, and give that"
            )
        self.exporter(self.model, folder, say)

    def _tools(self, work: Path) -> FeatureMaker:
        from megatron.selection.less_features import open_features

        return open_features(
            self._folder(work), self.settings, batch_tokens=self.batch_tokens, device=self.device
        )

    def _warmup(self) -> WarmupSettings:
        from megatron.selection.less_warmup import WarmupSettings

        own = self.settings
        return WarmupSettings(
            share=own.warmup_share,
            epochs=own.epochs,
            batch=own.warmup_batch,
            rate=own.rate,
            seed=own.seed,
        )

    def _target_features(
        self,
        tools: FeatureMaker,
        asked: Sequence[Sequence[Example]],
        targets: Sequence[Target],
        folder: Path,
        epoch: int,
        say: Say,
    ) -> None:
        from megatron.selection.less_warmup import read_state

        state = None
        for number, (target, examples) in enumerate(zip(targets, asked, strict=True)):
            path = _means(folder, epoch, number)
            if path.is_file():
                continue
            state = state or read_state(folder, epoch)
            # Targets are compared by their plain gradients (section 3.2 of the paper).
            mean = target_mean(tools.features(examples, state, "sgd"))
            with replacing(path) as out:
                np.save(out, mean)
            say(f"targets: {target.name} at checkpoint {epoch + 1} of {self.settings.epochs}")


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What was prepared; ``means`` are [subtasks, d] of each checkpoint."""

    tools: FeatureMaker
    states: Sequence[LoraState]
    means: Sequence[FloatArray]


def _learned(target: Target, maker: ExampleMaker) -> list[Example]:
    examples = [maker.make(one) for one in target.documents]
    found = [one for one in examples if one is not None]
    if not found:
        raise DataError(
            f"--target {target.name}: none of its {len(target.documents)} examples has anything to "
            "learn within --max-tokens (text of two tokens, or an answer in a conversation)"
        )
    return found


def _means(folder: Path, epoch: int, subtask: int) -> Path:
    return folder / f"targets-{epoch + 1}-{subtask + 1:04d}.npy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    from megatron.selection.devices import add_device_arguments

    parser.add_argument("--model", required=True, metavar="FOLDER|RUN[,ITERATION]",
        help="a folder that transformers loads, or a run of ours, exported first")  # fmt: skip
    add_settings(parser)
    parser.add_argument("--batch-tokens", type=positive, default=4096, metavar="TOKENS",
        help="that the model reads in one pass; decides memory alone (default: 4096)")  # fmt: skip
    add_device_arguments(parser)


def from_options(options: argparse.Namespace) -> Less:
    """Make the selector; see :class:`Less` for the errors.

    A run of ours needs ``options.exporter`` besides, which the command sets.
    """
    return Less(
        model=options.model,
        settings=settings_of(options),
        batch_tokens=options.batch_tokens,
        device=options.device,
        exporter=getattr(options, "exporter", None),
    )
