"""Makes the disk operations of a piece of code countable, and fails one of them.

Used in a forked child: :func:`install` replaces functions of ``os`` for good.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Everything that changes the disk, or waits for it.
OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir")


class Faults:
    """Counts operations and acts at the ``at``-th.

    Modes: ``before``: the process ends there, as by SIGKILL; ``half``: a write is cut in the
    middle first; ``power``: the process ends before it, and what was not synced is lost: the
    content of files, and names in folders; ``error``: it raises ``errno``.
    """

    def __init__(self, at: int, mode: str, errno: int = 0) -> None:
        self.at, self.mode, self.errno = at, mode, errno
        self.count = 0
        self.names: list[str] = []
        self._lock = threading.Lock()
        self._real = {name: getattr(os, name) for name in OPERATIONS}
        self._paths: dict[int, str] = {}
        self._dirty: set[str] = set()  # files with content that was not synced
        self._new: set[str] = set()  # names in folders that were not synced since

    def install(self) -> Faults:
        for name in OPERATIONS:
            setattr(os, name, self._wrap(name, self._real[name]))
        return self

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            with self._lock:  # a store hashes in threads
                self.count += 1
                self.names.append(name)
                mine = self.count == self.at
            if not mine:
                result = real(*arguments, **options)
                with self._lock:
                    self._track(name, arguments, options, result)
                return result
            if self.mode == "error":
                path = self._paths.get(arguments[0], arguments[0])
                raise OSError(self.errno, os.strerror(self.errno), str(path))
            if self.mode == "half" and name == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if self.mode == "power":
                with self._lock:
                    self._lose()
            os._exit(9)

        return operation

    def _track(self, name: str, arguments: Any, options: Any, result: Any) -> None:
        if options.get("dir_fd") is not None:
            return
        if name == "open":
            path = os.path.abspath(arguments[0])
            self._paths[result] = path
            if len(arguments) > 1 and arguments[1] & os.O_CREAT:
                self._new.add(path)
        elif name == "write":
            self._dirty.add(self._paths.get(arguments[0], "a pipe"))
        elif name == "fsync":
            path = self._paths[arguments[0]]
            self._dirty.discard(path)
            self._new = {new for new in self._new if os.path.dirname(new) != path}
        elif name in ("rename", "replace"):
            source, target = (os.path.abspath(path) for path in arguments[:2])
            self._dirty = {self._moved(path, source, target) for path in self._dirty}
            self._new = {self._moved(path, source, target) for path in self._new}

    @staticmethod
    def _moved(path: str, source: str, target: str) -> str:
        inside = path == source or path.startswith(source + "/")
        return target + path[len(source) :] if inside else path

    def _lose(self) -> None:
        for path in self._dirty:
            if Path(path).is_file():
                os.truncate(path, 0)
        for path in self._new:
            if Path(path).is_file():
                self._real["unlink"](path)


def in_child(action: Callable[[], None], faults: Faults | None = None) -> int:
    """Run ``action`` in a forked child, with ``faults``, and return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if faults is not None:
                faults.install()
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
