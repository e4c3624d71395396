"""What a run's options say of its reference, checked before anything starts.  No torch in here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.config import Config, resolve_batch
from megatron.data.loss_header import HEADER_NAME
from megatron.data.loss_store import LossStore
from megatron.errors import ConfigError, NeomixError
from megatron.training.domains import OpenDomains, open_run_domains
from megatron.training.epochs import with_steps
from megatron.training.layout import run_layout
from megatron.training.reference_checkpoint import check_reference, find_reference
from megatron.training.summary import check_device, complete

FloatArray = npt.NDArray[np.float64]

# Standard deviations of a multinomial draw that a forecast leaves room for.
_SURELY = 6.0


@dataclass(frozen=True, kw_only=True)
class ReferencePaths:
    """Where a run's reference losses come from; exactly one of the two is given.

    Attributes:
        model: a run's folder or a checkpoint, whose model is run beside.
        losses: a loss store.
    """

    model: str | None
    losses: str | None


def reference_paths(config: Config) -> ReferencePaths:
    """Return what the options of the mixing method name.

    Raises:
        ConfigError: neither or both are given.
    """
    options = config.mixing.options
    model, losses = options.get("reference"), options.get("reference_losses")
    if (model is None) == (losses is None):
        given = "both are given" if model is not None else "neither is given"
        raise ConfigError(
            f"mixing method '{config.mixing.method}' compares losses with a reference model's: "
            f"give mixing.reference (a trained run's folder) or mixing.reference_losses (a store "
            f"of its losses), not both; {given}. A store is made with: {how_to_score(config)}"
        )
    return ReferencePaths(model=model, losses=losses)


def how_to_score(config: Config, store: str | Path | None = None, epochs: int | None = None) -> str:
    """Return the command that makes a loss store for a run, or adds to it."""
    folder, model = store or "STORE", "REFERENCE_RUN"
    if store is not None:
        try:
            # Who goes on with a store uses its model.
            header = json.loads(Path(store, HEADER_NAME).read_bytes())
            model = str(header["model"]["checkpoint"])
        except (OSError, ValueError, KeyError, TypeError):
            model = "runs/quickstart" if "quickstart" in str(store) else model
    ready = f"-d configs local/quickstart mixing/{config.mixing.method}"
    configs = ready if "quickstart" in model else "YOUR_CONFIGS"
    command = f"python tools/score_data.py {configs} --checkpoint {model} --out {folder}"
    return f"{command} --epochs {epochs}" if epochs is not None else command


def open_store(config: Config, domains: OpenDomains, folder: str | Path) -> LossStore:
    """Open a loss store for a run's domains.

    Args:
        config: with ``model.vocab_size`` filled in.
        domains: of the run.
        folder: of the store.

    Raises:
        DataError: it is not there, or not of this run's windows.
    """
    assert config.model.vocab_size is not None
    return LossStore(
        folder,
        domains.train,
        splits=splits_of(config, domains),
        vocab_size=config.model.vocab_size,
        remedy=lambda epochs: how_to_score(config, folder, epochs),
    )


def open_for_scoring(config: Config, *, world_size: int, gpus: int) -> tuple[Config, OpenDomains]:
    """Complete a run's configuration and open its data, for a model that is not its own.

    Args:
        config: the loaded configuration.
        world_size: ranks of the job.
        gpus: GPUs of this node; 0 means that it runs on the CPU.

    Raises:
        NeomixError: the ranks cannot be arranged as asked, or the data is not there.
    """
    total = resolve_batch(config.batch, run_layout(config, world_size).data_size)[2]
    check_device(config, on_cpu=gpus == 0)
    domains = open_run_domains(config)
    try:
        return with_steps(complete(config, domains), domains, total), domains
    except NeomixError:
        domains.close()
        raise


def splits_of(config: Config, domains: OpenDomains) -> dict[str, str | None]:
    """Return by name the shares that a domain is the training part of; None with own files."""
    return {
        name: config.split if config.domains[name].uses_split else None for name in domains.names
    }


def check_reference_source(
    config: Config,
    domains: OpenDomains,
    weights: FloatArray,
    *,
    world_size: int,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Check that a run's reference is there and fits, without reading it whole.

    For a method that needs :attr:`~megatron.mixing.Signal.EXCESS_LOSS`.

    Args:
        config: with ``model.vocab_size`` filled in.
        domains: of the run.
        weights: the sampling weights that the run keeps to [K].
        world_size: ranks of the job.
        say: told of checkpoints that are passed over.

    Raises:
        ConfigError: no reference is given, or it does not fit the run.
        CheckpointError: the reference's checkpoint is not there.
        DataError: the loss store is not there, or not of this run.
    """
    paths = reference_paths(config)
    if paths.losses is not None:
        store = open_store(config, domains, paths.losses)
        store.check_forecast(least_samples(config, domains, weights, world_size=world_size))
        return
    assert paths.model is not None
    reference = find_reference(paths.model, verified=False, say=say)
    if reference.path.resolve().parent == Path(config.checkpoint.save_dir).resolve():
        raise ConfigError(
            f"mixing.reference: {paths.model} is the run's own folder, which would go on from the "
            "reference's checkpoint; give this run another: --set run_dir=runs/"
            f"{config.mixing.method}"
        )
    check_reference(reference, config)


def least_samples(
    config: Config, domains: OpenDomains, weights: FloatArray, *, world_size: int
) -> dict[str, float]:
    """Return how many windows a run surely reads of each domain, if its weights stay.

    Nothing where that cannot be told: data that ends ends the run, and a guardrail may change
    what is drawn.
    """
    if config.mixing.on_exhausted != "repeat" or config.mixing.options.get("guardrail"):
        return {}
    samples, spread = _drawn(config, weights, world_size)
    return dict(zip(domains.names, (samples - spread).tolist(), strict=True))


def epochs_read(
    config: Config, domains: OpenDomains, weights: FloatArray, *, world_size: int
) -> dict[str, int]:
    """Return how many passes over each domain a run begins at most, if its weights stay."""
    samples, spread = _drawn(config, weights, world_size)
    needed = {}
    for domain, most in zip(domains.train, (samples + spread).tolist(), strict=True):
        epochs, windows = 1, domain.num_windows(0)
        while windows < most:
            windows += domain.num_windows(epochs)
            epochs += 1
        needed[domain.name] = epochs
    return needed


def _drawn(config: Config, weights: FloatArray, world_size: int) -> tuple[FloatArray, FloatArray]:
    """Return the expected samples of each domain [K], and how far a draw may be from them."""
    data_size = run_layout(config, world_size).data_size
    micro, _, total = resolve_batch(config.batch, data_size)
    unit = {"sample": 1, "micro_batch": micro, "step": total}[config.mixing.unit]
    shares = weights / weights.sum()
    draws = config.training.train_iters * total / unit
    if config.mixing.draw == "multinomial":
        spread = _SURELY * np.sqrt(draws * shares * (1 - shares))
    else:
        spread = np.full(len(shares), 1.0 + math.log(len(shares)))
    expected: FloatArray = draws * unit * shares
    return expected, spread * unit
