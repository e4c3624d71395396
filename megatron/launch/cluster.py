"""The parent of a run on several nodes: starts an agent on each, hears them, ends them.

One remote shell (pdsh, mpirun, srun) starts the agents (:mod:`megatron.launch.node`).  They
report through their output.  An order to stop goes the other way as a signal that mpirun and
srun pass on, or through a second pdsh.  When a node's ranks have failed, the others have a few
seconds to report failures of their own; then the shell is ended, and with it every agent and
every rank.  The shell is told by the kernel when this process dies.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron.errors import RunError
from megatron.launch.outcome import EXIT_KILLED, SAVED_CODES, RankEnd, bereft, culprit, explain
from megatron.launch.process import die_with_parent
from megatron.launch.remote import RemotePlan
from megatron.launch.reports import ReportReader, unpack_ends
from megatron.launch.stop import EXIT_INTERRUPTED, EXIT_SAVED
from megatron.launch.supervise import (
    GRACE_SECONDS,
    WATCHED,
    caught_signals,
    kill_session,
    print_error,
)

_HEARD_BYTES = 1 << 16
_TICK_SECONDS = 0.1
_TELL_SECONDS = 5.0
# From the first agent's first word to that of the last.
_START_SECONDS = 180.0
# Beyond what the agents themselves allow, for the way there and back.
_MARGIN_SECONDS = 5.0
_LOST = re.compile(r"pdsh@[^:]*: (\S+): (.*exited with (?:exit code|signal) \d+)")


@dataclass(kw_only=True)
class _Node:
    """What is known of one node."""

    host: str
    here: bool = False
    stopping: bool = False
    code: int | None = None
    words: list[str] = field(default_factory=list)
    ends: list[RankEnd] = field(default_factory=list)
    lost: str | None = None
    at: float = 0.0

    @property
    def over(self) -> bool:
        return self.code is not None or self.lost is not None

    @property
    def failed(self) -> bool:
        return self.lost is not None or (
            self.code is not None and self.code != 0 and self.code not in SAVED_CODES
        )


def supervise_all(
    plan: RemotePlan,
    log_dir: Path,
    *,
    save_timeout: float = 600.0,
    grace: float = GRACE_SECONDS,
) -> int:
    """Run the job on all nodes to its end and return the exit code for the command.

    Args:
        plan: what to start.
        log_dir: folder for ``launcher.log``, what the remote shell says.
        save_timeout: seconds that ranks may take to end once asked to save and stop.
        grace: seconds that nodes may go on after one has failed.

    Returns:
        As :func:`megatron.launch.supervise.supervise`.

    Raises:
        ConfigError: the launcher's program is not there.
        RunError: it could not start, or a host could not be reached.
    """
    plan.check_program()
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the folder {log_dir} for the launcher's output cannot be made: {error.strerror}; "
            "give another log_dir or run_dir"
        ) from error
    if plan.withheld:
        print_error(
            f"deepy: {', '.join(plan.withheld)} not sent along, since others can read pdsh's "
            "command line; where needed, put it into ~/.deepspeed_env on the hosts"
        )
    with (log_dir / "launcher.log").open("wb") as log:
        return _Parent(plan, log, save_timeout, grace).run()


class _Parent:
    def __init__(self, plan: RemotePlan, log: IO[bytes], save_timeout: float, grace: float) -> None:
        self._plan = plan
        self._log = log
        self._save_timeout = save_timeout
        self._grace = grace
        self._job = secrets.token_hex(8)
        self._nodes = [_Node(host=host) for host in plan.world]
        self._arrived: deque[int] = deque()
        self._stopping = False
        self._told = 0.0
        self._deadline: float | None = None
        self._verdict: int | None = None
        self._reader = ReportReader()
        self._errors = b""
        self._tail: deque[str] = deque(maxlen=20)  # what was not shown
        self._heard = b""  # the end of rank 0's error output, as it was shown
        self._last_words = ""
        self._first_heard: float | None = None
        self._silent = False
        self._quiet = False
        self._selector = selectors.DefaultSelector()
        self._tellers: list[subprocess.Popen[bytes]] = []
        self._shell: subprocess.Popen[bytes]

    # -- the life of a job --------------------------------------------------------------

    def run(self) -> int:
        with caught_signals(self._arrived):
            self._shell = self._start(self._plan.command(self._job), subprocess.PIPE)
            try:
                while not self._finished():
                    gone = self._shell.poll() is not None
                    self._read()
                    self._obey()
                    self._judge()
                    if gone:
                        self._read()
                        break
                code, words = self._conclude()
            finally:
                self._end_everything()
            # The report of an end and what the rank said come by different pipes: the second
            # may have been cut off by the first.
            if not words and self._last_words.encode() not in self._heard:
                words = [self._last_words]
            for line in words:
                print_error(line)
            return code

    def _start(self, command: tuple[str, ...], output: int) -> subprocess.Popen[bytes]:
        own = os.getpid()

        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
            # SIGTERM, which mpirun and srun answer by ending what they have started.
            die_with_parent(own, signal.SIGTERM)

        try:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self._plan.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=prepare,
            )
        except OSError as error:
            raise RunError(f"{command[0]} cannot start: {error}") from error
        for stream in filter(None, (process.stdout, process.stderr)):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, stream is process.stdout)
        return process

    def _finished(self) -> bool:
        return self._verdict is not None or all(node.over for node in self._nodes)

    def _judge(self) -> None:
        """Decide whether the job has had its time."""
        now = time.monotonic()
        if any(node.failed for node in self._nodes):
            self._quiet = True  # what comes now is the remote shell's view of the end
            limit = now + self._grace
            self._deadline = min(self._deadline or limit, limit)
        elif self._deadline is None and any(node.code for node in self._nodes):
            self._deadline = now + self._save_timeout + _MARGIN_SECONDS
        absent = any(not node.here and not node.over for node in self._nodes)
        if absent and self._first_heard and now > self._first_heard + _START_SECONDS:
            self._silent, self._verdict = True, EXIT_KILLED
        if self._deadline is not None and now > self._deadline and not self._finished():
            self._verdict = EXIT_KILLED

    def _conclude(self) -> tuple[int, list[str]]:
        """Return the exit code, and what the user should read last."""
        failed = [node for node in self._nodes if node.failed]
        missing = [node for node in self._nodes if not node.over]
        if self._verdict in (EXIT_SAVED, EXIT_INTERRUPTED):
            return self._verdict, []
        if not failed and not missing:
            codes = [node.code for node in self._nodes if node.code]
            return (max(codes) if codes else 0), []
        if self._silent:
            return self._without_report(missing)
        if not failed and self._verdict is not None:
            late = ", ".join(node.host for node in missing)
            text = f"deepy: not saved after {self._save_timeout:g} s on {late}: killed"
            return EXIT_KILLED, [text]
        ends = [end for node in self._nodes for end in node.ends]
        guilty = culprit([end for node in failed for end in node.ends if end.failed])
        lost = [node for node in self._nodes if node.lost is not None]
        if guilty is not None and not (lost and bereft(guilty)):
            self._last_words = guilty.last_words()
            return guilty.exit_code, explain(guilty, ends)
        spoken = [node for node in failed if node.words]
        if spoken and not lost:
            first = min(spoken, key=lambda node: node.at)
            return first.code or 1, [f"{first.host}: {line}" for line in first.words]
        return self._without_report(lost or missing)

    def _without_report(self, nodes: list[_Node]) -> tuple[int, list[str]]:
        """Explain nodes that ended, or never began, without a word of their own."""
        program = self._plan.command()[0]
        absent = [node for node in nodes if not node.here]
        how = nodes[0].lost or f"{program} ended with exit code {self._shell.poll()}"
        if self._silent:
            how = f"nothing was heard from there in {_START_SECONDS:g} s"
        heard = "".join(f"\n  {line}" for line in self._tail)
        if absent:
            raise RunError(
                f"no ranks could be started on {', '.join(node.host for node in absent)}: {how}; "
                f"check that {program} reaches every host, and that the folder "
                f"{self._plan.folder} and {sys.executable} are there{heard}"
            )
        names = ", ".join(node.host for node in nodes)
        return EXIT_KILLED, [f"deepy: the ranks on {names} were lost: {how}{heard}"]

    def _end_everything(self) -> None:
        clean = all(node.over and not node.failed for node in self._nodes)
        self._quiet = not clean or self._quiet
        if clean:
            self._await_shell(10)
        elif self._plan.launcher != "pdsh":
            # These end their processes on all hosts if asked; pdsh's end with their connection.
            with contextlib.suppress(ProcessLookupError):
                self._shell.terminate()
            self._await_shell(10)
        kill_session(self._shell.pid, print_error)
        self._shell.wait()
        for process in self._tellers:
            kill_session(process.pid, print_error)
            process.wait()
        self._read()
        self._show(1, self._reader.rest())
        self._selector.close()

    def _await_shell(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._shell.poll() is None and time.monotonic() < end:
            self._read()

    # -- orders -------------------------------------------------------------------------

    def _obey(self) -> None:
        """Have every node save and stop on the first stopping signal; kill on a second Ctrl-C."""
        while self._arrived:
            signum = self._arrived.popleft()
            name = signal.Signals(signum).name
            if self._stopping:
                if signum == signal.SIGINT:
                    print_error("deepy: interrupted again: the ranks are killed")
                    self._verdict = EXIT_INTERRUPTED
                continue
            self._stopping = True
            if not any(node.here for node in self._nodes):
                print_error(f"deepy: {name}: no rank had started yet; nothing to save")
                self._verdict = EXIT_SAVED
                continue
            self._deadline = time.monotonic() + self._save_timeout + _MARGIN_SECONDS
            print_error(
                f"deepy: {name}: asked {self._plan.ranks} rank(s) on {len(self._nodes)} hosts to "
                f"save and stop, within {self._save_timeout:g} s at most (Ctrl-C to kill them now)"
            )
        if self._stopping and self._verdict is None:
            self._tell()

    def _tell(self) -> None:
        """Pass the order on, again and again until every agent has said that it heard."""
        now = time.monotonic()
        waiting = [node for node in self._nodes if not node.over and not node.stopping]
        ready = all(node.here or node.over for node in self._nodes)
        # An agent that has only just been started would die of the signal.
        if not waiting or not ready or now - self._told < _TELL_SECONDS:
            return
        self._told = now
        command = self._plan.tell(self._job)
        if command is None:
            with contextlib.suppress(ProcessLookupError):
                self._shell.send_signal(signal.SIGUSR1)
        else:
            self._tellers.append(self._start(command, subprocess.DEVNULL))

    # -- what comes back ----------------------------------------------------------------

    def _read(self) -> None:
        for key, _ in self._selector.select(timeout=_TICK_SECONDS):
            stream: Any = key.fileobj
            try:
                data = os.read(stream.fileno(), 65536)
            except BlockingIOError:
                continue
            if not data:
                self._selector.unregister(stream)
            elif key.data:
                output, reports = self._reader.feed(data)
                self._show(1, output)
                for node, report in reports:
                    self._hear(node, report)
            else:
                self._hear_errors(data)

    def _hear(self, number: int, report: dict[str, Any]) -> None:
        if number >= len(self._nodes):
            return
        node = self._nodes[number]
        if "hello" in report:
            node.here = True
            self._first_heard = self._first_heard or time.monotonic()
        elif "stopping" in report:
            node.stopping = True
        elif "ended" in report:
            node.code, node.at = int(report["ended"]), time.monotonic()
            node.words = [str(line) for line in report["words"]]
            node.ends = unpack_ends(report["ends"], node.host)

    def _hear_errors(self, data: bytes) -> None:
        """Show rank 0's error output; keep what the remote shell says for itself."""
        self._log.write(data)
        self._log.flush()
        *lines, rest = (self._errors + data).split(b"\n")
        if not b"pdsh@".startswith(rest[:5]):
            self._show(2, rest)  # a progress bar, say
            rest = b""
        self._errors = rest
        for line in lines:
            text = line.decode("utf-8", errors="replace")
            if self._quiet or text.startswith("pdsh@"):
                self._tail.append(text)
            if not text.startswith("pdsh@"):
                self._show(2, line + b"\n")
                continue
            match = _LOST.match(text)
            for node in self._nodes if match else ():
                if match and node.host == match.group(1) and not node.over:
                    node.lost, node.at = match.group(2), time.monotonic()

    def _show(self, descriptor: int, data: bytes) -> None:
        if descriptor == 2 and self._quiet:
            return
        if descriptor == 2:
            self._heard = (self._heard + data)[-_HEARD_BYTES:]
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(descriptor, data) :]
