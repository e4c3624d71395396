"""Atomic store of checkpoints: a folder is complete or it does not count.

How a save goes, by one process on its own or by the ranks of a run::

    rank 0        tmp = store.begin(step)                 global_stepN.tmp, emptied
    barrier
    every rank    writes its files into tmp
                  entries = store.seal_files(its files)   fsync and SHA-256 (or FileWriter's)
    gather
    rank 0        store.commit(step, all entries, …)      manifest, fsync, rename, `latest`
    barrier

A process may die, and the machine may lose power, between any two of these
operations: what :meth:`CheckpointStore.newest_valid` returns afterwards is the last
checkpoint whose commit had reached its rename, or the one before it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.checkpoint import files as fs
from megatron.checkpoint import verify
from megatron.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    check_relative,
)
from megatron.errors import CheckpointError

LATEST_NAME = "latest"
_TAG = re.compile(r"global_step(0|[1-9][0-9]*)(?:\.([a-z][a-z0-9_]*))?")
_TEMPORARY, _REPLACED, _TRASH = "tmp", "replaced", "trash"
_RESERVED = {_TEMPORARY, _REPLACED, _TRASH}


def parse_tag(tag: str) -> tuple[int, str]:
    """Return (step, kind) of a checkpoint's name: ``global_step120`` → ``(120, "")``.

    Raises:
        CheckpointError: it is not such a name (a path, say: nothing outside the store's
            own folder is ever named by a tag).
    """
    match = _TAG.fullmatch(tag)
    if match is None or match.group(2) in _RESERVED:
        raise CheckpointError(
            f"{tag!r} is not the name of a checkpoint (expected global_step followed by a number)"
        )
    return int(match.group(1)), match.group(2) or ""


def make_tag(step: int, kind: str = "") -> str:
    """Return the name of step ``step``'s checkpoint; the inverse of :func:`parse_tag`."""
    tag = f"global_step{step}" + (f".{kind}" if kind else "")
    parse_tag(tag)
    return tag


