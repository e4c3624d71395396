from __future__ import annotations

import os
import signal
import threading

import pytest

from megatron.launch.stop import StopFlag


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_raises_the_flag(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with StopFlag() as stop:
        assert not stop.requested
        assert stop.signal_name is None
        assert stop.exit_code == 143  # learnt from a peer
        os.kill(os.getpid(), signum)
        assert stop.requested
        assert stop.signal_name == signum.name
        assert stop.exit_code == 143
    assert signal.getsignal(signum) is before


def test_the_first_signal_counts() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGINT"


def test_it_takes_signals_that_were_blocked() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_it_can_be_raised_by_hand() -> None:
    stop = StopFlag()
    stop.request()
    assert stop.requested
    assert stop.exit_code == 143


def test_only_the_main_thread_may_install_it() -> None:
    caught: list[BaseException] = []

    def install() -> None:
        try:
            StopFlag().install()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])
