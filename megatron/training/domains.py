"""The domains of a run: opened, counted, and given their start weights.  No torch in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.config import Config, DomainConfig, MixingConfig
from megatron.config.data import DataConfig, Part
from megatron.data.domain import Domain, open_domain
from megatron.data.infilling import Infilling
from megatron.errors import ConfigError, DataError
from megatron.mixing.weights import (
    document_weights,
    natural_weights,
    nopack_weights,
    padded_windows,
    temperature_weights,
    uniform_weights,
)
from megatron.training.infilling import run_infilling

FloatArray = npt.NDArray[np.float64]

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class OpenDomains:
    """All domains of a run, in the order of the configuration.

    Attributes:
        names: K names of what is trained on.
        targets: M names of what is only measured.
        train: the training part of each of the K.
        valid: the validation part of each of the K and then the M; None where there is none.
        test: the test part of each of them; None where there is none.
        notes: what a user should know (a split that left no validation data, say).
    """

    names: tuple[str, ...]
    targets: tuple[str, ...]
    train: tuple[Domain, ...]
    valid: tuple[Domain | None, ...]
    test: tuple[Domain | None, ...]
    notes: tuple[str, ...]

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of what ``valid`` and ``test`` are of, K + M."""
        return self.names + self.targets

    @property
    def token_counts(self) -> FloatArray:
        """Training tokens of each domain [K]."""
        return np.array([domain.num_tokens for domain in self.train], dtype=np.float64)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each domain's training data."""
        return {domain.name: domain.fingerprint() for domain in self.train}

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """Bytes of text per token of each domain's held-out data, where known."""
        known: dict[str, float] = {}
        train: list[Domain | None] = [*self.train, *[None] * len(self.targets)]
        for name, valid, part in zip(self.measured, self.valid, train, strict=True):
            domain = valid or part
            if domain is not None and domain.bytes_per_token is not None:
                known[name] = domain.bytes_per_token
        return known

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary of the data as their sidecars state it; None if no sidecar does.

        Raises:
            DataError: domains were tokenised with different vocabularies.
        """
        sizes: dict[int, str] = {}
        only_measured = [part for part in self.valid[len(self.names) :] if part is not None]
        for domain in (*self.train, *only_measured):
            for source in domain.sources:
                sidecar = source.reader.sidecar
                if sidecar is not None and sidecar.vocab_size:
                    sizes.setdefault(sidecar.vocab_size, domain.name)
        if len(sizes) > 1:
            (first, one), (second, other) = list(sizes.items())[:2]
            raise DataError(
                f"the domains were tokenised with different vocabularies: '{one}' with {first} "
                f"token ids, '{other}' with {second}; tokenise them again with one tokenizer"
            )
        return next(iter(sizes), None)

    @property
    def eod_id(self) -> int | None:
        """The end-of-document token as the training data's sidecars state it; None if none does."""
        for domain in self.train:
            for source in domain.sources:
                sidecar = source.reader.sidecar
                if sidecar is not None and sidecar.eod_id is not None:
                    return sidecar.eod_id
        return None

    def close(self) -> None:
        """Close all files."""
        for domain in (*self.train, *self.valid, *self.test):
            if domain is not None:
                domain.close()


def open_domains(
    domains: Mapping[str, DomainConfig],
    *,
    split: str,
    seq_length: int,
    seed: int,
    epoch_offset: bool = True,
    reading: DataConfig | None = None,
    infilling: Infilling | None = None,
) -> OpenDomains:
    """Open every domain's training, validation and test data.

    Args:
        domains: by name.
        split: of domains without files of their own for validation and test.
        seq_length: S.
        seed: of the run.
        epoch_offset: whether the cuts of training windows move from epoch to epoch.
        reading: how windows are made; None as by default.
        infilling: rearranges training windows; None leaves them as they are.

    Raises:
        DataError: a file is missing or damaged, or a domain that was given data for a part
            has no window of it.  A part that only the split would give may be empty; that
            is noted.
    """
    reading = reading or DataConfig()
    notes: list[str] = []
    opened: dict[str, list[Domain | None]] = {"train": [], "valid": [], "test": []}
    targets = [name for name, domain in domains.items() if domain.target]
    for name, domain in sorted(domains.items(), key=lambda item: item[1].target):
        for part, parts in _parts(opened):
            if domain.target and part == "train":
                continue
            prefixes = domain.prefixes(part)
            if not prefixes:
                parts.append(None)
                continue
            cut = (split, part) if domain.uses_split else None
            try:
                parts.append(
                    open_domain(
                        name,
                        prefixes,
                        seq_length=seq_length,
                        seed=seed,
                        split=cut,
                        # Held-out windows are the same at every measurement.
                        epoch_offset=epoch_offset and part == "train",
                        labels=domain.labels(part),
                        pack_impl=reading.pack_impl,
                        allow_chopped=reading.allow_chopped,
                        infilling=infilling if part == "train" else None,
                    )
                )
                _check_format(parts[-1], reading)
            except DataError as error:
                if part == "train" or cut is None or "no window" not in str(error):
                    raise
                parts.append(None)
                notes.append(
                    f"domain '{name}' has no {part} data: split '{split}' leaves less than one "
                    f"window of {seq_length + 1} tokens"
                )
    only_measured = [opened[part][len(domains) - len(targets) :] for part in ("valid", "test")]
    for name, *held_out in zip(targets, *only_measured, strict=True):
        if not any(held_out):
            raise DataError(
                f"domain '{name}' is a target, which is only measured, and has no validation data; "
                "give it `valid`, or `train` with a split that leaves some"
            )
    return OpenDomains(
        names=tuple(name for name in domains if name not in targets),
        targets=tuple(targets),
        train=tuple(domain for domain in opened["train"] if domain is not None),
        valid=tuple(opened["valid"]),
        test=tuple(opened["test"]),
        notes=tuple(notes),
    )


