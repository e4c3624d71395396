"""Files that run something when they are unpickled."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Pickles as a call of ``function``: what a malicious checkpoint does."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def touch(sentinel: Path) -> Calls:
    return Calls(os.mkdir, str(sentinel))


def as_zip(path: Path, data: bytes, **others: bytes) -> None:
    """Write a file in torch's format around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **others}.items():
            archive.writestr(f"archive/{name}", content)


def with_protocol(protocol: int) -> Callable[[Path, Path], None]:
    def write(path: Path, sentinel: Path) -> None:
        as_zip(path, pickle.dumps({"x": touch(sentinel)}, protocol=protocol))

    return write


def raw(text: bytes) -> Callable[[Path, Path], None]:
    def write(path: Path, sentinel: Path) -> None:
        as_zip(path, text.replace(b"SENTINEL", str(sentinel).encode()))

    return write


def saved(make: Callable[[Path], Any], **options: Any) -> Callable[[Path, Path], None]:
    def write(path: Path, sentinel: Path) -> None:
        torch.save(make(sentinel), path, **options)

    return write


def two_pickles(path: Path, sentinel: Path) -> None:
    """An archive with two members of one name: readers may differ in which they take."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the duplicate name, which is the point
            archive.writestr("archive/data.pkl", pickle.dumps(touch(sentinel), protocol=2))


def bare_pickle(path: Path, sentinel: Path) -> None:
    path.write_bytes(pickle.dumps(touch(sentinel)))


def behind_an_empty_pickle(path: Path, sentinel: Path) -> None:
    """torch's legacy format: several pickles in a row, no zip."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(pickle.dumps(touch(sentinel), protocol=2) + buffer.getvalue())


PAYLOADS: dict[str, Callable[[Path, Path], None]] = {
    "torch.save": saved(lambda s: {"module": touch(s)}),
    "deep inside": saved(lambda s: {"a": [({"b": [torch.zeros(2), touch(s)]},)]}),
    "as a key": saved(lambda s: {(1, touch(s)): 0}),
    "legacy": saved(lambda s: touch(s), _use_new_zipfile_serialization=False),
    "legacy, first": behind_an_empty_pickle,
    "bare pickle": bare_pickle,
    **{f"protocol {protocol}": with_protocol(protocol) for protocol in range(6)},
    "system": saved(lambda s: Calls(os.system, f"mkdir {s}")),
    "eval": saved(lambda s: Calls(eval, f"__import__('os').mkdir({str(s)!r})")),
    "exec": saved(lambda s: Calls(exec, f"import os; os.mkdir({str(s)!r})")),
    "popen": saved(lambda s: Calls(subprocess.check_call, ["mkdir", str(s)])),
    "getattr": saved(lambda s: Calls(getattr, Calls(__import__, "os"), "sep")),
    "opcode INST": raw(b"(S'SENTINEL'\niposix\nmkdir\n."),
    "opcode OBJ": raw(b"(cposix\nmkdir\nS'SENTINEL'\no."),
    "opcode STACK_GLOBAL": raw(b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93S'SENTINEL'\n\x85R."),
    "dotted name": raw(b"\x80\x04\x8c\x02os\x8c\x08path.sep\x93."),
    "after a STOP": raw(b"\x80\x02}.cposix\nmkdir\nS'SENTINEL'\n\x85R."),
    "two members": two_pickles,
}
# Harmless in themselves: nothing is made when they are read, and they may be refused or not.
INERT = {"getattr", "dotted name", "after a STOP"}
