"""Say what the files of a checkpoint hold, or where two checkpoints differ.

    tools/inspect_checkpoints.py runs/mine/checkpoints/global_step500
    tools/inspect_checkpoints.py DIR --attributes module/1.attention.dense.weight iteration
    tools/inspect_checkpoints.py DIR,DIR2 --diff

DIR may be a checkpoint of ours or of GPT-NeoX, its universal form, or a Hugging Face folder.
Pickled files are looked at before they are read, and one that would run something is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, and print."""
    parser = argparse.ArgumentParser(
        prog="tools/inspect_checkpoints.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="DIR[,DIR2]", help="one checkpoint, or two")
    parser.add_argument(
        "--attributes", nargs="+", default=[], metavar="A/B",
        help="only what lies under these names: a file, keys in it, or a part of such a path",
    )  # fmt: skip
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="open Python with `content` (and `other`)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "-c", "--compare", action="store_true", help="of two: where names, types or shapes differ"
    )
    how.add_argument("-d", "--diff", action="store_true", help="of two: where values differ, too")
    options = parser.parse_args(arguments)
    folders = [Path(name) for name in options.folders.split(",") if name]
    compares = options.compare or options.diff
    if len(folders) not in (1, 2) or (compares and len(folders) == 1):
        raise ConfigError("give one folder, or two with a comma between them and -c or -d")
    from megatron.exchange import inspection

    content = [inspection.read_folder(folder) for folder in folders]
    if options.interactive:
        _interact(content)
        return 0
    if len(content) == 1:
        for name, value in inspection.select(content[0], options.attributes):
            print(f"{name}: {inspection.describe_value(value)}")
        return 0
    one, other = content
    found = inspection.differences(one, other, options.attributes, values=not options.compare)
    lines = list(found)
    print("\n".join(lines) or "no difference")
    return 1 if lines else 0


def _interact(content: list[dict[str, object]]) -> None:
    import code

    names = dict(zip(("content", "other"), content, strict=False))
    code.interact(banner=f"{', '.join(names)}: by file", local=names, exitmsg="")


if __name__ == "__main__":
    sys.exit(run_command(main))
