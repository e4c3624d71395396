#!/usr/bin/env python3
"""Write docs/configuration.md, docs/schema.json and docs/neox_parity.md from the code.

The figures of README.md and docs/performance.md are written anew from benchmarks/results/*.json.

``--check`` writes nothing and exits with 1 if one of them is stale.  ``--simulate`` also runs
every mixing method in the simulator (minutes) and writes its table and plot into docs/mixing.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIMULATED_STEPS = 10_000
BLOCK_START, BLOCK_END = "<!-- simulation -->", "<!-- end of simulation -->"
sys.path.insert(0, str(ROOT))

from megatron.errors import run_command  # noqa: E402


def documents() -> dict[str, str]:
    """Return the generated documents by path, relative to the repository."""
    import megatron.mixing  # noqa: F401  (registers the methods that are documented)
    from benchmarks.support.tables import DOCUMENTS, with_figures
    from megatron.config.parity_page import parity_page
    from megatron.config.reference import reference
    from megatron.config.schema import json_schema

    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    return {
        "docs/configuration.md": reference(),
        "docs/schema.json": schema,
        "docs/neox_parity.md": parity_page(ROOT),
        **{name: with_figures((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS},
    }


def simulation() -> dict[str, str]:
    """Run the simulator and return the documents that show it, by path."""
    from megatron.mixing.regret import as_table, compare
    from megatron.mixing.regret_plot import plot

    entries = compare(steps=SIMULATED_STEPS)
    path = ROOT / "docs/mixing.md"
    before, rest = path.read_text(encoding="utf-8").split(BLOCK_START)
    after = rest.split(BLOCK_END)[1]
    block = f"{BLOCK_START}\n{as_table(entries)}\n{BLOCK_END}"
    return {
        "docs/mixing.md": before + block + after,
        "docs/images/mixing_simulation.svg": plot(entries, world="transfer"),
    }


def main() -> int:
    """Write or check the documents."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="only tell whether they are stale")
    parser.add_argument("--simulate", action="store_true", help="run the mixing simulator too")
    arguments = parser.parse_args()
    check = arguments.check
    stale = []
    for name, text in (documents() | (simulation() if arguments.simulate else {})).items():
        path = ROOT / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name} is stale: run tools/generate_docs.py" if check else f"wrote {name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
