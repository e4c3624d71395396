"""From a method's name and its options to a mixer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError
from megatron.mixing.ado import Ado, AdoOptions
from megatron.mixing.aioli import Aioli, AioliOptions
from megatron.mixing.auto import Auto, AutoOptions
from megatron.mixing.average_of_ledger import AverageOfLedger
from megatron.mixing.base import Mixer, RunContext
from megatron.mixing.controller import Controller
from megatron.mixing.controls import build_controlled, group_levels
from megatron.mixing.doge import Doge, DogeOptions
from megatron.mixing.doremi import Doremi, DoremiOptions
from megatron.mixing.dynamic_loading import DynamicLoading, DynamicLoadingOptions
from megatron.mixing.ema import Ema, EmaOptions
from megatron.mixing.epochs import with_epochs
from megatron.mixing.exp3 import Exp3, Exp3Options
from megatron.mixing.naive_validation import NaiveValidation, NaiveValidationOptions
from megatron.mixing.observation import FloatArray
from megatron.mixing.odm import Odm, OdmOptions
from megatron.mixing.options import CommonOptions, by_domain, read_options
from megatron.mixing.replay_run import Replay, ReplayOptions
from megatron.mixing.schedule import Schedule, ScheduleOptions
from megatron.mixing.skillit import SkillIt, SkillItOptions
from megatron.mixing.smoothed_mean import SmoothedMean, SmoothedMeanOptions
from megatron.mixing.smoothed_mean_exp import SmoothedMeanExp, SmoothedMeanExpOptions
from megatron.mixing.static import Static, StaticOptions
from megatron.mixing.validation_gap import ValidationGap, ValidationGapOptions
from megatron.mixing.velocitune import Velocitune, VelocituneOptions
from megatron.mixing.weights import uniform_weights
from megatron.registry import MixingMethod, mixing_methods


def register(mixer: type[Mixer], options: type[CommonOptions]) -> None:
    """Make a method known by name to :func:`build_mixer` and to the configuration."""
    mixing_methods.register(
        mixer.method,
        MixingMethod(
            name=mixer.method,
            options=options,
            needs=frozenset(signal.value for signal in mixer.needs),
            build=mixer,
        ),
    )


for _mixer, _options in (
    (Static, StaticOptions),
    (Schedule, ScheduleOptions),
    (Odm, OdmOptions),
    (SmoothedMean, SmoothedMeanOptions),
    (SmoothedMeanExp, SmoothedMeanExpOptions),
    (Exp3, Exp3Options),
    (Ema, EmaOptions),
    (Ado, AdoOptions),
    (Auto, AutoOptions),
    (NaiveValidation, NaiveValidationOptions),
    (ValidationGap, ValidationGapOptions),
    (Doremi, DoremiOptions),
    (Doge, DogeOptions),
    (SkillIt, SkillItOptions),
    (DynamicLoading, DynamicLoadingOptions),
    (Velocitune, VelocituneOptions),
    (Aioli, AioliOptions),
    (Replay, ReplayOptions),
    (AverageOfLedger, ReplayOptions),
):
    register(_mixer, _options)


def available_methods() -> list[str]:
    """Return the names of all registered mixing methods, sorted."""
    return sorted(mixing_methods)


def build_mixer(
    method: str,
    *,
    domains: Sequence[str],
    weights: npt.ArrayLike | Mapping[str, float] | None = None,
    context: RunContext | None = None,
    **options: Any,
) -> Controller:
    """Build the mixer of one run, with the controls around it that its options ask for.

    Args:
        method: one of :func:`available_methods`.
        domains: names of the domains; every vector follows their order.
        weights: the given weights, in the order of the domains or by name: at least 0,
            not all 0, of any sum; None = uniform.
        context: what is known of the run; a schedule in tokens or fractions needs it.
        **options: the method's own options, and those of every method
            (:class:`~megatron.mixing.options.CommonOptions`).

    Raises:
        ConfigError: an unknown method or option, or a value that is wrong.
    """
    entry = mixing_methods[method]
    names = _domain_names(domains)
    given = _given_weights(weights, names)
    read, context = read_options(entry.options, method, options), context or RunContext()
    for name in context.targets:
        if (*names, *context.targets).count(name) > 1:
            raise ConfigError(
                f"'{name}' is named twice among the domains and targets; a target is measured and "
                f"never trained on, and names must differ"
            )
    controller = build_controlled(
        entry.build,
        method=method,
        domains=names,
        weights=given,
        options=read,
        context=context,
    )
    return with_epochs(controller, read, context, levels=group_levels(names, given, read, context))


def _domain_names(domains: Sequence[str]) -> tuple[str, ...]:
    if isinstance(domains, str) or not all(isinstance(name, str) and name for name in domains):
        raise ConfigError(f"domains is {domains!r}; give a list of names")
    names = tuple(domains)
    if not names:
        raise ConfigError("domains is empty; a mixture needs at least one domain")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"the domain '{twice[0]}' is named twice; names must differ")
    return names


def _given_weights(
    weights: npt.ArrayLike | Mapping[str, float] | None, domains: tuple[str, ...]
) -> FloatArray:
    if weights is None:
        return uniform_weights(len(domains))
    given: object = list(weights) if isinstance(weights, tuple) else weights
    if not isinstance(given, Mapping | list | np.ndarray):
        raise ConfigError(f"weights is {weights!r}; give one number per domain, or a mapping")
    read = by_domain("weights", given, domains, missing=None)
    if (read < 0).any() or not read.any():
        raise ConfigError(
            f"weights is {read.tolist()}; they must be at least 0, and one of them above 0"
        )
    return read
