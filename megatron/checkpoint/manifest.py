"""The manifest: what a complete checkpoint holds, file by file, and for which run.

A checkpoint folder is complete if and only if it holds ``manifest.json`` and every
file that it names with the size and SHA-256 that it names, and nothing else.  The
manifest carries a SHA-256 of itself, and is only read in the one spelling in which it
is written, so a change to any bit of it is noticed too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from megatron.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint.

    Attributes:
        size: bytes.
        sha256: lower-case hexadecimal digest of the content.
    """

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of ``manifest.json``.

    Attributes:
        step: training steps done.
        files: entry by path relative to the checkpoint folder, with ``/``.
        layout: parallel sizes, ZeRO stage and whatever else decides whether the engine
            can load the files as they are.
        config_hash: hash of the resolved configuration.
        fingerprints: fingerprint by data source.
        extra: anything else worth knowing before the engine is built (JSON).
    """

    step: int
    files: Mapping[str, FileEntry]
    layout: Mapping[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Size of the checkpoint's files together, in bytes."""
        return sum(entry.size for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """Return the one spelling of this manifest.

        Raises:
            CheckpointError: a value is not JSON (NaN included), or a file name is not
                a plain relative path.
        """
        for name in self.files:
            check_relative(name)
        body = {
            "version": MANIFEST_VERSION,
            "step": self.step,
            "layout": dict(self.layout),
            "config_hash": self.config_hash,
            "fingerprints": dict(self.fingerprints),
            "extra": dict(self.extra),
            "files": {
                name: {"size": entry.size, "sha256": entry.sha256}
                for name, entry in self.files.items()
            },
        }
        try:
            # Once through JSON, so that what is signed is what will be read (keys that
            # are numbers become strings, and sort differently).
            body = json.loads(json.dumps(body, allow_nan=False))
            return _spell({**body, "sha256": _digest(body)})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the manifest of step {self.step}: {error}") from error

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            CheckpointError: the bytes are not a manifest, are of another version, or
                have been changed.
        """
        try:
            body = json.loads(raw)
            digest = body.pop("sha256")
            version = body["version"]
            intact = digest == _digest(body) and raw == _spell({**body, "sha256": digest})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{MANIFEST_NAME} is damaged (not readable)") from error
        if version != MANIFEST_VERSION:
            raise CheckpointError(
                f"{MANIFEST_NAME} has version {version!r}, this software reads version "
                f"{MANIFEST_VERSION}; resume with the release that wrote it"
            )
        if not intact:
            raise CheckpointError(f"{MANIFEST_NAME} is damaged (its own checksum differs)")
        return cls._from_body(body)

    @classmethod
    def _from_body(cls, body: Mapping[str, Any]) -> Manifest:
        try:
            files = {
                check_relative(name): FileEntry(size=int(e["size"]), sha256=str(e["sha256"]))
                for name, e in body["files"].items()
            }
            return cls(
                step=int(body["step"]),
                files=files,
                layout=body["layout"],
                config_hash=str(body["config_hash"]),
                fingerprints=body["fingerprints"],
                extra=body["extra"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{MANIFEST_NAME} does not fit its version: {error}") from error


def check_relative(name: str) -> str:
    """Return ``name`` if it is a plain relative path that stays inside its folder.

    Raises:
        CheckpointError: it is absolute, climbs (``..``), or is spelt in another way than
            the normal one.
    """
    path = PurePosixPath(name)
    plain = path.parts and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not plain or str(path) != name or "\\" in name:
        raise CheckpointError(f"{name!r} is not a path inside the checkpoint folder")
    return name


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_spell(body)).hexdigest()


def _spell(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
