"""Several runs side by side: at equal tokens, on the same domains, with what seeds can show."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.errors import ConfigError, did_you_mean
from megatron.monitor.report.load import RunData
from megatron.monitor.report.measured import Validation
from megatron.monitor.report.summary import percent
from megatron.monitor.throughput import short

# Differences in these keys do not make another experiment of a run.
INCIDENTAL = ("seed", "run_dir", "save", "load", "log_dir", "tensorboard_dir", "master_port")
INCIDENTAL_PREFIXES = ("wandb_", "comet_", "use_wandb", "use_comet", "use_tensorboard")

# 97.5 % quantile of Student's t by degrees of freedom 1 to 30.
T_QUANTILE = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


# Half of the last digit that the report shows: what is smaller is called equal.
EQUAL = 5e-5


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences of the mean held-out loss between two groups, seed by seed.

    Attributes:
        differences: group minus baseline, one per common seed.
        mean: their mean.
        half_width: half the 95 % t interval, NaN with one seed.
    """

    differences: tuple[float, ...]
    mean: float
    half_width: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs compared at equal tokens.

    Attributes:
        tokens: tokens at which they are compared.
        unequal: whether the measurements differ by more than 1 % in tokens.
        domains: the domains that every run measured.
        at: the measurement taken from each run.
        groups: index of the group (same configuration but for the seed) of each run.
        labels: name of each group.
        baseline: index of the run that the others are compared with.
        against: the run that each run is subtracted from, ``None`` for the baseline's group
            and for runs without a partner.
        paired: group index → difference to the baseline's group.
    """

    tokens: float
    unequal: bool
    domains: tuple[str, ...]
    at: tuple[Validation, ...]
    groups: tuple[int, ...]
    labels: tuple[str, ...]
    baseline: int
    against: tuple[int | None, ...]
    paired: dict[int, Paired]

    def average(self, run: int) -> float:
        """Mean loss of ``run`` over the common domains."""
        return self.at[run].average(self.domains)


def group_runs(runs: Sequence[RunData]) -> tuple[list[int], list[str]]:
    """Return the group of each run and the groups' labels.

    Runs belong together when their configurations differ in nothing but the seed
    and places; a run whose configuration is not known stands alone.
    """
    keys = [_experiment(run) or f"run {index}" for index, run in enumerate(runs)]
    order = list(dict.fromkeys(keys))
    groups = [order.index(key) for key in keys]
    members = [[run for run, g in zip(runs, groups, strict=True) if g == i] for i in set(groups)]
    methods = [group[0].mixing for group in members]
    labels = []
    for group, method in zip(members, methods, strict=True):
        if len(group) == 1:
            labels.append(group[0].name)
        elif method and methods.count(method) == 1:
            labels.append(method)
        else:
            labels.append(_common_start([run.name for run in group]) or method or group[0].name)
    return groups, labels


def _experiment(run: RunData) -> str:
    kept = {
        key: value
        for key, value in run.config.items()
        if key not in INCIDENTAL and not key.startswith(INCIDENTAL_PREFIXES)
    }
    return json.dumps(kept, sort_keys=True, default=str) if kept else ""


def _common_start(names: list[str]) -> str:
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    return start.rstrip("-_./ ")


def choose_baseline(runs: Sequence[RunData], wanted: str | None) -> int:
    """Return the index of the baseline: the one asked for, else the first static run, else 0.

    Raises:
        ConfigError: no run has the name asked for.
    """
    names = [run.name for run in runs]
    if wanted is not None:
        for index, run in enumerate(runs):
            if wanted in (run.name, str(run.path)):
                return index
        raise ConfigError(
            f"--baseline: no run is called '{wanted}'{did_you_mean(wanted, names)} "
            f"(given: {', '.join(names)})"
        )
    return next((index for index, run in enumerate(runs) if run.method == "static"), 0)


def compare(runs: Sequence[RunData], wanted: str | None = None) -> Comparison | None:
    """Compare ``runs`` at the largest number of tokens that all have been measured at.

    Returns:
        ``None`` if there are fewer than two runs, or one was never measured in
        training, or they share no domain.
    """
    baseline = choose_baseline(runs, wanted)
    if len(runs) < 2 or any(not _trained(run) for run in runs):
        return None
    tokens = min(run.validations[-1].tokens for run in runs)
    at = tuple(
        max(
            (v for v in run.validations if v.tokens <= tokens * 1.0001),
            key=lambda v: v.tokens,
            default=run.validations[0],
        )
        for run in runs
    )
    domains = tuple(name for name in at[0].loss if all(name in v.loss for v in at))
    if not domains:
        return None
    groups, labels = group_runs(runs)
    against = partners(runs, groups, baseline)
    spread = max(v.tokens for v in at) - min(v.tokens for v in at)
    averages = [v.average(domains) for v in at]
    return Comparison(
        tokens=tokens,
        unequal=spread > 0.01 * max(1.0, tokens),
        domains=domains,
        at=at,
        groups=tuple(groups),
        labels=tuple(labels),
        baseline=baseline,
        against=against,
        paired=_paired_groups(groups, against, averages),
    )


def _trained(run: RunData) -> bool:
    return any(v.tokens > 0 for v in run.validations)


def partners(
    runs: Sequence[RunData], groups: Sequence[int], baseline: int
) -> tuple[int | None, ...]:
    """Return for each run the run of the baseline's group that it is measured against.

    That is the one of the same seed; two groups of one run each are compared as
    they are.  The baseline's own group has no partners.
    """
    own = [i for i, group in enumerate(groups) if group == groups[baseline]]
    result: list[int | None] = []
    for index, run in enumerate(runs):
        same = [i for i in own if run.seed is not None and runs[i].seed == run.seed]
        if index in own:
            result.append(None)
        elif same:
            result.append(same[0])
        else:
            lonely = len(own) == 1 and groups.count(groups[index]) == 1
            result.append(baseline if lonely else None)
    return tuple(result)


def _paired_groups(
    groups: Sequence[int], against: Sequence[int | None], averages: Sequence[float]
) -> dict[int, Paired]:
    differences: dict[int, list[float]] = {}
    for index, partner in enumerate(against):
        if partner is not None:
            difference = averages[index] - averages[partner]
            differences.setdefault(groups[index], []).append(difference)
    return {group: paired(values) for group, values in differences.items()}


def paired(differences: Sequence[float]) -> Paired:
    """Return mean and 95 % t interval of paired differences."""
    count = len(differences)
    mean = math.fsum(differences) / count
    half = math.nan
    if count > 1:
        variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
        quantile = T_QUANTILE[count - 2] if count <= 31 else 1.96
        half = quantile * math.sqrt(variance / count)
    return Paired(differences=tuple(differences), mean=mean, half_width=half)


def verdicts(comparison: Comparison) -> list[str]:
    """Say which groups of runs did better than the baseline, the best first."""
    level = comparison.average(comparison.baseline)
    order = sorted(comparison.paired.items(), key=lambda item: item[1].mean)
    return [_verdict(comparison, group, result, level) for group, result in order]


def conditions(comparison: Comparison) -> list[str]:
    """Say what was compared, and how far the verdicts can be trusted."""
    name = comparison.labels[comparison.groups[comparison.baseline]]
    sentences = [
        f"Compared at {short(comparison.tokens)} tokens on {len(comparison.domains)} domains, "
        f"with {name} as the baseline; held-out losses, mean of domains."
    ]
    missing = set(comparison.groups) - set(comparison.paired)
    missing -= {comparison.groups[comparison.baseline]}
    if missing:
        names = ", ".join(comparison.labels[group] for group in sorted(missing))
        sentences.append(f"{names}: no seed in common with the baseline, so no paired difference.")
    if comparison.unequal:
        sentences.append(
            "The measurements lie at different token counts (see the table): "
            "part of the difference is training, not mixing."
        )
    if any(len(result.differences) == 1 for result in comparison.paired.values()):
        sentences.append(
            "One run each says nothing about chance: another seed would move these figures by an "
            "unknown amount. Give the report runs with other seeds as well to get an interval."
        )
    return sentences


def _verdict(comparison: Comparison, group: int, result: Paired, level: float) -> str:
    name, count = comparison.labels[group], len(result.differences)
    against = comparison.labels[comparison.groups[comparison.baseline]]
    text = f"{signed(result.mean)} nats per token ({percent(result.mean / level)})"
    if count > 1:
        low, high = result.mean - result.half_width, result.mean + result.half_width
        interval = f"{text}, 95% interval {signed(low)} to {signed(high)} over {count} seeds"
        if low <= 0 <= high:
            return f"{name} and {against} cannot be told apart with these seeds: {interval}."
        return f"{name} is {'better' if high < 0 else 'worse'} than {against}: {interval}."
    run = next(
        i
        for i, partner in enumerate(comparison.against)
        if comparison.groups[i] == group and partner is not None
    )
    base = comparison.at[comparison.against[run] or 0].loss
    lower = sum(comparison.at[run].loss[d] < base[d] - EQUAL for d in comparison.domains)
    if abs(result.mean) < EQUAL:
        return (
            f"With one run each, {name} and {against} ended alike: {text}; lower on {lower} of "
            f"{len(comparison.domains)} domains."
        )
    side = "lower" if result.mean < 0 else "higher"
    return (
        f"With one run each, {name} ended {side} than {against}: {text}; lower on {lower} of "
        f"{len(comparison.domains)} domains."
    )


def signed(value: float) -> str:
    """Return a difference of losses as ``−0.0123``."""
    return f"{value:+.4f}".replace("-", "−")
