"""The parent of a run: starts the ranks, passes signals on, ends everything that it started.

DeepSpeed's launcher, left to itself, signals ranks one after another with half a
minute each, and writes about it after a failed rank's own message.  Here it only
starts processes.  It lives in a session of its own with the stopping signals blocked,
writes into a log, and has for children one guardian per rank (:mod:`megatron.launch.rank`)
that reports to the supervisor.  The supervisor signals every rank itself and at once,
decides when to give up, and kills what is left.  Launcher, guardians and ranks each die
with their parent, so nothing outlives a supervisor that is itself killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import RunError
from megatron.launch import wire
from megatron.launch.command import LaunchPlan
from megatron.launch.outcome import EXIT_KILLED, RankEnd, culprit, explain
from megatron.launch.process import die_with_parent, process_info, session_members
from megatron.launch.stop import EXIT_INTERRUPTED, EXIT_SAVED

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GRACE_SECONDS = 3.0
_TICK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Agent:
    """How the supervisor of one node serves the parent of all nodes.

    Attributes:
        address: name of the supervisor's socket, at which it also takes the order to stop.
        concluded: gets how the ranks of this node ended, and the exit code, at the end.
        stopping: is told when the ranks have been asked to save and stop.
    """

    address: str
    concluded: Callable[[list[RankEnd], int], None]
    stopping: Callable[[], None]


class _Rank:
    """What the supervisor knows of one rank."""

    def __init__(self, number: int, connection: socket.socket, log: Path) -> None:
        self.number = number
        self.connection = connection
        self.log = log
        self.pid: int | None = None
        self.started: int | None = None
        self.end: RankEnd | None = None

    def signal(self, signum: int) -> None:
        """Signal the rank's process, if it still is that process."""
        info = process_info(self.pid) if self.pid is not None and self.end is None else None
        if info is not None and info.started == self.started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(info.pid, signum)


def supervise(
    plan: LaunchPlan,
    log_dir: Path,
    *,
    save_timeout: float = 600.0,
    grace: float = GRACE_SECONDS,
    say: Callable[[str], None] | None = None,
    agent: Agent | None = None,
) -> int:
    """Run the job to its end and return the exit code for the command.

    Args:
        plan: what to start.
        log_dir: folder for ``rank_N.log`` and ``launcher.log``.
        save_timeout: seconds that ranks may take to end once asked to save and stop.
        grace: seconds that ranks may go on after one has failed (to fail with a message
            of their own) before they are killed.
        say: where the supervisor's own few lines go; the error output if not given.
        agent: what a supervisor of one node among several does beside; none if there is
            one node.

    Returns:
        0 when every rank ended with 0; 143 when the ranks saved and stopped;
        else the code of the first rank that failed (128 + n if signal n killed it);
        137 when they had to be killed.

    Raises:
        RunError: the launcher could not start, or ended before any rank did.
    """
    return _Supervisor(plan, log_dir, save_timeout, grace, say or print_error, agent).run()


@contextlib.contextmanager
def caught_signals(arrived: deque[int]) -> Iterator[None]:
    """Collect the stopping signals in ``arrived`` instead of dying of them."""
    previous = {}
    for signum in WATCHED:
        # Under nohup SIGHUP is ignored, and stays so.
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            previous[signum] = signal.signal(signum, lambda number, _frame: arrived.append(number))
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def kill_session(leader: int, say: Callable[[str], None]) -> None:
    """Kill every process of the session that ``leader`` began."""
    give_up = time.monotonic() + 10
    while members := [pid for pid in session_members(leader) if pid != os.getpid()]:
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > give_up:
            say(f"deepy: processes {members} cannot be killed (stuck in the kernel?)")
            return
        time.sleep(0.02)


