"""Saving a checkpoint against torch.save, torch.distributed.checkpoint, and a raw write.

The same tensors go to the same disk, turn by turn.  Ours is written as a run's store does it: into
a temporary folder, synced and hashed, with a manifest, then renamed.  The others are synced too.  A
raw write of as many bytes, synced, is the limit.  Ours and ``torch.save`` stall training from
beginning to end; ``async_save`` stalls for its copy in memory, which is timed by itself.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --megabytes 1024 --folder /scratch
"""

from __future__ import annotations

import os
import sys

# This folder has a tokenize.py, which would be taken for the standard library's.
sys.path.pop(0)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import logging
import shutil
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.support.measure import Times, compared, machine, race, rounded, shown, timed, write
from megatron.checkpoint.store import CheckpointStore


def main() -> None:
    """Run the comparison, print it and write it."""
    options = _options()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        _group(folder)
        state = _state(options.megabytes)
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        stalls = Times()
        contestants = {
            "neomix": lambda: _ours(folder, state),
            "torch.save": lambda: _torch_save(folder, state),
            "DCP": lambda: _dcp(folder, state),
            "DCP, async_save": lambda: _dcp_async(folder, state, stalls),
            "raw write": lambda: _raw(folder, state),
        }
        times = race(contestants, turns=options.turns)
    rows: dict[str, Any] = {}
    for name, one in times.items():
        seconds = statistics.median(one.wall)
        rows[name] = {
            "total_seconds": rounded(seconds),
            "stall_seconds": rounded(
                statistics.median(stalls.wall) if "async" in name else seconds
            ),
            "gigabytes_per_second": rounded(size / 1e9 / seconds),
            "time_over_ours": compared(one, times["neomix"]),
        }
        print(
            f"{name:>16}: {rows[name]['total_seconds']:.2f} s, stall "
            f"{rows[name]['stall_seconds']:.2f} s, {rows[name]['gigabytes_per_second']:.2f} GB/s, "
            f"time / ours {shown(rows[name]['time_over_ours']['wall'])}"
        )
    content = {
        "benchmark": "checkpoint",
        "command": "python benchmarks/checkpoint.py",
        "machine": machine("torch"),
        "settings": {"bytes": size, "turns": options.turns},
        "results": rows,
    }
    if options.write:
        print(f"wrote {write('checkpoint', content)}")


def _group(folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )


def _state(megabytes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = max(1, megabytes // 16)
    return {f"layer{number}": torch.randn(4 << 20, generator=generator) for number in range(count)}


def _ours(folder: Path, state: dict[str, torch.Tensor]) -> None:
    store = CheckpointStore(folder / "ours", keep_last=1)
    temporary = store.begin(1)
    file = temporary / "mp_rank_00_model_states.pt"
    torch.save(state, file)
    store.commit(
        1,
        store.seal_files([file]),
        layout={},
        config_hash="",
        fingerprints={},
    )


def _torch_save(folder: Path, state: dict[str, torch.Tensor]) -> None:
    path = folder / "plain.pt"
    torch.save(state, path)
    _sync(path)


def _dcp(folder: Path, state: dict[str, torch.Tensor]) -> None:
    shutil.rmtree(folder / "dcp", ignore_errors=True)
    dcp.save(state, checkpoint_id=folder / "dcp")
    for path in (folder / "dcp").iterdir():
        _sync(path)


def _dcp_async(folder: Path, state: dict[str, torch.Tensor], stalls: Times) -> None:
    shutil.rmtree(folder / "async", ignore_errors=True)
    future: Any = timed(lambda: dcp.async_save(state, checkpoint_id=folder / "async"), stalls)
    future.result()


def _raw(folder: Path, state: dict[str, torch.Tensor]) -> None:
    with (folder / "raw").open("wb", buffering=0) as file:
        for tensor in state.values():
            file.write(tensor.numpy().data)
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=320)
    parser.add_argument("--folder", help="where to write; the default is the temporary folder")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
