"""Compute a model's loss of every token of a run's training data, once, into a loss store.

    tools/score_data.py local/quickstart -d configs --checkpoint runs/quickstart --out runs/losses
    tools/score_data.py my_data.yml my_model.yml --checkpoint runs/ref --out STORE --epochs 2

The configuration files are those of the run that will use the store: they say which data, split
and seq_length it has, and in which layout (tensor, pipeline and data ranks) the model runs here,
which need not be the run's.  The model is the checkpoint's.  The ranks are started as deepy.py
starts them; under torchrun or another launcher start the tool once per rank.

Killed or stopped, it goes on where it was when the same command is given again.  Give more
epochs or domains later to add them.  A run uses the store with
mixing: {method: doremi, reference_losses: STORE}.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, run_command
from megatron.launch.command import RESOLVED_CONFIG_FLAG, encode_config, plan_launch

if TYPE_CHECKING:
    from megatron.config import Config
    from megatron.launch.stop import StopFlag

_SAVE_SECONDS = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line; start the ranks, or be one of them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    from deepy import spread_set
    from megatron.training.program import read_config

    options = _parser().parse_intermixed_args(spread_set(given))
    config = read_config(options)
    out = _out(options, config)
    if "RANK" in os.environ:
        _rank(options, config, out)
    from megatron.launch.request import LAUNCH_KEYS, LaunchRequest

    request = LaunchRequest(**{key: getattr(config.launch, key) for key in LAUNCH_KEYS})
    plan = plan_launch(
        Path(__file__).resolve(),
        [RESOLVED_CONFIG_FLAG, encode_config(config.resolved_yaml()), *_own(options, out)],
        request,
        log_dir=out / "logs",
        save_timeout=_SAVE_SECONDS,
    )
    if plan.ranks == 1:
        os.environ.update(plan.environment)
        _rank(options, config, out)
    _preflight(options, config, plan.ranks)
    from megatron.launch.start import start

    return start(plan, out, out / "logs", save_timeout=_SAVE_SECONDS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/score_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "conf_file", nargs="*", metavar="CONFIG", help="configuration files of the run, merged"
    )
    parser.add_argument("-d", "--conf_dir", metavar="DIR", help="folder of those files")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="set a key, over the files (several may follow, or repeat the flag)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", metavar="RUN",
        help="the model: a run's folder, its folder of checkpoints, or one checkpoint "
        "(default: mixing.reference of the configuration)",
    )  # fmt: skip
    parser.add_argument(
        "--iteration", type=_positive, metavar="N", help="which checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--out", metavar="STORE", type=Path,
        help="folder of the store (default: mixing.reference_losses of the configuration)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=_positive, metavar="N",
        help="passes over every domain to score, where the cuts of windows move between epochs "
        "(default: those that the run begins, domain by domain, if it keeps its start weights)",
    )  # fmt: skip
    parser.add_argument(
        "--domains", nargs="+", default=[], metavar="NAME", help="score these only (default: all)"
    )
    parser.add_argument(RESOLVED_CONFIG_FLAG, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _out(options: argparse.Namespace, config: Config) -> Path:
    """Return the store's folder; complete the options from the configuration."""
    named = config.mixing.options
    options.checkpoint = options.checkpoint or named.get("reference")
    out = options.out or named.get("reference_losses")
    if options.checkpoint is None:
        raise ConfigError("--checkpoint: say which model scores: a run's folder or a checkpoint")
    if out is None:
        raise ConfigError("--out: say where the store goes: a folder")
    return Path(out)


def _own(options: argparse.Namespace, out: Path) -> list[str]:
    """Return the options that every rank is given, beside the configuration."""
    words = ["--checkpoint", str(options.checkpoint), "--out", str(out)]
    for flag in ("iteration", "epochs"):
        if getattr(options, flag) is not None:
            words += [f"--{flag}", str(getattr(options, flag))]
    return [*words, "--domains", *options.domains] if options.domains else words


def _preflight(options: argparse.Namespace, config: Config, ranks: int) -> None:
    """Refuse in this process, at once, what every rank would refuse."""
    from megatron.training.reference_checkpoint import check_reference, find_reference
    from megatron.training.reference_options import open_for_scoring

    config, domains = open_for_scoring(config, world_size=ranks, gpus=0)
    domains.close()
    found = find_reference(
        options.checkpoint, step=options.iteration, verified=False, say=_warn, name="--checkpoint"
    )
    check_reference(found, config)


def _rank(options: argparse.Namespace, config: Config, out: Path) -> NoReturn:
    """Be one rank, and leave the process with its exit code."""
    from megatron.training.program import be_rank, sole_use

    def body(stop: StopFlag) -> int:
        with sole_use(out):
            return _score(options, config, out, stop)

    be_rank(body)


def _score(options: argparse.Namespace, config: Config, out: Path, stop: StopFlag) -> int:
    from megatron.engine.runtime import start_runtime
    from megatron.training.program import console
    from megatron.training.reference_options import open_for_scoring
    from megatron.training.scoring import ScoreRequest, score

    runtime = start_runtime(deterministic=config.training.deterministic)
    gpus = 1 if runtime.device.type == "cuda" else 0
    config, domains = open_for_scoring(config, world_size=runtime.world_size, gpus=gpus)
    request = ScoreRequest(
        checkpoint=str(options.checkpoint),
        out=str(out),
        step=options.iteration,
        epochs=options.epochs,
        domains=tuple(options.domains),
    )

    try:
        return score(config, domains, runtime, stop, request, console(runtime.rank))
    finally:
        domains.close()


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
