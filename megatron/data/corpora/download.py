"""Fetching files: whole or not at all, continued where they stopped, unpacked safely."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlparse

from megatron.errors import DataError

_BLOCK = 1 << 20
_REPORT_EVERY = 256 << 20
Say = Callable[[str], None]


def fetch(
    url: str,
    folder: Path,
    *,
    name: str | None = None,
    sha256: str | None = None,
    say: Say = print,
    tries: int = 3,
    timeout: float = 60.0,
) -> Path:
    """Bring the file at ``url`` into ``folder`` and return its path.

    A file that is there already is taken as it is.  An interrupted transfer leaves
    ``NAME.part``, which the next call continues where the server allows it.

    Args:
        url: an http, https or file address, or a plain path.
        folder: where the file goes.
        name: what it is called there; by default the last part of the address.
        sha256: hexadecimal hash that the file must have, if known.
        say: receives progress lines.
        tries: attempts before giving up; each continues the last.
        timeout: seconds without a byte after which an attempt fails.

    Raises:
        DataError: the address cannot be reached, ends early, or gives another file.
    """
    if "://" not in url:
        url = Path(url).resolve().as_uri()
    target = folder / (name or Path(unquote(urlparse(url).path)).name)
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    for attempt in range(1, tries + 1):
        try:
            _transfer(url, partial, say, timeout)
            break
        except urllib.error.HTTPError as error:
            raise DataError(_refusal(url, error.code, target)) from error
        except (OSError, HTTPException) as error:
            if attempt == tries or url.startswith("file:"):
                raise DataError(_unreachable(url, error, target)) from error
            say(f"{url}: {error}; trying again")
            time.sleep(2**attempt)
    if sha256 is not None:
        found = _sha256(partial)
        if found != sha256:
            partial.unlink()
            raise DataError(f"{url} has the SHA-256 {found}, expected {sha256}: not kept")
    partial.replace(target)
    return target


def _transfer(url: str, partial: Path, say: Say, timeout: float) -> None:
    tag_file = partial.with_name(partial.name + ".etag")
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "neomix"})
    if have and tag_file.exists():
        # Without the mark of what was begun, the rest might be another file's.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag_file.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send, or the part is from another file
            partial.unlink()
            raise OSError("the server cannot continue; starting over") from error
        raise
    with response:
        continued = response.status == 206
        if not continued:
            have = 0
            mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if mark and not mark.startswith("W/") and not url.startswith("file:"):
                tag_file.write_text(mark)
            else:
                tag_file.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with partial.open("ab" if continued else "wb") as stream:
            got = _copy(response, stream, have, total, url, say)
            stream.flush()
            os.fsync(stream.fileno())
    if total is not None and got != total:
        raise OSError(f"the connection ended after {got} of {total} bytes")
    tag_file.unlink(missing_ok=True)


def _copy(
    source: IO[bytes], target: IO[bytes], got: int, total: int | None, url: str, say: Say
) -> int:
    told = got
    while block := source.read(_BLOCK):
        target.write(block)
        got += len(block)
        if got - told >= _REPORT_EVERY:
            told = got
            share = f" of {total / 1e9:.1f} GB ({got / total:.0%})" if total else ""
            say(f"{url}: {got / 1e9:.1f} GB{share}")
    return got


def _refusal(url: str, code: int, target: Path) -> str:
    why = {401: "a login is needed", 403: "access is refused", 404: "it is not there (any more)"}
    return (
        f"{url} answered {code}: {why.get(code, 'the server refused')}; give another address or "
        f"a local copy with --source, or put the file at {target}"
    )


def _unreachable(url: str, error: Exception, target: Path) -> str:
    reason = getattr(error, "reason", None) or error
    return (
        f"cannot fetch {url}: {reason}; the same command continues once the network is there. "
        f"Without one: give a local copy with --source, or put the file at {target}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip or tar archive into ``folder`` and return its files; others pass as they are.

    A member that would land outside ``folder``, a link or a device is refused by the
    readers of both formats.

    Raises:
        DataError: the archive is damaged or holds a member that must not be unpacked.
    """
    name = archive.name
    is_tar = name.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz"))
    if not is_tar and not name.endswith(".zip"):
        return [archive]
    if not folder.exists():
        partial = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            if is_tar:
                with tarfile.open(archive) as tar:
                    tar.extractall(partial, filter="data")
            else:
                with zipfile.ZipFile(archive) as packed:
                    packed.extractall(partial)
        except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError) as error:
            raise DataError(f"{archive} cannot be unpacked: {error}; remove it first") from error
        partial.rename(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())
