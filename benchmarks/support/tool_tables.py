"""Figures of what stands around training: tokenising, starting, selecting, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.support.markdown import read, table, where
from benchmarks.support.measure import shown

_MIB = 1 << 20
_STATES = {
    "weights": "weights",
    "gradients": "gradients",
    "master": "master weights",
    "moments": "moments",
    "bucket": "bucket",
    "activations": "activations",
}


def overview(folder: Path) -> list[tuple[str, str]]:
    """Return rows of the README's table."""
    results = read(folder, "tokenize")["results"]
    rows = []
    for peer, name in (
        ("GPT-NeoX", "GPT-NeoX's `preprocess_data.py`"),
        ("tokenizers", "a loop of Hugging Face `tokenizers`"),
    ):
        found = [(one["workers"], one["contestants"].get(peer)) for one in results]
        if all(row for _, row in found):
            rows.append(
                (
                    f"tokenising: whole command of {name} ÷ ours, same `tokenizer.json`, identical "
                    f"files: {'; '.join(_workers(count) for count, _ in found)}",
                    "; ".join(
                        f"{shown(row['time_over_ours']['processor'], 1)} ×" for _, row in found
                    ),
                )
            )
    opened = read(folder, "startup")["opening"]
    rows.append(
        (
            "opening a trillion-token domain; its first micro-batch; memory both add",
            f"{_least_to_most(opened, 'open_ms', 1)} ms; {_least_to_most(opened, 'batch_ms', 0)} "
            f"ms; {_most(opened, 'added_bytes') / _MIB:.1f} MiB",
        )
    )
    return rows


def tokenize(folder: Path) -> str:
    """Return the table of ``tokenize.json``."""
    content = read(folder, "tokenize")
    rows = []
    for result in content["results"]:
        for name, row in result["contestants"].items():
            rows.append(
                (
                    str(result["workers"]),
                    name,
                    f"{row['megabytes_per_second']:.1f}",
                    f"{row['start_wall_seconds']:.1f} s",
                    shown(row["megabytes_per_core_second_start_aside"], 1),
                    _ratio(name, row, "processor"),
                    _ratio(name, row, "wall"),
                )
            )
    head = (
        "workers",
        "system",
        "MB/s, whole command",
        "start-up",
        "MB a second of processor, start-up aside",
        "time ÷ ours, processor",
        "time ÷ ours, clock",
    )
    corpus, own = content["corpus"], content["scaling"]["neomix"]
    alone = content["in_memory_megabytes_per_second"]
    text = (
        f"\n{corpus['bytes'] / 1e6:.0f} MB of text in {corpus['documents']:,} documents, a "
        f"vocabulary of {content['settings']['vocab_size']:,}; "
        + (f"GPT-NeoX {content['neox']}; " if content["neox"] else "GPT-NeoX was not measured; ")
        + "`.bin` and `.idx` of all are the same bytes. Encoding alone, texts in memory, MB/s: "
        + ", ".join(f"{name} {shown(rate, 1)}" for name, rate in alone.items())
        + f". With {own['workers']} workers a second of processor does "
        f"{own['rate_per_core_kept']:.0%} of what it does with one.\n"
    )
    return table(head, rows) + text + where(content)


def startup(folder: Path) -> str:
    """Return the table of commands of ``startup.json``."""
    content = read(folder, "startup")
    rows = []
    for name, row in content["first_step"].items():
        first = row["first_step_seconds"]
        rows.append(
            (
                name,
                f"{first['median']:.1f} s" if first else "",
                f"{row['wall_seconds']['median']:.1f} s",
                f"{row['processor_seconds']['median']:.1f} s",
                f"{row['peak_bytes'] / _MIB:,.0f} MiB",
                _ratio(name, row, "processor"),
            )
        )
    head = ("command", "first step after", "ended after", "processor", "memory", "time ÷ ours")
    return table(head, rows) + where(content)


