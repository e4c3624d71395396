"""Checkpoints: an atomic, verified store of files, and what goes into it."""

from __future__ import annotations

from megatron.checkpoint.manifest import FileEntry, Manifest
from megatron.checkpoint.store import CheckpointStore
from megatron.checkpoint.vet import vet_checkpoint, vet_file

__all__ = ["CheckpointStore", "FileEntry", "Manifest", "vet_checkpoint", "vet_file"]
