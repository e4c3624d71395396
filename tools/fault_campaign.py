"""Break runs on purpose, row by row of the fault table: ``tools/fault_campaign.py [--column ci]``.

The rows are code of the tests, so this needs a checkout and what the tests need
(``make test`` installs it).  ``docs/reliability.md`` holds the table and its figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fault_campaign.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
BLOCK = "<!-- fault table -->\n", "<!-- end of fault table -->\n"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megatron.errors import ConfigError, did_you_mean, run_command  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows that are asked for and not done yet; return 1 if one falls short."""
    options = _parser().parse_args(arguments)
    try:
        from support.campaign.catalogue import ROWS
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the fault campaign needs the tests of a checkout and their libraries: {error}; "
            "run `make test` once"
        ) from error
    known = {row.name: row for row in ROWS}
    if options.write_docs:
        return _write_docs(Path(options.json or RESULTS))
    for name in options.rows or ():
        if name not in known:
            raise ConfigError(f"there is no row '{name}'{did_you_mean(name, known)}")
    names = options.rows or list(known)
    if options.only:
        return _only(names[0], options)
    file = Path(options.json) if options.json else None
    done = _read(file, options)
    wanted = [name for name in names if name not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, result in zip(
            wanted, pool.map(lambda name: _child(name, options), wanted), strict=True
        ):
            done[name] = result
            print(_line(result), flush=True)
            _write(file, options, done)
    rows = [done[name] for name in known if name in done]
    print("\n" + table(rows), end="")
    if file is not None:
        _write(file, options, done)
    return 0 if all(done[name]["passed"] for name in names) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/fault_campaign.py",
        description="Break runs on purpose, row by row of the fault table.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--column", choices=("ci", "release"), default="ci", help="how many trials (default: ci)"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="R1 R2 …; all if not given")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="where results go, and a table beside it (.md); rows that are there are not run again",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time")
    parser.add_argument("--trials", type=int, metavar="N", help="instead of the column's number")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N",
        help="begin no further trial of a row after that; the table says how many were made",
    )  # fmt: skip
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="write the file's figures into docs/reliability.md",
    )
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    return parser


def _only(name: str, options: argparse.Namespace) -> int:
    """Run one row in this process and write its result, as JSON, to the file given."""
    from support.campaign.catalogue import row as find
    from support.campaign.row import Bench, complete, run_row
    from support.pool import RankPools

    row, pools = find(name), RankPools()
    wanted = row.trials(options.column) if options.trials is None else options.trials
    with tempfile.TemporaryDirectory(prefix=f"campaign-{name}-") as folder:
        bench = Bench(
            folder=Path(folder),
            seed=options.seed,
            row=name,
            column=options.column,
            pools=pools,
            minutes=options.minutes,
        )
        tally = run_row(row, bench, wanted)
    pools.close()
    result = {
        **asdict(tally),
        "seconds": round(tally.seconds, 1),
        "fault": row.fault,
        "criterion": row.criterion,
        "wanted": row.trials(options.column),
        "seed": options.seed,
        "passed": tally.passed(row),
        "complete": complete(row, tally, options.column),
    }
    Path(options.json).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one row in a process of its own: what it leaves behind is gone with it."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        file, log = Path(folder) / "result.json", Path(folder) / "log"
        words = ["--only", "--rows", name, "--column", options.column, "--json", str(file)]
        words += ["--seed", str(options.seed)]
        words += ["--minutes", str(options.minutes)]
        words += [] if options.trials is None else ["--trials", str(options.trials)]
        with log.open("wb") as output:
            done = subprocess.run(
                [sys.executable, __file__, *words], stdout=output, stderr=output, check=False
            )
        if done.returncode or not file.exists():
            text = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise ConfigError(f"row {name} could not be run (exit code {done.returncode}):\n{text}")
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result


def _read(file: Path | None, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the rows of an earlier call with the same column and seed that passed."""
    if file is None or not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("column") != options.column:
        raise ConfigError(
            f"{file} holds the column '{content.get('column')}'; name another file, or remove it"
        )
    kept = options.rows or ()
    return {
        name: row
        for name, row in content["rows"].items()
        if (row["passed"] and row["complete"] and row["seed"] == options.seed)
        or (kept and name not in kept)
    }


def _write(file: Path | None, options: argparse.Namespace, done: Mapping[str, Any]) -> None:
    if file is None:
        return
    content = {"column": options.column, "machine": _machine(), "rows": dict(done)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    ordered = sorted(done.values(), key=lambda row: int(row["row"][1:]))
    file.with_suffix(".md").write_text(
        f"# Fault campaign, {options.column} column\n\n"
        f"`python tools/fault_campaign.py --column {options.column} --json FILE`\n"
        f"on {_machine()}.\n\n" + table(ordered),
        encoding="utf-8",
    )


def _machine() -> str:
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| row | fault | trials | failures | criterion | result | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['row']} | {row['fault']} | {row['trials']:,}"
        f"{_of(row)} | {row['failures']} | "
        f"{row['criterion']} | {_result(row)} | {row['seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def with_table(text: str, content: Mapping[str, Any]) -> str:
    """Return a document with the figures of a results file between its two marks."""
    before, _, rest = text.partition(BLOCK[0])
    _, _, after = rest.partition(BLOCK[1])
    lines = [
        "| row | fault | must hold | trials | failures | result |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(content["rows"].values(), key=lambda row: int(row["row"][1:])):
        lines.append(
            f"| {row['row']} | {row['fault']} | {row['criterion']} | {row['trials']:,}{_of(row)} | "
            f"{row['failures']} | {_result(row)} |"
        )
    return before + BLOCK[0] + "\n" + "\n".join(lines) + "\n\n" + BLOCK[1] + after


def _write_docs(file: Path) -> int:
    content = json.loads(file.read_text(encoding="utf-8"))
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(with_table(text, content), encoding="utf-8")
    print(DOCUMENT)
    return 0


def _of(row: Mapping[str, Any]) -> str:
    return "" if row["complete"] else f" of {row['wanted'] or 'all'}"


def _result(row: Mapping[str, Any]) -> str:
    if row["skipped"]:
        return f"not run: {row['skipped']}"
    if not row["passed"]:
        return "**fail**"
    return "pass" if row["complete"] else "no failure yet"


def _line(row: Mapping[str, Any]) -> str:
    told = "".join(f"\n    {line}" for text in row["told"][:3] for line in text.splitlines())
    return (
        f"{row['row']}: {row['trials']:,} trials, {row['failures']} failures, {_result(row)}, "
        f"{row['seconds']:.0f} s{told}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
