"""The figures of benchmarks/results as the documents show them.

``tools/generate_docs.py`` puts each block between ``<!-- figures: NAME -->`` and
``<!-- end of figures -->`` of README.md and docs/performance.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.measure import RESULTS, shown

DOCUMENTS = ("README.md", "docs/performance.md")
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def with_figures(text: str, folder: Path = RESULTS) -> str:
    """Return a document with its blocks of figures made anew."""
    blocks = {
        "overview": _overview,
        "train": _train,
        "mixing": _mixing,
        "loader": _loader,
        "checkpoint": _checkpoint,
        "generate": _generate,
    }
    return _BLOCK.sub(
        lambda found: f"{found[1]}{blocks[found[2]](folder)}{found[3]}",
        text,
    )


def _overview(folder: Path) -> str:
    rows = [(row["what"], row["figure"]) for row in _read(folder, "earlier")["rows"]]
    train = _by_type(_read(folder, "train"))
    peer = "transformers, compiled"
    rows.append(
        (
            "a training step of Hugging Face's GPT-NeoX (SDPA, `torch.compile`, fused AdamW) "
            f"÷ ours, same weights and data, {_size(train['fp32'])}, one thread: fp32; bf16",
            "; ".join(
                f"{shown(train[name]['contestants'][peer]['time_over_ours']['processor'])} ×"
                for name in ("fp32", "bf16")
            ),
        )
    )
    at22 = next(one for one in _read(folder, "mixing")["results"] if one["domains"] == 22)
    costs = {name: row["cost_of_100_ms"] for name, row in _methods(at22).items()}
    dearest = max(costs, key=lambda name: costs[name])
    syncs = max(row["syncs_more"] for row in _methods(at22).values())
    rows.append(
        (
            "what mixing online adds to a step of 100 ms on 22 domains: the dearest method; "
            "waits for the device",
            f"{costs[dearest]:.2%} (`{dearest}`); {syncs}",
        )
    )
    loader = _read(folder, "loader")["results"]
    rows.append(
        (
            "micro-batches from shuffled domains, processor time of megatron-core's blended "
            "dataset ÷ ours; of Hugging Face `datasets` ÷ ours",
            "; ".join(
                f"{shown(loader[name]['time_over_ours']['processor'], 1)} ×"
                for name in ("megatron-core", "Hugging Face datasets")
            ),
        )
    )
    return _table(("what", "figure"), rows)


def _train(folder: Path) -> str:
    rows = []
    for result in _read(folder, "train")["results"]:
        for name, row in result["contestants"].items():
            times = row["time_over_ours"]
            rows.append(
                (
                    result["dtype"],
                    name,
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['share_of_gemm']:.0%}",
                    shown(times["processor"]) if name != "neomix" else "1",
                    shown(times["wall"]) if name != "neomix" else "1",
                    f"{row['losses_differ_by']:.0e}" if name != "neomix" else "",
                    f"{row['saved_bytes_per_token'] / 1e3:.0f} kB",
                )
            )
    head = (
        "type",
        "system",
        "tokens/s",
        "share of GEMM",
        "time ÷ ours, processor",
        "time ÷ ours, clock",
        "largest difference of losses",
        "kept for backward, a token",
    )
    return _table(head, rows) + _where(_read(folder, "train"))


def _mixing(folder: Path) -> str:
    content = _read(folder, "mixing")
    rows = []
    for result in sorted(content["results"], key=lambda one: int(one["domains"])):
        for name, row in result["methods"].items():
            every = row["now_and_then_every"]
            rows.append(
                (
                    f"{result['domains']:,}",
                    name,
                    shown(row["step"]["processor"], 3),
                    f"{row['extra_ms']['median']:+.2f} ms",
                    f"{row['now_and_then_ms']:,.0f} ms in {every:,}" if every else "",
                    f"{row['cost']:+.2%}",
                    f"{row['cost_of_100_ms']:+.2%}",
                    f"{row['syncs_more']:+d}",
                )
            )
    head = (
        "K",
        "method",
        "step ÷ static, processor",
        "more, every step",
        "more, once in steps",
        "of this step",
        "of 100 ms",
        "syncs",
    )
    return _table(head, rows) + _where(content)


def _loader(folder: Path) -> str:
    content = _read(folder, "loader")
    rows = [
        (
            name,
            f"{1e3 * row['built_seconds']:,.0f} ms",
            f"{row['microseconds_a_sample']:.0f} µs",
            shown(row["time_over_ours"]["processor"]) if name != "neomix" else "1",
        )
        for name, row in content["results"].items()
    ]
    head = ("system", "building", "processor time a sample", "time ÷ ours")
    return _table(head, rows) + _where(content)


def _checkpoint(folder: Path) -> str:
    content = _read(folder, "checkpoint")
    rows = [
        (
            name,
            f"{row['total_seconds']:.2f} s",
            f"{row['stall_seconds']:.2f} s",
            f"{row['gigabytes_per_second']:.2f} GB/s",
            shown(row["time_over_ours"]["wall"]) if name != "neomix" else "1",
        )
        for name, row in content["results"].items()
    ]
    head = ("system", "total", "stall", "rate", "total ÷ ours")
    return _table(head, rows) + _where(content)


def _generate(folder: Path) -> str:
    content = _read(folder, "generate")
    rows = [
        (
            str(result["rows"]),
            *(f"{rate:,.0f}" for rate in result["tokens_per_second"].values()),
            shown(result["time_over_ours"]["processor"]),
        )
        for result in content["results"]
    ]
    head = ("rows", "neomix, tokens/s", "transformers, tokens/s", "transformers' time ÷ ours")
    return _table(head, rows) + _where(content)


def _where(content: Mapping[str, Any]) -> str:
    at = content["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in at["packages"].items())
    return (
        f"\n{at['date']}, {at['processor']}, {at['threads']} thread, {versions}; "
        f"`{content['command']}`. Processes that wanted a core at the end: {at['load'][0]:.0f} "
        "(the machine was shared, so processor time is what to compare).\n"
    )


def _methods(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in result["methods"].items() if name != "static again"}


def _by_type(content: Mapping[str, Any]) -> dict[str, Any]:
    return {result["dtype"]: result for result in content["results"]}


def _size(result: Mapping[str, Any]) -> str:
    shape = result["shape"]
    return (
        f"{result['parameters'] / 1e6:.0f}M parameters, {shape['batch']} × "
        f"{shape['sequence']} tokens a step"
    )


def _read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines)
        .replace("| --- ", "|---")
        .replace("|--- |", "|---|")
    )
