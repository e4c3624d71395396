"""Publish a model on the Hugging Face hub.

    tools/upload.py mine-hf my-name/mine main

CKPT is a Hugging Face folder, as `tools/convert_checkpoint.py --to hf` writes it.  The repository
and the branch are made where they are missing; all files go up as one commit.  The token is that
of HF_TOKEN or of `hf auth login`; HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and upload."""
    parser = argparse.ArgumentParser(
        prog="tools/upload.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="CKPT", type=Path, help="the Hugging Face folder")
    parser.add_argument("repository", metavar="REPO", help="name, or organisation/name")
    parser.add_argument("branch", metavar="BRANCH", nargs="?", default="main", help="default: main")
    parser.add_argument("--private", action="store_true", help="a repository made here is private")
    parser.add_argument("--message", metavar="TEXT", default="Upload model", help="of the commit")
    options = parser.parse_args(arguments)
    from megatron.exchange.upload import upload

    folder, repository, branch = options.folder, options.repository, options.branch
    print(upload(folder, repository, branch, private=options.private, message=options.message))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