def print_error(message: str) -> None:
    """Write a line of the supervisor's own to the error output, if that is still open."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


class _Supervisor:
    def __init__(
        self,
        plan: LaunchPlan,
        log_dir: Path,
        save_timeout: float,
        grace: float,
        say: Callable[[str], None],
        agent: Agent | None,
    ) -> None:
        self._plan = plan
        self._log_dir = log_dir
        self._save_timeout = save_timeout
        self._grace = grace
        self._say = say
        self._ranks: dict[int, _Rank] = {}
        self._arrived: deque[int] = deque()
        self._stopping: int | None = None
        self._deadline: float | None = None
        self._verdict: int | None = None
        self._agent = agent
        self._address = agent.address if agent else f"neomix-{os.getpid()}-{secrets.token_hex(8)}"
        self._numbers = plan.numbers
        self._log = log_dir / plan.log_name
        self._selector = selectors.DefaultSelector()
        self._launcher: subprocess.Popen[bytes]

    # -- the life of a job --------------------------------------------------------------

    def run(self) -> int:
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"the folder {self._log_dir} for the ranks' output cannot be made: "
                f"{error.strerror}; give another log_dir or run_dir"
            ) from error
        with caught_signals(self._arrived), self._listener() as listener:
            self._launcher = self._start()
            try:
                while not self._finished():
                    self._wait(listener)
                    self._obey()
                    self._judge()
                    if self._launcher.poll() is not None:
                        break
                code = self._conclude()
                if self._agent:
                    ends = [rank.end for rank in self._ranks.values() if rank.end is not None]
                    self._agent.concluded(ends, code)
                return code
            finally:
                self._end_everything()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self._plan.environment}
        environment[wire.SUPERVISOR_VARIABLE] = self._address
        own = os.getpid()

        def prepare() -> None:
            # The launcher would answer these signals by killing ranks; blocked (which a
            # handler it installs cannot undo), they are the supervisor's business alone.
            signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
            die_with_parent(own)

        try:
            with open(self._log, "wb") as log:
                return subprocess.Popen(
                    self._plan.command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=prepare,
                )
        except OSError as error:
            raise RunError(f"the launcher cannot start: {error}") from error

    def _finished(self) -> bool:
        ended = [rank for rank in self._ranks.values() if rank.end is not None]
        return len(ended) == len(self._numbers) or self._verdict is not None

    def _conclude(self) -> int:
        """Return the exit code, having said what the user should read last."""
        launcher_code = self._launcher.poll()
        self._take_reports()
        ends = [rank.end for rank in self._ranks.values() if rank.end is not None]
        reported = [end for end in ends if not end.lost]
        guilty = culprit(ends)
        if guilty is not None and guilty.failed and self._stopping == -guilty.code:
            return guilty.exit_code  # stopped before it could take the signal in hand
        if launcher_code is not None and len(reported) < len(self._numbers):
            guilty = culprit([end for end in reported if end.failed])
            if guilty is None:
                return self._launcher_ended(launcher_code)
        if self._verdict is not None and (guilty is None or not guilty.failed):
            return self._verdict
        if guilty is None:
            return 0
        for line in explain(guilty, ends):
            self._say(line)
        return guilty.exit_code

    def _launcher_ended(self, code: int) -> int:
        log = self._log
        if self._ranks:
            how = "was killed" if code < 0 else f"ended with exit code {code}"
            self._say(f"deepy: DeepSpeed's launcher {how}, and its ranks with it ({log})")
            return 128 - code if code < 0 else code or 1
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunError(
            f"DeepSpeed's launcher ended before it started a rank (exit code {code}); its last "
            f"words (all of them: {log}):\n" + "\n".join(lines[-15:])
        )

    def _end_everything(self) -> None:
        """Let guardians go, and leave no process of a job that did not end well."""
        clean = len(self._ranks) == len(self._numbers) and all(
            rank.end is not None and not rank.end.failed for rank in self._ranks.values()
        )
        for rank in self._ranks.values():
            if clean:
                with contextlib.suppress(OSError):
                    wire.send(rank.connection, {"leave": True})
        if clean:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._launcher.wait(timeout=5)
        self._launcher.kill()
        if not clean:
            kill_session(self._launcher.pid, self._say)
        self._launcher.wait()
        for rank in self._ranks.values():
            rank.connection.close()
        self._selector.close()

    # -- signals ------------------------------------------------------------------------

    def _obey(self) -> None:
        """Pass the first stopping signal on to every rank; kill on a second Ctrl-C."""
        while self._arrived:
            signum = self._arrived.popleft()
            if self._stopping is not None:
                if signum == signal.SIGINT:
                    self._say("deepy: interrupted again: the ranks are killed")
                    self._verdict = EXIT_INTERRUPTED
                continue
            # An agent is told by whatever signal its launcher lets through.
            unlike = signum == signal.SIGHUP or self._agent is not None
            self._stopping = signal.SIGTERM if unlike else signum
            self._deadline = time.monotonic() + self._save_timeout
            running = [rank for rank in self._ranks.values() if rank.pid and rank.end is None]
            for rank in running:
                rank.signal(self._stopping)
            if self._agent:
                self._agent.stopping()
            name = signal.Signals(signum).name
            if not running and not any(rank.end for rank in self._ranks.values()):
                self._verdict = EXIT_SAVED
            if self._agent:
                continue
            if self._verdict is not None:
                self._say(f"deepy: {name}: no rank had started yet; nothing to save")
            else:
                self._say(
                    f"deepy: {name}: asked {len(running)} rank(s) to save and stop, within "
                    f"{self._save_timeout:g} s at most (Ctrl-C to kill them now)"
                )

    # -- ranks --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _listener(self) -> Iterator[socket.socket]:
        with wire.make_socket() as listener:
            listener.bind("\0" + self._address)
            listener.listen(max(16, len(self._numbers)))
            self._selector.register(listener, selectors.EVENT_READ)
            yield listener

    def _wait(self, listener: socket.socket) -> None:
        for key, _ in self._selector.select(timeout=_TICK_SECONDS):
            if key.fileobj is listener:
                self._welcome(listener)
            else:
                self._hear(key.data)

    def _take_reports(self) -> None:
        """Read what guardians said just before they, or the launcher, ended."""
        for key, _ in self._selector.select(timeout=0):
            if isinstance(key.data, _Rank):
                self._hear(key.data)

    def _welcome(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(10)
        hello = wire.receive(connection)[0] if wire.same_user(connection) else None
        if hello is not None and hello.get("stop") in WATCHED:
            self._arrived.append(hello["stop"])
        if hello is None or hello.get("hello") not in self._numbers:
            connection.close()
            return
        number = int(hello["hello"])
        log = self._log_dir / f"rank_{number}.log"
        rank = _Rank(number, connection, log)
        with contextlib.suppress(OSError):
            wire.send(
                connection,
                {"launcher": self._launcher.pid, "log": str(log.absolute()), "live": number == 0},
                (1, 2) if number == 0 else (),
            )
        self._ranks[number] = rank
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def _hear(self, rank: _Rank) -> None:
        message, _ = wire.receive(rank.connection)
        now = time.monotonic()
        if message is None:
            self._selector.unregister(rank.connection)
            if rank.end is None:
                rank.end = RankEnd(
                    rank=rank.number, code=-signal.SIGKILL, at=now, log=str(rank.log), lost=True
                )
        elif "started" in message:
            rank.pid = int(message["started"])
            info = process_info(rank.pid)
            rank.started = info.started if info else None
            if self._stopping is not None:
                rank.signal(self._stopping)
        elif "ended" in message:
            rank.end = RankEnd(
                rank=rank.number,
                code=int(message["ended"]),
                at=float(message["at"]),
                tail=list(message["tail"]),
                log=str(rank.log),
                seen=rank.number == 0,
            )

    def _judge(self) -> None:
        """Decide whether the job has had its time."""
        now = time.monotonic()
        ends = [rank.end for rank in self._ranks.values() if rank.end is not None]
        if any(end.failed for end in ends):
            self._deadline = min(self._deadline or now + self._grace, now + self._grace)
        elif self._deadline is None and any(end.code != 0 for end in ends):
            self._deadline = now + self._save_timeout
        if self._deadline is not None and now > self._deadline and not self._finished():
            if not any(end.failed for end in ends):
                self._say(f"deepy: not saved after {self._save_timeout:g} s: the ranks are killed")
            self._verdict = EXIT_KILLED
