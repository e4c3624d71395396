"""Find a mixture by DoReMi's three stages: reference, proxy, and, if wanted, the main run.

  tools/mix.py doremi local/quickstart -d configs --set num_gpus=1 --rounds 3

A round trains a reference on the round's mixture r, then a proxy that draws by r and weighs each
domain's loss by how far it is above the frozen reference's (arXiv 2305.10429).  The mean of the
proxy's domain weights is the next round's r, until no weight moves by more than --tolerance.
Options of the method belong to the configuration: --set mixing.method=doremi mixing.eta=0.5.

In --out: mixture.yml (the last round's weights), table.csv and table.parquet with the held-out
losses of all runs, summary.md with the weights of every round, and report.html.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron.checkpoint.files import disk_errors, replace_file
from megatron.config import Config
from megatron.errors import ConfigError
from megatron.experiments.conduct import (
    add_study_arguments,
    base_of,
    conduct,
    gpus_of,
    runs_dir,
)
from megatron.experiments.execute import Outcome
from megatron.experiments.found_mixture import read_mixture
from megatron.experiments.report import write_report
from megatron.experiments.report.made import command_line
from megatron.experiments.study import (
    Base,
    PlannedRun,
    Study,
    Variant,
    plan_study,
    static_overrides,
)
from megatron.experiments.table import study_rows, write_table
from megatron.training.product import NAME as MIXTURE
from megatron.training.product import write_mixture

METHOD = "doremi"
BASELINES = ("natural", "nopack", "uniform", "given")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    add_study_arguments(parser, out="runs/studies/doremi")
    own = parser.add_argument_group("the rounds")
    own.add_argument(
        "--baseline",
        choices=BASELINES,
        default="natural",
        help="first reference's weights: by tokens (natural), by windows if documents were padded "
        "instead of packed (nopack), uniform, or the domains' own (given)",
    )
    own.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="at most so many (default: 1)"
    )
    own.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="T",
        help="end when no weight has moved by more in a round (default: 1e-3)",
    )
    own.add_argument(
        "--main",
        nargs="+",
        metavar="CONFIG",
        help="also train these configuration files on the mixture that was found",
    )


def run(options: argparse.Namespace) -> int:
    """Run the rounds; return the exit code."""
    if options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}; give a number from 1 on")
    if not options.tolerance >= 0:
        raise ConfigError(f"--tolerance is {options.tolerance}; give 0 or more")
    return _Rounds(options).run()


def reference_overrides(config: Config, baseline: str) -> tuple[str, ...]:
    """Return the overrides of a first reference: fixed weights of a kind."""
    forget, block = static_overrides(config, {})
    mixing = json.loads(block.removeprefix("mixing="))
    return forget, f"mixing={json.dumps({**mixing, 'weights': baseline})}"


def proxy_overrides(
    config: Config, weights: Mapping[str, float], reference: PlannedRun
) -> tuple[str, ...]:
    """Return the overrides of a proxy.

    Args:
        config: the configuration; where its method is ``doremi``, its options stay.
        weights: r, by domain.
        reference: the run whose model is compared with.
    """
    forget, block = static_overrides(config, weights)
    mixing = json.loads(block.removeprefix("mixing="))
    own = dict(config.mixing.options) if config.mixing.method == METHOD else {}
    own.pop("reference_losses", None)
    mixing |= {**own, "method": METHOD, "reference": str(reference.folder)}
    return forget, f"mixing={json.dumps(mixing, ensure_ascii=False)}"


class _Rounds:
    """Reference and proxy, round after round."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._base: Base = base_of(options)
        self._config = self._base.load()
        self._folder = runs_dir(options)
        self._out: Path = options.out
        self._runs: list[PlannedRun] = []
        self._course: list[dict[str, float]] = []

    def run(self) -> int:
        overrides = reference_overrides(self._config, self._options.baseline)
        converged = False
        for number in range(1, self._options.rounds + 1):
            reference, outcome = self._do(f"reference-{number}", overrides, number, "reference")
            if outcome is None and self._options.dry_run:
                print(
                    f"then a proxy of the same length on top of it, and at most "
                    f"{self._options.rounds} such rounds: what follows depends on the proxy"
                )
            if outcome is None or outcome.exit_code:
                return self._end(outcome)
            if not self._course:
                self._course.append(dict(reference.weights))
            given = self._course[-1]
            overrides = proxy_overrides(self._config, given, reference)
            proxy, outcome = self._do(f"proxy-{number}", overrides, number, "proxy")
            if outcome is None or outcome.exit_code:
                return self._end(outcome)
            found = read_mixture(proxy)
            self._course.append(found)
            moved = max(abs(found[name] - given[name]) for name in found)
            print(f"round {number}: {_named(found)} (moved by at most {moved:.4g})")
            overrides = static_overrides(self._config, found)
            self._write(number)
            if moved <= self._options.tolerance:
                converged = True
                break
        if self._options.rounds > 1 and not converged:
            print(f"not within --tolerance after {self._options.rounds} rounds; the last is taken")
        return self._train_main()

    def _do(
        self,
        name: str,
        overrides: Sequence[str],
        number: int,
        role: str,
        base: Base | None = None,
    ) -> tuple[PlannedRun, Outcome | None]:
        """Plan a run and bring it to its end, beside all before it."""
        variant = Variant(
            name=name, overrides=tuple(overrides), tags={"round": number, "role": role}
        )
        chosen = base or self._base
        gpus = gpus_of(self._options, chosen)
        planned = plan_study(METHOD, chosen, [variant], self._folder, gpus=gpus)
        self._runs += planned.runs
        return planned.runs[0], conduct(Study(name=METHOD, runs=tuple(self._runs)), self._options)

    def _train_main(self) -> int:
        if not self._options.main:
            return 0
        base = Base(files=tuple(self._options.main), conf_dir=self._options.conf_dir)
        number = len(self._course) - 1
        overrides = static_overrides(base.load(), self._course[-1])
        _, outcome = self._do("main", overrides, number, "main", base)
        if outcome is not None and outcome.exit_code == 0:
            self._write(number)
        return self._end(outcome)

    def _end(self, outcome: Outcome | None) -> int:
        for failure in outcome.failed if outcome is not None else ():
            print(f"failed: {failure.run.name}: {failure.why}")
        if outcome is not None and outcome.failed:
            self._report({failure.run.name: failure.why for failure in outcome.failed})
        return outcome.exit_code if outcome is not None else 0

    def _write(self, number: int) -> None:
        """Write what is known after a round."""
        domains = tuple(self._course[-1])
        weights = np.array([self._course[-1][name] for name in domains])
        self._out.mkdir(parents=True, exist_ok=True)
        rounds = f"{number} round{'s' if number > 1 else ''} of {METHOD}"
        steps = self._runs[0].steps
        write_mixture(self._out, domains, lambda: weights, method=rounds, step=steps)
        path = self._out / "summary.md"
        with disk_errors(path):
            replace_file(path, self._summary(domains).encode())
        write_table(study_rows(METHOD, self._runs), self._out)
        report = self._report({})
        print(f"written: {self._out / MIXTURE} {path} {self._out / 'table.csv'} {report}")

    def _report(self, failed: Mapping[str, str]) -> Path:
        return write_report(self._out, command=command_line(self._options), failed=failed)

    def _summary(self, domains: Sequence[str]) -> str:
        lines = [
            f"# {METHOD}",
            "",
            "Round 0 is the first reference's mixture; every other row is what a proxy found.",
            "",
            f"| round | {' | '.join(domains)} |",
            "|---|" + "---|" * len(domains),
        ]
        for number, weights in enumerate(self._course):
            cells = " | ".join(f"{weights[name]:.4f}" for name in domains)
            lines.append(f"| {number} | {cells} |")
        return "\n".join(lines) + "\n"


def _named(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())
