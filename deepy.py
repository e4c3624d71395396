#!/usr/bin/env python3
"""Start a run: ``./deepy.py train.py CONFIG [CONFIG…] [-d DIR] [--set key=value …]``.

Reads and checks the configuration, locks the run folder, starts the ranks through
DeepSpeed's launcher and stays their parent until they have ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.config import Config
    from megatron.launch.command import LaunchPlan
    from megatron.launch.remote import RemotePlan
    from megatron.launch.request import LaunchRequest

ROOT = Path(__file__).resolve().parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"
REEXEC_VARIABLE = "NEOMIX_REEXEC"

# (module, how it is called) that every action needs, and that a launch needs beside.
BASE_MODULES = (("numpy", "NumPy"), ("pydantic", "pydantic"), ("yaml", "PyYAML"))
LAUNCH_MODULES = (("torch", "torch"), ("deepspeed", "deepspeed"))

# GPT-NeoX's own flags that are other spellings of configuration keys.
KEY_FLAGS = ("hostfile", "wandb_group", "wandb_team", "wandb_run_name")

# Flags of evaluate.py and generate.py, which are keys, too: (flags, key, what argparse is told).
USING_FLAGS: tuple[tuple[tuple[str, ...], str, dict[str, Any]], ...] = (
    (("--iteration",), "iteration", {"type": int, "metavar": "N", "help": "which checkpoint"}),
    (
        ("--eval_tasks",),
        "eval_tasks",
        {"nargs": "+", "metavar": "TASK", "help": "tasks of lm-eval; * and ? match any name"},
    ),
    (
        ("--eval_results_prefix",),
        "eval_results_prefix",
        {"metavar": "PATH", "help": "beginning of the path of evaluate.py's results"},
    ),
    (
        ("--eval_include_path",),
        "eval_include_path",
        {"nargs": "+", "metavar": "DIR", "help": "folders with task files of your own"},
    ),
    (
        ("--eval_num_fewshot",),
        "eval_num_fewshot",
        {"type": int, "metavar": "N", "help": "examples before every question"},
    ),
    (
        ("--eval_limit",),
        "eval_limit",
        {"type": float, "metavar": "N", "help": "questions per task, or a share of them"},
    ),
    (
        ("--eval_perplexity",),
        "eval_perplexity",
        {"choices": ("valid", "test"), "help": "also measure every domain's loss on this split"},
    ),
    (
        ("--all-checkpoints",),
        "eval_all_checkpoints",
        {"action": "store_true", "help": "evaluate every checkpoint of the run, as a table"},
    ),
    (
        ("-i", "--sample_input_file"),
        "sample_input_file",
        {"metavar": "FILE", "help": "prompts for generate.py"},
    ),
    (
        ("-o", "--sample_output_file"),
        "sample_output_file",
        {"metavar": "FILE", "help": "where generate.py writes"},
    ),
)

# Programs that look at a model, and their folders in the run's.
USES = {"evaluate.py": "evaluation", "generate.py": "generation"}

# The flags of --sbatch: (flag, metavar, help).
SBATCH_FLAGS = (
    ("--time", "LIMIT", "time limit of the job, such as 12:00:00"),
    ("--partition", "NAME", "partition of the job (default: the cluster's)"),
    ("--sbatch-args", "FLAGS", "more flags in one word, such as '--qos=high --mem=0'"),
)

# The flags of --plan: (flag, type, metavar, help).
PLAN_FLAGS = (
    ("--world-size", int, "N", "ranks to plan for (default: those a launch would start)"),
    ("--device-memory", float, "GIB", "memory of one device (default: 80; of a CPU its share)"),
    ("--peak-tflops", float, "X", "of one device (default: peak_theoretical_tflops, or 989)"),
    ("--utilisation", float, "SHARE", "of that peak, reached over the run (default: 0.4)"),
    ("--tokens", float, "N", "to train on, such as 300e9 (default: those of train_iters)"),
    ("--ranks-per-node", int, "N", "devices of one node (default: num_gpus, or 8)"),
    ("--bandwidth", float, "GB/S", "that one rank sends; adds the time of communication"),
)

EXIT_CODES = """exit codes:
  0    the run is complete (or the check passed)
  2    something in the configuration, the data or the machine needs your attention
  143  saved and stopped after SIGTERM, SIGUSR1 or Ctrl-C: run it again to go on
  137  killed, because saving took longer than save_timeout
  any other code is that of the first rank that failed"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="deepy.py",
        description="Start a run, or check what it would do.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("user_script", metavar="SCRIPT", help="the program to run, e.g. train.py")
    parser.add_argument(
        "conf_file",
        metavar="CONFIG",
        nargs="*",
        help="configuration files, merged; '.yml' may be left out",
    )
    parser.add_argument("-d", "--conf_dir", metavar="DIR", help="folder of the configuration files")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="set a key, over the files (several may follow, or repeat the flag)",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--check",
        action="store_true",
        help="open and check all that the run needs, print its arithmetic, and start nothing",
    )
    action.add_argument(
        "--plan",
        action="store_true",
        help="work out memory, communication and time on any number of ranks, and start nothing",
    )
    action.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    action.add_argument("--dry-run", action="store_true", help="print the launch command and stop")
    action.add_argument(
        "--sbatch", action="store_true", help="print a job script for Slurm and stop"
    )
    planning = parser.add_argument_group("with --plan")
    for flag, kind, metavar, text in PLAN_FLAGS:
        planning.add_argument(flag, type=kind, metavar=metavar, help=text)
    scheduling = parser.add_argument_group("with --sbatch")
    for flag, metavar, text in SBATCH_FLAGS:
        scheduling.add_argument(flag, metavar=metavar, help=text)
    parser.add_argument("-H", "--hostfile", metavar="FILE", help="hosts and slots (key hostfile)")
    parser.add_argument("--wandb_group", metavar="NAME", help="key wandb_group")
    parser.add_argument("--wandb_team", metavar="NAME", help="key wandb_team")
    parser.add_argument("--wandb_run_name", metavar="NAME", help="key wandb_run_name")
    using = parser.add_argument_group("for evaluate.py and generate.py (keys of the configuration)")
    for flags, key, options in USING_FLAGS:
        using.add_argument(*flags, dest=key, **options)
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse a command line; flags and files may come in any order."""
    parser = build_parser()
    arguments = parser.parse_intermixed_args(spread_set(argv))
    for action, flags in (("plan", PLAN_FLAGS), ("sbatch", SBATCH_FLAGS)):
        for flag, *_ in flags:
            given = getattr(arguments, flag[2:].replace("-", "_")) is not None
            if given and not getattr(arguments, action):
                parser.error(f"{flag} belongs to --{action}")
    for key in KEY_FLAGS:
        if getattr(arguments, key) is not None:
            arguments.overrides.append(f"{key}={getattr(arguments, key)}")
    for _, key, _ in USING_FLAGS:
        value = getattr(arguments, key)
        if value is not None and value is not False:
            arguments.overrides.append(f"{key}={json.dumps(value)}")  # JSON is YAML
    return arguments


def spread_set(argv: list[str]) -> list[str]:
    """Turn ``--set a=1 b=2`` into ``--set a=1 --set b=2``; the first word without = ends it."""
    spread: list[str] = []
    inside = False
    for word in argv:
        if inside and re.match(r"[A-Za-z_][\w.-]*=", word):
            if spread[-1] != "--set":
                spread.append("--set")
        elif word != "--set":
            inside = False
        spread.append(word)
        inside = inside or word == "--set"
    return spread


def missing_modules(*, launching: bool) -> list[str]:
    """Return the names of the libraries that this Python lacks (none is imported)."""
    wanted = BASE_MODULES + (LAUNCH_MODULES if launching else ())
    return [name for module, name in wanted if importlib.util.find_spec(module) is None]


def ensure_dependencies(argv: list[str], *, launching: bool) -> None:
    """Go on in the project's virtual environment if this Python lacks the libraries.

    A Python that could check a configuration but not run it hands over as well: what it would
    print of interpreters, tokenizers and devices is not what the run would meet.
    Ends with code 2 and one message if there is no environment and something needed is missing.
    """
    missing = missing_modules(launching=launching)
    if sys.version_info < (3, 11):  # noqa: UP036  (whatever 'env python3' may find)
        missing.insert(0, "Python 3.11 or newer")
    if not missing and not missing_modules(launching=True):
        return
    tried = os.environ.get(REEXEC_VARIABLE) == str(os.getpid())
    if VENV_PYTHON.exists() and not tried:
        sys.stdout.flush()
        os.environ[REEXEC_VARIABLE] = str(os.getpid())  # exec keeps the pid: no second try
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), str(ROOT / "deepy.py"), *argv])
    if not missing:
        return
    remedy = (
        f"its installation in {VENV_PYTHON.parents[1]} is incomplete: run 'make install' again"
        if VENV_PYTHON.exists()
        else "run 'make install' first (it makes .venv beside deepy.py, which is then used "
        "by itself), or activate the environment that has them"
    )
    print(f"error: {sys.executable} lacks {', '.join(missing)}; {remedy}", file=sys.stderr)
    sys.exit(2)


def find_script(name: str) -> Path:
    """Return the path of the program to run: as given, or beside ``deepy.py``."""
    from megatron.errors import ConfigError, did_you_mean

    for candidate in (Path(name), ROOT / name):
        if candidate.is_file():
            return candidate.resolve()
    scripts = [path.name for path in ROOT.glob("*.py") if path.name != "deepy.py"]
    raise ConfigError(f"there is no program {name!r} to run{did_you_mean(name, scripts)}")


def main(argv: list[str]) -> int:
    """Do what the command line asks for and return the exit code."""
    arguments = parse_arguments(argv)
    actions = ("check", "plan", "print_config", "dry_run", "sbatch")
    launching = not any(getattr(arguments, action) for action in actions)
    ensure_dependencies(argv, launching=launching)

    import megatron.mixing  # noqa: F401  (registers the methods that a configuration may name)
    from megatron.config import load_config
    from megatron.launch.command import RESOLVED_CONFIG_FLAG, encode_config, plan_launch
    from megatron.launch.request import LAUNCH_KEYS, LaunchRequest, missing_hostfile

    script = find_script(arguments.user_script)
    config = load_config(
        arguments.conf_file, conf_dir=arguments.conf_dir, overrides=arguments.overrides
    )
    if arguments.print_config:
        print(config.resolved_yaml(), end="")
        return 0
    request = LaunchRequest(**{key: getattr(config.launch, key) for key in LAUNCH_KEYS})
    if (note := missing_hostfile(request)) is not None:
        print(f"note: {note}", file=sys.stderr)
    if arguments.plan:
        from megatron.training.plan.command import plan as plan_run

        return plan_run(config, arguments, launched=lambda: plan_launch(script, [], request))
    if arguments.sbatch:
        print(job_script(script, arguments, request, config), end="")
        return 0
    run_dir = Path(config.checkpoint.run_dir)
    uses = script.name if script.parent == ROOT and script.name in USES else None
    if uses is not None:
        # Beside the run itself, which may be training meanwhile.
        run_dir = run_dir / USES[uses]
    log_dir = Path(config.logging.log_dir) if config.logging.log_dir else run_dir / "logs"
    plan = plan_launch(
        script,
        [RESOLVED_CONFIG_FLAG, encode_config(config.resolved_yaml())],
        request,
        log_dir=log_dir,
        save_timeout=config.checkpoint.save_timeout,
    )
    if arguments.check and uses is None:
        from megatron.training.check import check

        return check(config, world_size=plan.ranks, gpus=plan.gpus)
    if arguments.dry_run:
        print(plan.shell())
        return 0

    if uses is not None:
        return use_model(uses, config, plan, run_dir, log_dir, check=arguments.check)

    from megatron.launch.start import start
    from megatron.training.check import preflight

    preflight(config, world_size=plan.ranks, gpus=plan.gpus).domains.close()
    return start(plan, run_dir, log_dir, save_timeout=config.checkpoint.save_timeout)


def use_model(
    script: str,
    config: Config,
    plan: LaunchPlan | RemotePlan,
    folder: Path,
    log_dir: Path,
    *,
    check: bool,
) -> int:
    """Start the ranks of a program that looks at a model, or check that they could start."""
    from megatron.errors import ConfigError
    from megatron.launch.command import LaunchPlan
    from megatron.launch.keyboard import passed_on
    from megatron.launch.start import start
    from megatron.training.inference_options import preflight_inference

    preflight_inference(config, world_size=plan.ranks, gpus=plan.gpus, script=script)
    if check:
        print(f"check: everything that {script} needs is there")
        return 0
    typed = script == "generate.py" and config.generation.text_gen_type == "interactive"
    if not typed:
        return start(plan, folder, log_dir, save_timeout=config.checkpoint.save_timeout)
    if not isinstance(plan, LaunchPlan):
        raise ConfigError(
            "text_gen_type: interactive needs its ranks on this machine; use input-file, or "
            "launcher: local"
        )
    with passed_on(folder):
        return start(plan, folder, log_dir, save_timeout=config.checkpoint.save_timeout)


def job_script(
    script: Path, arguments: argparse.Namespace, request: LaunchRequest, config: Config
) -> str:
    """Return a Slurm job script that does what this command line would do."""
    from megatron.launch.sbatch import JobOptions, sbatch_script

    words = [str(script), *arguments.conf_file]
    if arguments.conf_dir:
        words += ["-d", str(Path(arguments.conf_dir).absolute())]
    for override in arguments.overrides:
        words += ["--set", override]
    run_dir = Path(config.checkpoint.run_dir).absolute()
    options = JobOptions(
        name=run_dir.name,
        output=Path("slurm-%j.out"),
        save_timeout=config.checkpoint.save_timeout,
        partition=arguments.partition,
        time=arguments.time,
        further=arguments.sbatch_args,
    )
    return sbatch_script(words, request, options)


def console_script() -> int:
    """Run as an installed command."""
    from megatron.errors import run_command

    return run_command(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(console_script())
