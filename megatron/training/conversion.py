"""From a checkpoint to its universal form, as verified and as atomic as a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.checkpoint.bundle import STATE_NAME
from megatron.checkpoint.files import disk_errors
from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.vet import UNIVERSAL_GLOBALS, vet_checkpoint
from megatron.engine.universal import convert_to_universal
from megatron.errors import CheckpointError, RunError
from megatron.training.compatible import saved_state

UNIVERSAL = "universal"


def is_universal(manifest: Manifest) -> bool:
    """Tell whether a checkpoint's files are in the universal format."""
    return bool(manifest.layout.get(UNIVERSAL))


def write_universal(
    source: Path,
    manifest: Manifest,
    store: CheckpointStore,
    *,
    kind: str = "",
    workers: int = 1,
) -> Path:
    """Write the universal form of a verified checkpoint, with data and mixing state.

    Args:
        source: the checkpoint's folder.
        manifest: its manifest.
        store: where the universal form goes.
        kind: ``"universal"`` beside the checkpoint that it is of; "" as one of its own.
        workers: processes that convert.

    Returns:
        The folder of the universal form.

    Raises:
        CheckpointError: it is of step 0 or of ZeRO stage 0, holds what no checkpoint of ours
            holds, or cannot be converted.
        RunError: the disk is full or refuses.
    """
    if manifest.layout.get("zero_stage") == 0:
        raise CheckpointError(
            f"{source} was written under ZeRO stage 0 (forced by deepspeed_extra_args), which the "
            "universal format does not know; only the layout that wrote it can load it"
        )
    if manifest.step == 0:
        raise CheckpointError(
            f"{source} is of step 0 and has no optimizer state to convert; start anew instead: the "
            "first weights come from the seed alone and are the same in every layout"
        )
    vet_checkpoint(source)
    # Pieces of parameters lie beside the whole ones until all are put together.
    needed = 2 * manifest.total_bytes
    temporary = store.begin(manifest.step, kind=kind, bytes_needed=needed)
    try:
        with disk_errors(temporary, needed=needed):
            state = saved_state(manifest.layout, source, weights_only=True)
            convert_to_universal(source, temporary, workers=workers, state=state)
            shutil.copyfile(source / STATE_NAME, temporary / STATE_NAME)
        files = [file for file in temporary.rglob("*") if file.is_file()]
        return store.commit(
            manifest.step,
            store.seal_files(files),
            layout={**manifest.layout, UNIVERSAL: True},
            config_hash=manifest.config_hash,
            fingerprints=manifest.fingerprints,
            extra={**manifest.extra, "source": source_hashes(manifest)},
            kind=kind,
        )
    except (CheckpointError, RunError):
        store.abort(manifest.step, kind=kind)
        raise


def find_universal(store: CheckpointStore, manifest: Manifest) -> Path | None:
    """Return the complete universal form of a checkpoint in a store, vetted; None without one."""
    target = store.path(manifest.step, UNIVERSAL)
    if not target.is_dir() or store.verify(target):
        return None
    if store.read_manifest(target).extra.get("source") != source_hashes(manifest):
        return None
    vet_checkpoint(target, allowed=UNIVERSAL_GLOBALS)
    return target


def universal_form(
    store: CheckpointStore, path: Path, manifest: Manifest, say: Callable[[str], None]
) -> Path:
    """Return the universal form of a checkpoint in a store, written there unless it is there.

    Args:
        store: where it lies, or shall.
        path: the checkpoint's folder.
        manifest: its manifest.
        say: told that it is written.

    Raises:
        CheckpointError: it cannot be converted.
        RunError: the disk is full or refuses.
    """
    if (found := find_universal(store, manifest)) is not None:
        return found
    target = store.path(manifest.step, UNIVERSAL)
    if target.is_dir():
        shutil.rmtree(target)
    say(f"converting {path} to the universal format, which any layout can load")
    return write_universal(path, manifest, store, kind=UNIVERSAL)


def source_hashes(manifest: Manifest) -> dict[str, Any]:
    """Return what tells whether a universal form is of this very checkpoint."""
    return {name: entry.sha256 for name, entry in manifest.files.items()}
