"""A study: a list of runs that is worked out before any of them starts.

Every run is an ordinary one of ``deepy.py train.py``.  Its folder is named by a hash of what
decides its results (:meth:`megatron.config.Config.hash`, the run it starts from, the data), so a
run that two studies, or two commands, ask for is done once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)
from megatron.checkpoint.files import disk_errors, replace_file
from megatron.config import Config, load_config, resolve_batch
from megatron.errors import ConfigError
from megatron.model.accounting import flops_per_token, parameter_count
from megatron.training.check import preflight
from megatron.training.domains import OpenDomains, open_run_domains, start_weights
from megatron.training.layout import run_layout
from megatron.training.summary import complete

Tag = str | int | float
KEY_LENGTH = 16
PLAN = "plan.json"
_OWN = "runner"
_SAVES = 5
_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Base:
    """The configuration that all runs of a study begin with, as given on a command line.

    Attributes:
        files: configuration files.
        conf_dir: folder that their names start from.
        overrides: ``key=value`` texts over the files.
    """

    files: tuple[str, ...]
    conf_dir: str | None = None
    overrides: tuple[str, ...] = ()

    def load(self, more: Iterable[str] = ()) -> Config:
        """Return the configuration with ``more`` overrides after its own."""
        config = load_config(self.files, conf_dir=self.conf_dir, overrides=[*self.overrides, *more])
        if config.training.counts_epochs:
            raise ConfigError(
                "train_epochs: the runs of a study are as long as its budget says; give train_iters"
            )
        return config


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What one run has of its own.

    Attributes:
        name: short, unique in the study.
        overrides: ``key=value`` texts over the base.
        tags: facts that the study's table shows of the run (a design's point, say).
    """

    name: str
    overrides: tuple[str, ...] = ()
    tags: Mapping[str, Tag] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run, complete in every respect before it starts.

    Attributes:
        name: short, unique in the study.
        key: hash of what decides the results.
        folder: the run's folder, named by ``key``.
        config: the configuration, with folder and vocabulary filled in.
        tags: see :class:`Variant`.
        weights: start weights of the domains trained on; they sum to 1.
        domain_tokens: training tokens that there are of each domain.
        tokens: that it trains on.
        flops: of its training steps (causal attention), validations not counted.
        ranks: processes of the job.
    """

    name: str
    key: str
    folder: Path
    config: Config
    tags: Mapping[str, Tag]
    weights: Mapping[str, float]
    domain_tokens: Mapping[str, int]
    tokens: int
    flops: float
    ranks: int

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.training.seed

    @property
    def method(self) -> str:
        """The run's mixing method."""
        return self.config.mixing.method

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.training.train_iters

    @property
    def own(self) -> Path:
        """Folder, inside the run's, of what the runner keeps: request, output, lock, end."""
        return self.folder / _OWN

    @property
    def request(self) -> Path:
        """The configuration file that the run is started with."""
        return self.own / "request.yml"

    def write_request(self) -> Path:
        """Write the configuration file of the run and return its path.

        Raises:
            RunError: the disk refuses.
        """
        with disk_errors(self.request):
            self.own.mkdir(parents=True, exist_ok=True)
            replace_file(self.request, self.config.resolved_yaml().encode())
        return self.request


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of one question.

    Attributes:
        name: of the study.
        runs: in the order in which they are started.
    """

    name: str
    runs: tuple[PlannedRun, ...]

    @property
    def distinct(self) -> tuple[PlannedRun, ...]:
        """The runs without those that have another's folder."""
        return distinct(self.runs)

    @property
    def tokens(self) -> int:
        """Tokens that all runs train on, each folder once."""
        return sum(run.tokens for run in self.distinct)

    @property
    def flops(self) -> float:
        """Training FLOPs of all runs, each folder once."""
        return sum(run.flops for run in self.distinct)

    def write_plan(self, out: Path) -> Path:
        """Write ``plan.json`` into the folder of the results: every run, and what it takes.

        Raises:
            RunError: the disk refuses.
        """
        path = out / PLAN
        runs = [
            {
                "run": run.name,
                "key": run.key,
                "folder": str(run.folder),
                "method": run.method,
                "seed": run.seed,
                "tags": dict(run.tags),
                "weights": dict(run.weights),
                "steps": run.steps,
                "tokens": run.tokens,
                "flops": run.flops,
                "parameters": parameter_count(run.config.model),
                "schedule": schedule_facts(run.config),
            }
            for run in self.runs
        ]
        plan = {
            "study": self.name,
            "tokens": self.tokens,
            "flops": self.flops,
            "domain_tokens": dict(self.runs[0].domain_tokens),
            "runs": runs,
        }
        with disk_errors(path):
            out.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(plan, indent=1, ensure_ascii=False).encode())
        return path

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that the first run trains on."""
        return tuple(self.runs[0].weights)


def distinct(runs: Iterable[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Return the first run of every folder, in order."""
    first: dict[str, PlannedRun] = {}
    for run in runs:
        first.setdefault(run.key, run)
    return tuple(first.values())


