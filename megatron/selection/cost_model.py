"""What choosing documents and training on them cost, by one formula.

Two operations per multiply-add of the matrix products and, where the architecture is known, of
causal attention (:mod:`megatron.model.accounting`).  Of a model of which only the size N is known a
forward pass costs 2 N a token and training 6 N (Kaplan et al. 2020, section 2.1); so does the
paper of this method (arXiv 2410.16208, table 1) price its selectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final

from megatron.errors import ConfigError, did_you_mean
from megatron.model.accounting import (
    FORWARD_SHARE,
    flops_per_token,
    parameter_count,
)
from megatron.model.spec import ModelSpec

TRAINING_PER_PARAMETER: Final = 6.0
"""Operations of a parameter and token, forward and backward."""

WARM_UP_SHARE: Final = 0.05
WARM_UP_EPOCHS: Final = 4
"""Of the corpus that LESS trains on before it takes gradients, and passes over it (its paper)."""

_UNITS: Final[Mapping[str, float]] = MappingProxyType(
    {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
)
_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]?)")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, as far as its price goes.

    Attributes:
        name: of it in tables ("7B", "models/160m").
        parameters: all of them, embeddings included.
        per_token: operations of one token's forward and backward pass.
    """

    name: str
    parameters: float
    per_token: float

    def training(self, tokens: float) -> float:
        """Return the operations of training on so many tokens."""
        return self.per_token * tokens

    def forward(self, tokens: float) -> float:
        """Return the operations of forward passes over so many tokens."""
        return FORWARD_SHARE * self.per_token * tokens


def sized_model(size: str | float) -> Model:
    """Return a model of which only the number of parameters is known.

    Args:
        size: ``7e9``, ``"7B"``, ``"160m"``.

    Raises:
        ConfigError: it is no number of parameters above 0.
    """
    parameters = read_number(size, "a model's size")
    name = size if isinstance(size, str) and not _plain(size) else size_name(parameters)
    per_token = TRAINING_PER_PARAMETER * parameters
    return Model(name=name, parameters=parameters, per_token=per_token)


def known_model(spec: ModelSpec, name: str) -> Model:
    """Return the model of a configuration, whose attention and vocabulary are known."""
    return Model(
        name=name, parameters=float(parameter_count(spec)), per_token=flops_per_token(spec)
    )


def read_number(value: str | float, what: str) -> float:
    """Read a number above 0 with K, M, B (or G) or T after it, or none.

    Raises:
        ConfigError: it is none, naming ``what``.
    """
    text = str(value).strip()
    found = _NUMBER.fullmatch(text)
    unit = found.group(2).upper() if found else ""
    if found is None or unit not in _UNITS:
        raise ConfigError(f"{what} is '{text}'; write a number such as 7e9, 7B or 160M")
    number = float(found.group(1)) * _UNITS[unit]
    if not 0 < number < float("inf"):
        raise ConfigError(f"{what} is {text}; it must be above 0")
    return number


def size_name(number: float) -> str:
    """Return a number as people write it: 7B, 1.4B, 160M."""
    for unit in ("T", "B", "M", "K"):
        if number >= _UNITS[unit] * 0.9995:
            return f"{number / _UNITS[unit]:.3g}{unit}"
    return f"{number:.3g}"


def _plain(text: str) -> bool:
    return text.strip()[-1:].isdigit()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What selectors read.

    Attributes:
        corpus: tokens of all documents that are scored.
        targets: tokens of the target examples.
        warm_up: tokens that ``less`` trains on first; None: :data:`WARM_UP_EPOCHS` passes over
            :data:`WARM_UP_SHARE` of the corpus.
        checkpoints: of ``less``, each of which takes the gradients of everything.
    """

    corpus: float
    targets: float = 0.0
    warm_up: float | None = None
    checkpoints: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{one.name} is {value}; it must be at least 0")
        if self.checkpoints < 1:
            raise ConfigError(f"checkpoints are {self.checkpoints}; less needs at least one")

    @property
    def warmed(self) -> float:
        """Tokens of the warm-up."""
        if self.warm_up is not None:
            return self.warm_up
        return WARM_UP_EPOCHS * WARM_UP_SHARE * self.corpus


SELECTORS: Final = ("random", "bm25", "embed", "ppl", "less")
FREE: Final = ("random", "bm25")
"""What counts words or nothing: of no model, so 0 by this formula."""


def selector_flops(method: str, reading: Reading, model: Model | None) -> float:
    """Return the operations of scoring a corpus once.

    - ``random`` and ``bm25``: 0.
    - ``embed``: a forward pass of the encoder over corpus and targets.
    - ``ppl``: a forward pass over the corpus.
    - ``less``: for every checkpoint a forward and a backward pass (three forward passes' worth)
      over corpus and targets, and the training of the warm-up.

    Args:
        method: one of :data:`SELECTORS`.
        reading: how much is read.
        model: that scores; may be None where none does.

    Raises:
        ConfigError: an unknown method, or one without its model.
    """
    if method not in SELECTORS:
        raise ConfigError(
            f"the price of the selector '{method}' is not known"
            f"{did_you_mean(method, SELECTORS)} (known: {', '.join(SELECTORS)})"
        )
    if method in FREE:
        return 0.0
    if model is None:
        raise ConfigError(f"'{method}' scores by a model; say of which size")
    if method == "embed":
        return model.forward(reading.corpus + reading.targets)
    if method == "ppl":
        return model.forward(reading.corpus)
    taken = reading.checkpoints * model.training(reading.corpus + reading.targets)
    return taken + model.training(reading.warmed)


def base_method(name: str) -> str:
    """Return the selector of a named variant: ``ppl-top`` and ``ppl_mid`` are ``ppl``.

    The name itself where it begins with no selector's.
    """
    aliases = {"perplexity": "ppl", "embedding": "embed", "gradient": "less", "none": "random"}
    for known in (*SELECTORS, *aliases):
        if re.match(rf"(.*-)?{known}(?![a-z0-9])", name.lower()):
            return aliases.get(known, known)
    return name
