"""Saving a checkpoint against torch.save, torch.distributed.checkpoint, and a raw write.

The same tensors go to the same disk, turn by turn; each way writes new files and then removes
those of its turn before.  Ours is written as a run does it: into a temporary folder, hashed,
synced, with a manifest, then renamed.  ``torch.save`` is a row without ``fsync``, as most programs
call it (a loss of power then takes the file), and one with it; DCP syncs by itself.  A raw write
of as many bytes, synced, is the limit.  What is saved asynchronously stalls training for its copy
in memory, which is timed by itself.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.support.measure import Times, compared, machine, race, rounded, shown, timed, write
from megatron.checkpoint.background import Background
from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.writing import FileWriter
from megatron.engine.host_copy import HostCopies


@dataclass(frozen=True)
class Way:
    """One way to save.

    Attributes:
        save: does it.
        synced: whether the files are on the disk when it comes back.
        hashed: whether their checksums are known then.
        stalls: gets what it stalls training, where that is not all of it.
    """

    save: Callable[[], None]
    synced: bool = True
    hashed: bool = False
    stalls: Times | None = None


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
        ways = _ways(folder, state)
        times = race({name: way.save for name, way in ways.items()}, turns=options.turns)
    rows = {name: _row(name, ways[name], times, size) for name in ways}
    for name, row in rows.items():
        print(
            f"{name:>18}: {row['total_seconds']:.2f} s, stall {row['stall_seconds']:.2f} s, "
            f"processor {row['processor_seconds']:.2f} s, {row['gigabytes_per_second']:.2f} GB/s, "
            f"time / ours {shown(row['time_over_ours']['wall'])}"
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


def _ways(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, Way]:
    copies, behind = HostCopies(pinned=False), Background("checkpoint")
    stores = [CheckpointStore(folder / name, keep_last=1) for name in ("ours", "behind")]
    ours, dcps = Times(), Times()
    return {
        "neomix": Way(lambda: _ours(stores[0], state), hashed=True),
        "neomix, async_save": Way(
            lambda: _ours_behind(stores[1], state, copies, behind, ours), hashed=True, stalls=ours
        ),
        "torch.save": Way(lambda: _torch_save(folder / "plain", state, sync=False), synced=False),
        "torch.save, fsync": Way(lambda: _torch_save(folder / "synced", state)),
        "DCP": Way(lambda: _dcp(folder / "dcp", state)),
        "DCP, async_save": Way(lambda: _dcp_async(folder / "async", state, dcps), stalls=dcps),
        "raw write": Way(lambda: _raw(folder / "raw", state)),
    }


def _row(name: str, way: Way, times: Mapping[str, Times], size: int) -> dict[str, Any]:
    seconds = statistics.median(times[name].wall)
    stall = seconds
    if way.stalls is not None:  # turns that warm up are among them
        stall = statistics.median(way.stalls.wall[-len(times[name].wall) :])
    return {
        "total_seconds": rounded(seconds),
        "stall_seconds": rounded(stall),
        "processor_seconds": rounded(statistics.median(times[name].processor)),
        "gigabytes_per_second": rounded(size / 1e9 / seconds),
        "synced": way.synced,
        "hashed": way.hashed,
        "time_over_ours": compared(times[name], times["neomix"]),
    }


def _group(folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )


def _state(megabytes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = max(1, megabytes // 16)
    return {f"layer{number}": torch.randn(4 << 20, generator=generator) for number in range(count)}


def _ours(store: CheckpointStore, state: dict[str, torch.Tensor]) -> None:
    step = _next(store)
    _write(store, state, step, store.begin(step))


def _ours_behind(
    store: CheckpointStore,
    state: dict[str, torch.Tensor],
    copies: HostCopies,
    behind: Background,
    stalls: Times,
) -> None:
    def start() -> None:
        step = _next(store)
        temporary = store.begin(step)
        copies.begin()
        behind.start(partial(_write, store, copies.take(state), step, temporary))

    timed(start, stalls)
    behind.wait()


def _next(store: CheckpointStore) -> int:
    return max(store.steps(), default=0) + 1


def _write(
    store: CheckpointStore, state: dict[str, torch.Tensor], step: int, temporary: Path
) -> None:
    with FileWriter() as writer:
        writer.write_state(state, temporary / "mp_rank_00_model_states.pt")
        files = store.entries(writer.finish())
    store.commit(step, files)


@contextmanager
def _new(path: Path) -> Iterator[Path]:
    """Name something new to write, and remove what was written before."""
    old, new = (path.with_suffix(suffix) for suffix in (".old", ".new"))
    if new.exists():
        new.rename(old)
    yield new
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _torch_save(path: Path, state: dict[str, torch.Tensor], *, sync: bool = True) -> None:
    with _new(path) as file:
        torch.save(state, file)
        if sync:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _dcp(path: Path, state: dict[str, torch.Tensor]) -> None:
    with _new(path) as folder:
        dcp.save(state, checkpoint_id=folder)


def _dcp_async(path: Path, state: dict[str, torch.Tensor], stalls: Times) -> None:
    with _new(path) as folder:
        future: Any = timed(lambda: dcp.async_save(state, checkpoint_id=folder), stalls)
        future.result()


def _raw(path: Path, state: dict[str, torch.Tensor]) -> None:
    with _new(path) as name, name.open("wb", buffering=0) as file:
        for tensor in state.values():
            file.write(tensor.numpy().data)
        os.fsync(file.fileno())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=320)
    parser.add_argument("--folder", help="where to write; the default is the temporary folder")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-write", dest="write", action="store_false", help="write no JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