def _parts(opened: dict[str, list[Domain | None]]) -> list[tuple[Part, list[Domain | None]]]:
    return [("train", opened["train"]), ("valid", opened["valid"]), ("test", opened["test"])]


def _check_format(domain: Domain | None, reading: DataConfig) -> None:
    """Refuse files of another format than ``data_impl`` names."""
    kinds = {"mmap": False, "cached": True, "lazy": True}
    for source in domain.sources if domain is not None else ():
        reader, wanted = source.reader, kinds.get(reading.data_impl)
        if wanted is not None and reader.legacy != wanted:
            found = "cached" if reader.legacy else "mmap"
            raise DataError(
                f"{reader.prefix}.idx is of the format {found}, and data_impl is "
                f"{reading.data_impl}; use data_impl: infer"
            )


def open_run_domains(config: Config) -> OpenDomains:
    """Open the data of a run as its configuration cuts it; see :func:`open_domains`."""
    return open_domains(
        config.domains,
        split=config.split,
        seq_length=config.model.context_length,
        seed=config.training.seed,
        epoch_offset=config.training.epoch_offset,
        reading=config.data,
        infilling=run_infilling(config),
    )


def start_weights(
    mixing: MixingConfig, domains: Mapping[str, DomainConfig], opened: OpenDomains
) -> FloatArray:
    """Return the given or computed start weights [K], not normalised if given.

    Raises:
        ConfigError: ``weights: given`` and a domain has none.
    """
    trained = {name: domain for name, domain in domains.items() if not domain.target}
    given = [domain.weight for domain in trained.values()]
    kind = mixing.weights or ("given" if any(w is not None for w in given) else "natural")
    if kind == "given":
        missing = [name for name, domain in trained.items() if domain.weight is None]
        if missing:
            raise ConfigError(
                f"mixing.weights is 'given', but {', '.join(missing)} has no weight; give every "
                "domain a weight, or set mixing.weights to natural or uniform"
            )
        return np.array(given, dtype=np.float64)
    if kind == "uniform":
        return uniform_weights(len(given))
    if kind == "natural":
        return natural_weights(opened.token_counts)
    if kind == "temperature":
        return temperature_weights(opened.token_counts, mixing.weights_alpha)
    if kind == "documents":
        counts = [domain.num_documents for domain in opened.train]
        return document_weights(counts, mixing.weights_alpha)
    return nopack_weights(_padded(opened.train))


def average_weights(domains: Mapping[str, DomainConfig]) -> dict[str, dict[str, float]]:
    """Return by split the weights of its weighted average, where some domain is given one."""
    given = {
        "valid": {name: domain.valid_weight for name, domain in domains.items()},
        "test": {name: domain.test_weight for name, domain in domains.items()},
    }
    return {
        split: {name: weight or 0.0 for name, weight in weights.items()}
        for split, weights in given.items()
        if any(weights.values())
    }


def _padded(train: Sequence[Domain]) -> FloatArray:
    """Windows of each domain if every document started its own [K]."""
    totals = []
    for domain in train:
        total = 0
        for source in domain.sources:
            part = source.documents
            for first in range(part.first, part.last, _BLOCK):
                sizes = source.reader.document_sizes(first, min(first + _BLOCK, part.last))
                total += padded_windows(sizes, domain.seq_length)
        totals.append(float(total))
    return np.array(totals)
