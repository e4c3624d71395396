"""The figures of benchmarks/results as the documents show them.

``tools/generate_docs.py`` puts each block between ``<!-- figures: NAME -->`` and
``<!-- end of figures -->`` of README.md and docs/performance.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.support import tool_tables
from benchmarks.support.markdown import read, table, where
from benchmarks.support.measure import RESULTS, shown

DOCUMENTS = ("README.md", "docs/performance.md")
_COMPILED = "time_over_ours_compiled"
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
        "output_loss": _output_loss,
        "products": _products,
        "tokenize": tool_tables.tokenize,
        "startup": tool_tables.startup,
        "opening": tool_tables.opening,
        "study_start": tool_tables.study_start,
        "selection": tool_tables.selection,
        "memory": tool_tables.memory,
    }
    return _BLOCK.sub(
        lambda found: f"{found[1]}{blocks[found[2]](folder)}{found[3]}",
        text,
    )


def _overview(folder: Path) -> str:
    rows = [(row["what"], row["figure"]) for row in read(folder, "earlier")["rows"]]
    rows += tool_tables.overview(folder)
    train = _by_type(read(folder, "train"))
    peer = "transformers, compiled"
    rows.append(
        (
            "a training step of Hugging Face's GPT-NeoX (SDPA, `torch.compile`, fused AdamW) "
            "÷ ours with `torch_compile`, same weights and data, "
            f"{_size(train['fp32'])}, one thread: fp32; bf16",
            "; ".join(
                f"{shown(train[name]['contestants'][peer][_COMPILED]['processor'])} ×"
                for name in ("fp32", "bf16")
            ),
        )
    )
    at22 = next(one for one in read(folder, "mixing")["results"] if one["domains"] == 22)
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
    loader = read(folder, "loader")["results"]
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
    return table(("what", "figure"), rows)


def _train(folder: Path) -> str:
    rows = []
    for result in read(folder, "train")["results"]:
        for name, row in result["contestants"].items():
            times, ours = row["time_over_ours"], name == "neomix"
            kept = row.get("saved_bytes_per_token", row.get("peak_bytes_per_token"))
            rows.append(
                (
                    f"{result['architecture']}, {_size(result)}, {result['dtype']}",
                    name,
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['share_of_gemm']:.0%}",
                    "1" if ours else shown(times["processor"]),
                    "1" if ours else shown(times["wall"]),
                    shown(row[_COMPILED]["processor"]) if _COMPILED in row else "",
                    "" if ours else f"{row['losses_differ_by']:.0e}",
                    f"{kept / 1e3:.0f} kB",
                )
            )
    head = (
        "what",
        "system",
        "tokens/s",
        "share of GEMM",
        "time ÷ neomix, processor",
        "time ÷ neomix, clock",
        "time ÷ neomix compiled, processor",
        "largest difference of losses",
        "memory, a token",
    )
    return table(head, rows) + where(read(folder, "train"))


def _mixing(folder: Path) -> str:
    content = read(folder, "mixing")
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
    return table(head, rows) + where(content)


def _loader(folder: Path) -> str:
    content = read(folder, "loader")
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
    return table(head, rows) + where(content)


def _checkpoint(folder: Path) -> str:
    content = read(folder, "checkpoint")
    rows = []
    for name, row in content["results"].items():
        done = [what for what in ("hashed", "synced") if row[what]]
        rows.append(
            (
                name,
                ", ".join(done) or "–",
                f"{row['total_seconds']:.2f} s",
                f"{row['stall_seconds']:.2f} s",
                f"{row['processor_seconds']:.2f} s",
                f"{row['gigabytes_per_second']:.2f} GB/s",
                shown(row["time_over_ours"]["wall"]) if name != "neomix" else "1",
            )
        )
    head = ("system", "when done", "total", "stall", "processor", "rate", "total ÷ ours")
    return table(head, rows) + where(content)


def _generate(folder: Path) -> str:
    content = read(folder, "generate")
    rows = [
        (
            str(result["rows"]),
            *(f"{rate:,.0f}" for rate in result["tokens_per_second"].values()),
            shown(result["time_over_ours"]["processor"]),
        )
        for result in content["results"]
    ]
    head = ("rows", "neomix, tokens/s", "transformers, tokens/s", "transformers' time ÷ ours")
    return table(head, rows) + where(content)


def _output_loss(folder: Path) -> str:
    content = read(folder, "output_loss")
    rows = [
        (
            result["dtype"],
            f"{result['vocabulary']:,}",
            name,
            f"{row['milliseconds']:,.0f} ms",
            "1" if name == "neomix" else shown(row["time_over_ours"]["processor"]),
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        )
        for result in content["results"]
        for name, row in result["contestants"].items()
    ]
    head = ("type", "V", "system", "processor time", "time ÷ ours", "most memory")
    return table(head, rows) + where(content)


def _products(folder: Path) -> str:
    content = read(folder, "products")
    rows = [
        (
            f"{result['inputs']:,} → {result['outputs']:,}",
            result["what"],
            f"{result['gflops']['neomix']:,.0f}",
            f"{result['gflops']['torch']:,.0f}",
            shown(result["time_over_ours"]["processor"]),
        )
        for result in content["results"]
    ]
    head = ("layer", "product", "neomix, GFLOP/s", "torch, GFLOP/s", "torch's time ÷ ours")
    return table(head, rows) + where(content)


def _methods(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in result["methods"].items() if name != "static again"}


def _by_type(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first result of each type against GPT-NeoX."""
    found: dict[str, Any] = {}
    for result in content["results"]:
        if result["architecture"] == "GPT-NeoX":
            found.setdefault(result["dtype"], result)
    return found


def _size(result: Mapping[str, Any]) -> str:
    shape = result["shape"]
    times = "" if shape["accumulate"] == 1 else f"{shape['accumulate']} × "
    device = "" if result["device"] == "cpu" else f" on {result['device']}"
    return (
        f"{result['parameters'] / 1e6:.0f}M parameters, {times}{shape['batch']} × "
        f"{shape['sequence']} tokens a step{device}"
    )