def plan_study(
    name: str, base: Base, variants: Sequence[Variant], runs_dir: str | Path, *, gpus: int = 0
) -> Study:
    """Work out every run of a study; nothing is started or written.

    Data is opened once for all runs that read the same, and the first run of every method is
    checked as a launch would check it.

    Args:
        name: of the study.
        base: what all runs share.
        variants: what each has of its own.
        runs_dir: folder of the runs' folders.
        gpus: CUDA devices of a machine that a run starts on; 0: runs on the CPU.

    Raises:
        ConfigError: no run, two of one name, or a configuration that is wrong.
        NeomixError: what a run would stop at when it starts.
    """
    if not variants:
        raise ConfigError(f"the study '{name}' has no runs; ask for at least one")
    seen: set[str] = set()
    for variant in variants:
        if variant.name in seen:
            raise ConfigError(f"two runs of the study '{name}' are called '{variant.name}'")
        seen.add(variant.name)
    planner = _Planner(Path(runs_dir).absolute(), gpus)
    try:
        runs = tuple(planner.plan(base, variant) for variant in variants)
    finally:
        planner.close()
    return Study(name=name, runs=runs)


def run_key(config: Config, fingerprints: Mapping[str, str]) -> str:
    """Return the name of a run's folder: a hash of all that decides its results.

    Args:
        config: the configuration.
        fingerprints: of the data, by domain.
    """
    start = config.checkpoint
    facts: dict[str, object] = {
        "config": config.hash(),
        "data": dict(sorted(fingerprints.items())),
        "from": [start.load, start.finetune, start.load_universal] if start.load else None,
    }
    if start.finetune_optimizer:
        facts["optimizer"] = True
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def ranks_of(config: Config, gpus: int) -> int:
    """Return the processes of a run's job.

    Args:
        config: the configuration.
        gpus: CUDA devices of a machine that it starts on; 0: it runs on the CPU.
    """
    return (config.launch.num_gpus or max(1, gpus)) * (config.launch.num_nodes or 1)


def schedule_facts(config: Config) -> dict[str, str | float]:
    """Return what decides how a run's learning rate goes, JSON-able."""
    schedule, steps = config.schedule, config.training.train_iters
    return {
        "style": schedule.lr_decay_style,
        "warmup_steps": schedule.warmup_steps(steps),
        "decay_steps": schedule.decay_steps(steps),
    }


