"""The usual static distributions, as pure functions of what is known of the domains."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError
from megatron.mixing.observation import FloatArray
from megatron.mixing.simplex import normalise


def uniform_weights(domains: int) -> FloatArray:
    """Return 1/K for each of ``domains`` domains (Aioli's "stratified").

    Raises:
        ConfigError: there is no domain.
    """
    if domains < 1:
        raise ConfigError(f"a mixture of {domains} domains; it needs at least one")
    return np.full(domains, 1.0 / domains)


def natural_weights(token_counts: npt.ArrayLike) -> FloatArray:
    """Return each domain's share of all training tokens (DoReMi's "pack").

    Args:
        token_counts: tokens of each domain's training split, [K].

    Raises:
        ConfigError: a count is negative or not finite, or all are 0.
    """
    return normalise(_counts("token counts", token_counts))


def nopack_weights(padded_windows: npt.ArrayLike) -> FloatArray:
    """Return each domain's share of all windows when no document shares one (DoReMi's "nopack").

    Args:
        padded_windows: sum over the domain's documents of ceil(length / seq_length), [K]
            (:func:`padded_windows` computes it from the lengths).

    Raises:
        ConfigError: a count is negative or not finite, or all are 0.
    """
    return normalise(_counts("padded windows", padded_windows))


def padded_windows(document_lengths: npt.ArrayLike, seq_length: int) -> int:
    """Return how many windows documents fill if each starts one: sum of ceil(length / seq_length).

    Args:
        document_lengths: tokens of each document of one domain, [documents].
        seq_length: tokens of a window.

    Raises:
        ConfigError: ``seq_length`` is below 1.
    """
    if seq_length < 1:
        raise ConfigError(f"seq_length is {seq_length}; it must be at least 1")
    lengths = np.asarray(document_lengths, dtype=np.int64)
    return int((-(-lengths // seq_length)).sum())


def temperature_weights(token_counts: npt.ArrayLike, alpha: float) -> FloatArray:
    """Return p_i proportional to n_i^alpha: natural at alpha 1, uniform at 0.

    A domain without tokens gets 0 at any alpha.

    Args:
        token_counts: tokens of each domain's training split, [K].
        alpha: the exponent, 0 to 1 flatten, above 1 sharpens.

    Raises:
        ConfigError: a bad count, or ``alpha`` negative or not finite.
    """
    counts = _counts("token counts", token_counts)
    if not (np.isfinite(alpha) and alpha >= 0):
        raise ConfigError(f"alpha is {alpha!r}; it must be at least 0 (1 = natural, 0 = uniform)")
    powers = (counts / counts.max()) ** alpha
    return normalise(np.where(counts > 0, powers, 0.0))


def document_weights(document_counts: npt.ArrayLike, alpha: float = 0.3) -> FloatArray:
    """Return GPT-NeoX's ``weight_by_num_documents``: q^alpha (1 - q), normalised, q = n / sum n.

    A single domain gets 1, where the formula says 0/0.

    Args:
        document_counts: documents of each domain's training split, [K].
        alpha: the exponent (GPT-NeoX's ``weighted_sampler_alpha``).

    Raises:
        ConfigError: a bad count, or ``alpha`` negative or not finite.
    """
    share = normalise(_counts("document counts", document_counts))
    if not (np.isfinite(alpha) and alpha >= 0):
        raise ConfigError(f"alpha is {alpha!r}; it must be at least 0")
    weights = np.where(share > 0, share**alpha * (1.0 - share), 0.0)
    return normalise(weights if weights.any() else share)


def _counts(name: str, values: npt.ArrayLike) -> FloatArray:
    counts = np.asarray(values, dtype=np.float64)
    if counts.ndim != 1 or counts.size == 0:
        raise ConfigError(f"{name} have shape {counts.shape}; give one number per domain")
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.any()):
        raise ConfigError(
            f"{name} are {counts.tolist()}; they must be finite, at least 0 and not all 0"
        )
    return counts