def opening(folder: Path) -> str:
    """Return the tables of data and plans of ``startup.json``."""
    content = read(folder, "startup")
    rows = []
    for row in content["opening"]:
        for name, cached in (("cold", "no"), ("warm", "yes")):
            found = row[name]
            rows.append(
                (
                    f"{row['documents']:,}",
                    f"{row['bin_bytes'] / 1e12:.2f} TB",
                    f"{row['idx_bytes'] / 1e6:.3g} MB",
                    cached,
                    f"{found['open_ms']['median']:.1f} ms",
                    f"{found['batch_ms']['median']:.1f} ms",
                    f"{found['added_bytes']['median'] / _MIB:.1f} MiB",
                    f"{found['mapped_bytes']['median'] / 1024:.0f} KiB",
                )
            )
    head = (
        "documents",
        ".bin",
        ".idx",
        "index in page cache",
        "open",
        "first micro-batch",
        "memory added",
        ".idx resident",
    )
    plans = [
        (
            f"{row['domains']:,}",
            f"{row['batch']:,}",
            f"{row['apportion']:.2f} ms",
            f"{row['multinomial']:.2f} ms",
        )
        for row in content["planning_ms"]
    ]
    planned = table(("domains", "global batch", "planned by quota", "by draw"), plans)
    return table(head, rows) + "\n" + planned + where(content)


def study_start(folder: Path) -> str:
    """Return the table of ``study_start.json``."""
    content = read(folder, "study_start")
    rows = [
        (
            str(result["steps"]),
            *(
                f"{row['processor_seconds']['median']:.1f} s"
                f" ({row['wall_seconds']['median']:.1f} s)"
                for row in result["ways"].values()
            ),
            shown(result["own_imports_over_forked"]["processor"]),
        )
        for result in content["results"]
    ]
    ways = content["results"][0]["ways"]
    head = ("steps", *(f"{way}: processor (clock), a run" for way in ways), "ratio, processor")
    return table(head, rows) + where(content)


def selection(folder: Path) -> str:
    """Return the table of ``selection.json``."""
    content = read(folder, "selection")
    whole, part = content["whole"], content["part"]
    rows = [
        (
            "neomix",
            f"{whole['documents']:,}",
            f"{whole['processor_seconds']:.1f} s",
            f"{whole['documents'] / whole['processor_seconds']:,.0f}",
            f"{whole['peak_bytes'] / _MIB:,.0f} MiB",
            "",
        )
    ]
    for name, row in part["contestants"].items():
        seconds = row["processor_seconds"]["median"]
        rows.append(
            (
                name,
                f"{part['documents']:,}",
                f"{seconds:.1f} s",
                f"{part['documents'] / seconds:,.0f}",
                f"{row['peak_bytes'] / _MIB:,.0f} MiB",
                "1" if name == "neomix" else shown(part["rank_bm25_over_ours"]["processor"]),
            )
        )
    head = ("system", "documents", "processor", "documents a second", "memory", "time ÷ ours")
    return table(head, rows) + where(content)


def memory(folder: Path) -> str:
    """Return the table of ``memory.json``."""
    content = read(folder, "memory")
    rows = [
        (
            row["case"],
            str(row["stage"]),
            *(_held(row["bytes"][name]) for name in _STATES),
            f"{row['bytes']['in_flight']['measured']:.0f} "
            f"({row['bytes']['in_flight']['predicted']:.0f})",
        )
        for row in content["results"]
    ]
    head = ("case", "stage", *_STATES.values(), "in flight")
    return table(head, rows) + where(content)


def _held(one: dict[str, float]) -> str:
    ratio = f" ({one['measured'] / one['predicted']:.4f})" if one["predicted"] else ""
    return f"{one['measured'] / _MIB:.1f}{ratio}"


def _ratio(name: str, row: dict[str, Any], clock: str) -> str:
    return "1" if name == "neomix" else shown(row["time_over_ours"][clock])


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count > 1)}"


def _medians(opened: list[dict[str, Any]], key: str) -> list[float]:
    return [row[name][key]["median"] for row in opened for name in ("cold", "warm")]


def _least_to_most(opened: list[dict[str, Any]], key: str, digits: int) -> str:
    found = _medians(opened, key)
    return f"{min(found):.{digits}f}–{max(found):.{digits}f}"


def _most(opened: list[dict[str, Any]], key: str) -> float:
    return max(_medians(opened, key))