def static_overrides(config: Config, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return the overrides that make a run of ``config`` train on a fixed mixture.

    The method and its options go; how decisions become samples stays.

    Args:
        config: the configuration as it is.
        weights: by domain; any scale.
    """
    mixing = config.mixing
    block = {
        "method": "static",
        "weights": {name: round(float(weight), _DIGITS) for name, weight in weights.items()},
        "lag": mixing.lag,
        "unit": mixing.unit,
        "draw": mixing.draw,
        "on_exhausted": mixing.on_exhausted,
    }
    return ("mixing=null", f"mixing={json.dumps(block, ensure_ascii=False)}")


def in_folder(config: Config, folder: Path) -> Config:
    """Return a configuration whose run lives in ``folder``, and can go on after a kill.

    Where the configuration does not say how often to save, it saves a few times; where it does
    not say how many checkpoints to keep, it keeps the newest.
    """
    checkpoint = config.checkpoint
    interval = checkpoint.save_interval
    if interval is None and checkpoint.checkpoint_scale == "linear":
        interval = max(1, config.training.train_iters // _SAVES)
    own = {
        "run_dir": str(folder),
        "run_name": None,
        "save": None,
        "save_interval": interval,
        "keep_last_n_checkpoints": checkpoint.keep_last_n_checkpoints or 1,
    }
    logging = config.logging.model_copy(update={"log_dir": None, "tensorboard_dir": None})
    return config.model_copy(
        update={"checkpoint": checkpoint.model_copy(update=own), "logging": logging}
    )


class _Planner:
    """Plans runs one after the other and remembers what they share."""

    def __init__(self, runs_dir: Path, gpus: int) -> None:
        self._runs_dir = runs_dir
        self._gpus = gpus
        self._opened: dict[str, tuple[OpenDomains, dict[str, str]]] = {}
        self._checked: set[str] = set()

    def plan(self, base: Base, variant: Variant) -> PlannedRun:
        config = base.load(variant.overrides)
        self._check(config)
        domains, fingerprints = self._open(config)
        whole = complete(config, domains)
        ranks = ranks_of(config, self._gpus)
        total = resolve_batch(config.batch, run_layout(config, ranks).data_size)[2]
        weights = start_weights(config.mixing, config.domains, domains)
        key = run_key(config, fingerprints)
        rows = config.data.tokens_per_row(config.training.train_iters, config.model.context_length)
        tokens = total * rows
        return PlannedRun(
            name=variant.name,
            key=key,
            folder=self._runs_dir / key,
            config=in_folder(whole, self._runs_dir / key),
            tags=dict(variant.tags),
            weights=dict(zip(domains.names, (weights / weights.sum()).tolist(), strict=True)),
            domain_tokens=dict(zip(domains.names, map(int, domains.token_counts), strict=True)),
            tokens=tokens,
            flops=tokens * flops_per_token(whole.model),
            ranks=ranks,
        )

    def close(self) -> None:
        for domains, _ in self._opened.values():
            domains.close()

    def _check(self, config: Config) -> None:
        """Refuse what a launch would refuse; once for a method."""
        if config.mixing.method in self._checked:
            return
        preflight(config, world_size=ranks_of(config, self._gpus), gpus=self._gpus).domains.close()
        self._checked.add(config.mixing.method)

    def _open(self, config: Config) -> tuple[OpenDomains, dict[str, str]]:
        """Open a run's data, or return what another run of the study has opened."""
        named = {
            name: domain.model_dump(mode="json", exclude={"weight", "valid_weight", "test_weight"})
            for name, domain in config.domains.items()
        }
        facts = [
            named,
            config.split,
            config.model.context_length,
            config.training.seed,
            config.training.epoch_offset,
            config.data.model_dump(mode="json"),
        ]
        key = json.dumps(facts)
        if key not in self._opened:
            opened = open_run_domains(config)
            self._opened[key] = opened, _fingerprints(opened)
        return self._opened[key]


def _fingerprints(domains: OpenDomains) -> dict[str, str]:
    """Return fingerprints of training and held-out data, by domain and part."""
    found = {f"train {name}": text for name, text in domains.fingerprints.items()}
    for part, opened in (("valid", domains.valid), ("test", domains.test)):
        for name, domain in zip(domains.measured, opened, strict=True):
            if domain is not None:
                found[f"{part} {name}"] = domain.fingerprint()
    return found
