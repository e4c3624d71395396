"""A process that has imported what a run needs, and becomes runs by forking.

Most of a short run's start is imports, the same ones every time.  This process does them once
and then waits for orders (see :mod:`megatron.experiments.warm`).  It opens no device, starts no
thread and computes nothing, so that a fork of it is what a fresh ``train.py`` is after its
imports: the same environment, hence the same threads and the same numbers.

Orders and reports go through a socket, one JSON object a message:

=======  =============================================  ========================================
sender   message                                        meaning
=======  =============================================  ========================================
this     ``{"ready": true}`` or ``{"unfit": why}``      the first message
runner   ``{"start": argv, "cwd": path}`` and a file    become this run, with the file as output
this     ``{"started": pid}`` or ``{"unfit": why}``     it is a session of its own
this     ``{"ended": pid, "code": code}``               as ``Popen.returncode`` has it
=======  =============================================  ========================================

When the socket closes, this process ends; whether so or by a signal, its runs die with it.
"""

from __future__ import annotations

import gc
import importlib
import os
import selectors
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron.launch import wire
from megatron.launch.devices import detect_devices
from megatron.launch.process import die_with_parent

# What a run on the CPU imports in any case, part of it late: torch's optimizers load the module
# that lets them keep out of torch's compiler when the first one is made.
_MODULES = (
    "train",
    "megatron.mixing",
    "megatron.training.run",
    "megatron.engine.sequential",
    "torch._dynamo",
)


def serve(descriptor: int) -> None:
    """Import what runs need, then fork one for every order until the other side is gone.

    Args:
        descriptor: of a connected socket of :mod:`megatron.launch.wire`.
    """
    connection = socket.socket(fileno=descriptor)
    try:
        trouble = _preload()
    except Exception as error:  # the runner goes on without this process, and says why
        trouble = f"{type(error).__name__}: {error}"
    if trouble is not None:
        wire.send(connection, {"unfit": trouble})
        return
    gc.collect()
    gc.freeze()  # what is there stays: no fork need look at it, and copy its pages, again
    wire.send(connection, {"ready": True})
    _Forker(connection).run()


def _preload() -> str | None:
    """Import everything; return why this process must not be forked, if so."""
    if detect_devices(os.environ).cuda:
        return "there are CUDA devices"
    os.environ["DS_ACCELERATOR"] = "cpu"
    from megatron.engine.runtime import load_deepspeed

    load_deepspeed()
    for name in _MODULES:
        importlib.import_module(name)
    if _threads() > 1:
        # OpenBLAS starts threads when it is loaded; it puts them away at the first fork, and
        # has new ones as soon as somebody, in a run then, asks for work.
        _fork_in_vain()
    return _why_unfit()


def _why_unfit() -> str | None:
    count = _threads()
    return f"it has {count} threads" if count > 1 else None


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _fork_in_vain() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


class _Forker:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._runs: dict[int, int] = {}  # pid by the descriptor that tells of its end

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fd in self._runs:
                    self._report(key.fd)
                    continue
                orders, files = wire.receive(self._connection)
                if orders is None:
                    return
                wire.send(self._connection, self._obey(orders, files))

    def _obey(self, orders: Mapping[str, Any], files: list[int]) -> dict[str, Any]:
        """Fork a run; return the answer to the order."""
        (output,) = files
        try:
            if (trouble := _why_unfit()) is not None:
                return {"unfit": trouble}
            own = os.getpid()
            begun, begin = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(begun)
                self._become(orders, output, begin, own)
            os.close(begin)
            os.read(begun, 1)  # or the end of the file, if it is gone already
            os.close(begun)
        except OSError as error:
            return {"unfit": str(error)}
        finally:
            os.close(output)
        handle = os.pidfd_open(pid)
        self._runs[handle] = pid
        self._selector.register(handle, selectors.EVENT_READ)
        return {"started": pid}

    def _report(self, handle: int) -> None:
        pid = self._runs.pop(handle)
        self._selector.unregister(handle)
        os.close(handle)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        wire.send(self._connection, {"ended": pid, "code": code})

    def _become(self, orders: Mapping[str, Any], output: int, begin: int, parent: int) -> NoReturn:
        """Be the run, as a process of its own would."""
        code = 1
        try:
            die_with_parent(parent)
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            os.close(output)
            self._selector.close()
            self._connection.close()
            for handle in self._runs:
                os.close(handle)
            os.chdir(orders["cwd"])
            os.write(begin, b"\0")
            os.close(begin)
            sys.argv = list(orders["start"])
            importlib.import_module("train").main()
            code = 0
        except SystemExit as leaving:
            code = _code_of(leaving)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _code_of(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    if isinstance(leaving.code, int):
        return leaving.code
    print(leaving.code, file=sys.stderr)
    return 1
