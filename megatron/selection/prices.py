"""What every fitted selector costs before training, and what training on everything does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron.errors import ConfigError, did_you_mean
from megatron.selection.cost_model import (
    FREE,
    SELECTORS,
    Model,
    Reading,
    base_method,
    selector_flops,
    size_name,
    sized_model,
)
from megatron.selection.gains import Gain


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Where the prices of a plan come from.

    Attributes:
        reading: of the corpus that is planned for; None: that of the fit's runs.
        selectors: models that score, by selector ("ppl") or method ("ppl-top").
    """

    reading: Reading | None = None
    selectors: Mapping[str, Model] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse selectors that are none, and models without a corpus that they read."""
        for name in self.selectors:
            if base_method(name) not in SELECTORS:
                raise ConfigError(
                    f"--selector {name}: no selector{did_you_mean(name, SELECTORS)} "
                    f"(known: {', '.join(SELECTORS)})"
                )
        if self.selectors and self.reading is None:
            raise ConfigError(
                "--selector prices another model that scores, for which the size of the corpus "
                "must be known; give --corpus-tokens"
            )

    def total(self, model: Model, gains: Sequence[Gain]) -> float:
        """Return C_total of a model: training on the whole corpus once.

        Args:
            model: that is trained.
            gains: of the task; without a corpus, the nearest size's total, scaled.
        """
        if self.reading is not None:
            return model.training(self.reading.corpus)
        near = min(
            gains, key=lambda gain: max(gain.size / model.parameters, model.parameters / gain.size)
        )
        return near.total * model.per_token / sized_model(near.size).per_token

    def choosing(self, method: str, gains: Sequence[Gain]) -> float:
        """Return the operations of scoring the corpus once.

        By formula where the scoring model is given; else what the runs of the fit were charged, in
        proportion to the corpus.

        Args:
            method: of the fit.
            gains: of the task.

        Raises:
            ConfigError: it is known in neither way.
        """
        kind = base_method(method)
        if kind in FREE:
            return 0.0
        model = self.model(method)
        if model is not None and self.reading is not None:
            return selector_flops(kind, self.reading, model)
        charged = [gain for gain in gains if gain.method == method and gain.choosing > 0]
        if not charged:
            raise ConfigError(
                f"what '{method}' costs is not known: its runs have no selection_flops; say which "
                f"model scores how much: --selector {method}=7B --corpus-tokens 1e9"
            )
        if self.reading is None:
            return sum(gain.choosing for gain in charged) / len(charged)
        # A selector reads all of the corpus, so that its price grows with it.
        rates = [
            gain.choosing / (gain.total / sized_model(gain.size).per_token) for gain in charged
        ]
        return self.reading.corpus * sum(rates) / len(rates)

    def model(self, method: str) -> Model | None:
        """Return the model that scores for a method; None: not given."""
        return self.selectors.get(method, self.selectors.get(base_method(method)))

    def said(self, method: str, gains: Sequence[Gain]) -> str:
        """Return in words where a selector's price comes from."""
        kind = base_method(method)
        if kind in FREE:
            return "reads no model"
        model = self.model(method)
        if self.reading is None:
            return "as its runs were charged"
        if model is None:
            tokens = size_name(self.reading.corpus)
            return f"as its runs were charged, in proportion to a corpus of {tokens} tokens"
        count = self.reading.checkpoints
        passes = {
            "embed": "one forward pass",
            "ppl": "one forward pass",
            "less": f"gradients at {count} checkpoint{'s' if count > 1 else ''} (each as dear as "
            "three forward passes) and a warm-up",
        }[kind]
        return f"{passes} of {model.name} over {size_name(self.reading.corpus)} tokens"
