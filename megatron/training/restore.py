"""Finding the checkpoint to go on from, and making it fit this run's layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.vet import vet_checkpoint
from megatron.engine.runtime import Runtime
from megatron.engine.universal import check_convertible, convert_to_universal
from megatron.errors import CheckpointError

UNIVERSAL = "universal"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a run starts from.

    Attributes:
        checkpoint: folder of the checkpoint (our own state is read there).
        engine_files: folder of the files that DeepSpeed loads: the checkpoint itself, or
            its universal form.
        universal: whether they are in the universal format.
        manifest: the checkpoint's manifest.
        weights_only: whether a new run begins with its weights (``finetune``).
    """

    checkpoint: Path
    engine_files: Path
    universal: bool
    manifest: Manifest
    weights_only: bool


def find_checkpoint(
    runtime: Runtime, store: CheckpointStore, say: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    """Return the newest valid checkpoint of a store, agreed by all ranks.

    Rank 0 looks (every byte is verified) and tells the others.
    """
    found: Any = None
    if runtime.rank == 0 and (newest := store.newest_valid(report=say)) is not None:
        path, manifest = newest
        found = [str(path), manifest.to_bytes().decode()]
    found = runtime.broadcast(found)
    if found is None:
        return None
    return Path(found[0]), Manifest.from_bytes(found[1].encode())


def prepare_source(
    runtime: Runtime,
    store: CheckpointStore,
    found: tuple[Path, Manifest],
    *,
    layout: Mapping[str, Any],
    weights_only: bool,
    say: Callable[[str], None],
) -> Source:
    """Vet the checkpoint's files and convert them if they were written in another layout.

    Weights alone are whole in every checkpoint of ZeRO 1 and 2, whatever its layout.

    Raises:
        CheckpointError: a file holds more than tensors and plain values, or the layouts
            cannot be converted into each other.
    """
    path, manifest = found
    universal = dict(manifest.layout) != dict(layout) and not weights_only
    if universal:
        check_convertible(manifest.layout, layout)
    if weights_only and 3 in (manifest.layout["zero_stage"], layout["zero_stage"]):
        raise CheckpointError(
            f"finetune: taking the weights alone of {path} is not offered under ZeRO stage 3; set "
            "zero_optimization.stage to 2 or less (for the checkpoint as well)"
        )
    problem = None
    engine_files = store.path(manifest.step, UNIVERSAL) if universal else path
    if runtime.rank == 0:
        try:
            vet_checkpoint(path)
            if universal:
                _convert_once(store, path, manifest, say)
        except CheckpointError as error:
            problem = str(error)
    problem = runtime.broadcast(problem)
    if problem is not None:
        raise CheckpointError(problem)
    return Source(
        checkpoint=path,
        engine_files=engine_files,
        universal=universal,
        manifest=manifest,
        weights_only=weights_only,
    )


def _convert_once(
    store: CheckpointStore, path: Path, manifest: Manifest, say: Callable[[str], None]
) -> None:
    """Write the universal form beside the checkpoint, unless a complete one is there."""
    source_hash = {name: entry.sha256 for name, entry in manifest.files.items()}
    target = store.path(manifest.step, UNIVERSAL)
    if target.is_dir() and not store.verify(target):
        if store.read_manifest(target).extra.get("source") == source_hash:
            return
        shutil.rmtree(target)
    say(f"the layout has changed since {path.name}: converting it to the universal format")
    temporary = store.begin(manifest.step, kind=UNIVERSAL, bytes_needed=2 * manifest.total_bytes)
    convert_to_universal(path, temporary)
    # DeepSpeed notes the newest conversion in a file beside the folder; the store's own
    # manifests say which are complete.
    (store.directory / "latest_universal").unlink(missing_ok=True)
    files = [file for file in temporary.rglob("*") if file.is_file()]
    store.commit(
        manifest.step,
        store.seal_files(files),
        layout={"universal": True},
        config_hash=manifest.config_hash,
        extra={"source": source_hash},
        kind=UNIVERSAL,
    )
