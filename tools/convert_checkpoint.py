"""Convert a checkpoint so that a run of any layout can start from it.

    tools/convert_checkpoint.py --input runs/mine --output runs/mine-universal
    tools/convert_checkpoint.py --input runs/mine --info

The result is in DeepSpeed's universal format, with the state of data and mixing.  A run starts
from it with ``load: runs/mine-universal`` and ``load_universal: true``, whatever its number of
data, tensor and pipeline ranks and its ZeRO stage.  (A run that resumes its own checkpoint in
another layout does all this by itself.)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="tools/convert_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", required=True, metavar="FOLDER", type=Path,
        help="a run's folder, its folder of checkpoints, or one checkpoint",
    )  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: newest)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--output", metavar="FOLDER", type=Path, help="where the universal checkpoint goes"
    )
    what.add_argument("--info", action="store_true", help="say what the checkpoint holds")
    parser.add_argument(
        "--workers", type=_positive, default=1, metavar="N",
        help="processes that convert, each with one rank's part in memory (default: 1)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    # Everything is done on the host; DeepSpeed would look for devices.
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    from megatron.training.convert import choose, convert, describe

    if options.info:
        for line in describe(*choose(options.input, options.step, verified=False, say=_warn)):
            print(line)
        return 0
    path = convert(
        options.input, options.output, step=options.step, workers=options.workers, say=_warn
    )
    print(f"{path}\nload it with load: {options.output} and load_universal: true")
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