class CheckpointStore:
    """The checkpoints of one run in one folder.

    ``kind`` tells a checkpoint's companions (``"universal"``: the same step in another
    format, beside it) from the checkpoint itself (``""``).  Companions are written and
    verified alike, are never offered by :meth:`newest_valid`, and go when it goes.
    """

    def __init__(self, directory: str | os.PathLike[str], keep_last: int | None = None) -> None:
        """Name the folder (made by the first :meth:`begin`).

        Args:
            directory: folder of the checkpoints.
            keep_last: how many to keep, newest first; ``None`` keeps all.
        """
        if keep_last is not None and keep_last < 1:
            raise CheckpointError(
                f"keep_last_n_checkpoints is {keep_last}: at least 1 is kept (leave it out for all)"
            )
        self.directory = Path(directory)
        self.keep_last = keep_last
        self._needed: int | None = None

    # -- writing ------------------------------------------------------------------------

    def begin(self, step: int, *, kind: str = "", bytes_needed: int | None = None) -> Path:
        """Make and return the empty folder to write step ``step``'s files into.

        Args:
            step: training steps done.
            kind: see the class.
            bytes_needed: estimate of the checkpoint's size, for a store without a
                checkpoint (the newest one's size is the better estimate) or a companion.

        Raises:
            RunError: the disk is read-only, refuses, or has not that much space.
        """
        temporary = self.temporary_path(step, kind)
        last = None if kind and bytes_needed is not None else self._last_size()
        self._needed = bytes_needed if last is None else last
        with fs.disk_errors(temporary, needed=self._needed):
            self.directory.mkdir(parents=True, exist_ok=True)
            fs.remove_tree(temporary)
            if self._needed is not None:
                fs.require_space(temporary, self._needed)
            temporary.mkdir()
        return temporary

    def seal_files(self, paths: Iterable[str | os.PathLike[str]]) -> dict[str, dict[str, Any]]:
        """Make this process's files durable and return their entries for the manifest.

        Args:
            paths: files inside the folder that :meth:`begin` returned (there is no need
                to have called it on this object or in this process).

        Returns:
            ``{relative path: {"size": bytes, "sha256": hexadecimal}}``.

        Raises:
            CheckpointError: a path is not inside a folder that is being written.
            RunError: the disk refuses.
        """
        absolute = [Path(path) for path in paths]
        for path in absolute:
            self._relative(path)
        with fs.disk_errors(self.directory, needed=self._needed):
            results = fs.map_files(_seal, absolute)
        return self.entries(dict(zip(absolute, results, strict=True)))

    def entries(self, sealed: Mapping[Path, tuple[int, str]]) -> dict[str, dict[str, Any]]:
        """Return the manifest's entries of files that are on the disk and hashed already.

        Args:
            sealed: size and SHA-256 by file, see :meth:`seal_files`.

        Raises:
            CheckpointError: a path is not inside a folder that is being written.
        """
        return {
            self._relative(path): {"size": size, "sha256": digest}
            for path, (size, digest) in sealed.items()
        }

    def commit(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Any]],
        *,
        layout: Mapping[str, Any] | None = None,
        config_hash: str = "",
        fingerprints: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        kind: str = "",
    ) -> Path:
        """Declare the checkpoint complete: from here on it is the one to resume from.

        Call it on one process, after all have sealed their files.  Afterwards ``latest``
        names the checkpoint, and those beyond ``keep_last`` are gone.

        Args:
            step: as given to :meth:`begin`.
            files: all processes' entries together, as :meth:`seal_files` gave them.
            layout: see :class:`~megatron.checkpoint.manifest.Manifest`.
            config_hash: see there.
            fingerprints: see there.
            extra: see there.
            kind: as given to :meth:`begin`.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the folder does not hold just the files named.
            RunError: the disk refuses; the checkpoints that there were are untouched.
        """
        temporary, final = self.temporary_path(step, kind), self.path(step, kind)
        manifest = Manifest(
            step=step,
            files={
                name: FileEntry(size=int(e["size"]), sha256=str(e["sha256"]))
                for name, e in files.items()
            },
            layout=layout or {},
            config_hash=config_hash,
            fingerprints=fingerprints or {},
            extra=extra or {},
        )
        content = manifest.to_bytes()
        with fs.disk_errors(temporary, needed=self._needed):
            problems = verify.compare_names_and_sizes(temporary, manifest)
            if problems:
                raise CheckpointError(f"cannot complete {final}: " + "; ".join(problems))
            fs.write_file(temporary / MANIFEST_NAME, content)
            for folder in fs.walk_directories(temporary):
                fs.sync_directory(folder)
            self._put_in_place(temporary, final)
            if not kind:
                fs.replace_file(self.directory / LATEST_NAME, final.name.encode() + b"\n")
                self.prune()
        return final

    def abort(self, step: int, *, kind: str = "") -> None:
        """Drop what was written for a save that failed (a full disk wants the space back)."""
        with contextlib.suppress(OSError):
            fs.remove_tree(self.temporary_path(step, kind))

    def prune(self) -> None:
        """Remove the oldest checkpoints beyond ``keep_last``, never the newest."""
        if self.keep_last is None:
            return
        complete = [step for step in self.steps() if self._has_manifest(self.path(step))]
        doomed = set(complete[: -self.keep_last])
        for path, step, _ in self._entries():
            if step in doomed:
                self._discard(path)

    def sweep(self) -> None:
        """Tidy up what a crash left: half-written, replaced and half-removed folders.

        Only while no save is going on.  A checkpoint that was being replaced by a new
        one of the same step is put back if the new one never arrived.
        """
        if not self.directory.is_dir():
            return
        with fs.disk_errors(self.directory):
            for name in sorted(os.listdir(self.directory)):
                path = self.directory / name
                tag, _, suffix = name.rpartition(".")
                if name == f"{LATEST_NAME}.{_TEMPORARY}":
                    path.unlink()
                elif suffix in _RESERVED and _TAG.fullmatch(tag):
                    if suffix == _REPLACED and not (self.directory / tag).exists():
                        os.rename(path, self.directory / tag)
                    else:
                        fs.remove_tree(path)
            self._repair_latest()

    # -- reading ------------------------------------------------------------------------

    def newest_valid(
        self, report: Callable[[str], None] | None = None, *, at_most: int | None = None
    ) -> tuple[Path, Manifest] | None:
        """Return the newest checkpoint that is complete and undamaged, or ``None``.

        Every byte is read (sizes first, then SHA-256), so call it on one process and
        tell the others.

        Args:
            report: called with one sentence for each checkpoint that was passed over.
            at_most: only checkpoints of this step or earlier.
        """
        for step in reversed(self._steps_with_replaced()):
            if at_most is not None and step > at_most:
                continue
            for path in (self.path(step), self._replaced_path(step)):
                if not path.is_dir():
                    continue
                manifest, problems = self._examine(path)
                if manifest is not None and not problems:
                    return path, manifest
                if report is not None:
                    report(f"checkpoint {path} is passed over: {verify.summary(problems)}")
        return None

    def read_manifest(self, path: str | os.PathLike[str]) -> Manifest:
        """Return the manifest of the checkpoint in ``path`` without checking its files.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        return verify.read_manifest(Path(path))

    def verify(self, path: str | os.PathLike[str]) -> list[str]:
        """Return everything that is wrong with the checkpoint in ``path`` (empty: nothing)."""
        return self._examine(Path(path))[1]

    def steps(self) -> list[int]:
        """Return the steps that there are checkpoints of, complete or not, oldest first."""
        return sorted(step for _, step, kind in self._entries() if not kind)

    def path(self, step: int, kind: str = "") -> Path:
        """Return the folder of step ``step``'s checkpoint, whether it is there or not."""
        return self.directory / make_tag(step, kind)

    def path_of_tag(self, tag: str) -> Path:
        """Return the folder of the checkpoint called ``tag``.

        Raises:
            CheckpointError: ``tag`` is not a checkpoint's name.
        """
        return self.path(*parse_tag(tag))

    def temporary_path(self, step: int, kind: str = "") -> Path:
        """Return the folder into which step ``step``'s checkpoint is written."""
        return self.directory / f"{make_tag(step, kind)}.{_TEMPORARY}"

    # -- inside -------------------------------------------------------------------------

    def _entries(self) -> list[tuple[Path, int, str]]:
        """List (path, step, kind) of all finished folders."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                with contextlib.suppress(CheckpointError):
                    found.append((self.directory / name, *parse_tag(name)))
        return found

    def _steps_with_replaced(self) -> list[int]:
        steps = set(self.steps())
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                tag, _, suffix = name.rpartition(".")
                match = _TAG.fullmatch(tag)
                if suffix == _REPLACED and match is not None and match.group(2) is None:
                    steps.add(int(match.group(1)))
        return sorted(steps)

    def _replaced_path(self, step: int, kind: str = "") -> Path:
        return self.directory / f"{make_tag(step, kind)}.{_REPLACED}"

    def _has_manifest(self, path: Path) -> bool:
        return (path / MANIFEST_NAME).is_file()

    def _last_size(self) -> int | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(CheckpointError):
                return verify.read_manifest(self.path(step)).total_bytes
        return None

    def _relative(self, path: Path) -> str:
        try:
            folder, *rest = path.absolute().relative_to(self.directory.absolute()).parts
            tag, _, suffix = folder.rpartition(".")
            parse_tag(tag)
            if suffix != _TEMPORARY or not rest:
                raise ValueError
            return check_relative("/".join(rest))
        except (ValueError, CheckpointError):
            raise CheckpointError(
                f"{path} is not a file of a checkpoint that is being written in {self.directory}"
            ) from None

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        replaced = final.with_name(f"{final.name}.{_REPLACED}")
        if final.exists():
            fs.remove_tree(replaced)
            os.rename(final, replaced)
        os.rename(temporary, final)
        fs.sync_directory(self.directory)
        fs.remove_tree(replaced)

    def _discard(self, path: Path) -> None:
        """Remove a finished folder such that no half of it ever looks like a checkpoint."""
        trash = path.with_name(f"{path.name}.{_TRASH}")
        fs.remove_tree(trash)
        os.rename(path, trash)
        fs.remove_tree(trash)

    def _repair_latest(self) -> None:
        """Let ``latest`` name the newest checkpoint unless it names one that is there."""
        complete = [step for step in self.steps() if self._has_manifest(self.path(step))]
        latest = self.directory / LATEST_NAME
        try:
            named = self.path_of_tag(latest.read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError, CheckpointError):
            named = None
        if complete and (named is None or not self._has_manifest(named)):
            fs.replace_file(latest, self.path(complete[-1]).name.encode() + b"\n")

    def _examine(self, path: Path) -> tuple[Manifest | None, list[str]]:
        try:
            manifest = verify.read_manifest(path)
            problems = verify.compare_names_and_sizes(path, manifest) or verify.compare_hashes(
                path, manifest
            )
        except CheckpointError as error:
            return None, [str(error)]
        except OSError as error:
            return None, [f"{error.filename or path}: {error.strerror or error}"]
        tag = path.name.removesuffix(f".{_REPLACED}")
        with contextlib.suppress(CheckpointError):
            if parse_tag(tag)[0] != manifest.step:
                problems.append(f"its manifest is of step {manifest.step}")
        return manifest, problems


def _seal(path: Path) -> tuple[int, str]:
    fs.sync_file(path)
    return fs.hash_file(path)


def store_in(folder: str | Path) -> CheckpointStore:
    """Return the checkpoints in a folder, or in the folder of a run, or beside a checkpoint."""
    if named_step(folder) is not None:
        return CheckpointStore(Path(folder).absolute().parent)
    store, inner = CheckpointStore(folder), Path(folder) / "checkpoints"
    return CheckpointStore(inner) if inner.is_dir() and not store.steps() else store


def named_step(folder: str | Path, wanted: int | None = None) -> int | None:
    """Return the step of the one checkpoint that a folder is.

    Args:
        folder: a checkpoint, or a folder of them.
        wanted: what holds where the folder is not named as one checkpoint.
    """
    try:
        step, kind = parse_tag(Path(folder).absolute().name)
    except CheckpointError:
        return wanted
    return wanted if kind else step
