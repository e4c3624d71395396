from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from megatron.training import stall
from megatron.training.stall import Heartbeat, Place, Watchdog, collective_minutes, describe


def place(what: str, step: int | None = 12, seconds: float = 312, host: str = "") -> Place:
    return Place(what=what, step=step, seconds=seconds, host=host)


def test_the_rank_that_is_behind_is_named_first() -> None:
    places = [place(stall.REDUCING, seconds=310 + r) for r in range(3)] + [place(stall.READING)]
    assert describe(places, ["a", "a", "b", "b"]) == (
        "stall: rank 3 on b is still at 'reading the batch of step 12' for 312 s (likely the "
        "cause); ranks 0–2 wait in 'reducing the ledger of step 12' for 310 s"
    )


def test_a_step_behind_counts_more_than_the_place_in_it() -> None:
    places = [place(stall.PLANNING, 13), place(stall.RECORDING, 12), place(stall.PLANNING, 13)]
    text = describe(places)
    assert text.startswith("stall: rank 1 is still at 'recording of step 12'")
    assert "ranks 0, 2 wait in 'planning of step 13'" in text


def test_a_rank_that_does_not_answer_is_the_cause() -> None:
    places = [place(stall.COMPUTING), None, None, place(stall.READING)]
    text = describe(places, ["a", "b", "b", "a"])
    assert text.startswith(
        "stall: ranks 1–2 do not answer: stopped, gone or cut off (likely the cause); "
    )
    assert "still" not in text


def test_ranks_in_the_same_place_have_no_cause() -> None:
    text = describe([place(stall.COMPUTING)] * 4096)
    assert text == "stall: ranks 0–4095 wait in 'forward and backward of step 12' for 312 s"


def test_the_heartbeat_tells_reading_from_working() -> None:
    heartbeat = Heartbeat()
    assert heartbeat.place().what == stall.STARTING
    seen = []

    def batches() -> Iterator[int]:
        for number in range(2):
            seen.append(str(heartbeat.place()))
            yield number

    for number in heartbeat.reading(batches(), 7):
        seen.append(f"{number} {heartbeat.place()}")
    reading, working = "reading the batch of step 7", "forward and backward of step 7"
    assert seen == [reading, f"0 {working}", reading, f"1 {working}"]
    assert str(heartbeat.place()) == working


def test_collectives_leave_the_last_word_to_the_watchdog() -> None:
    for seconds in (0.0, 60.0, 1800.0, 7200.0):
        assert collective_minutes(seconds) * 60 >= max(1800, seconds + 600)


class FakeBoard:
    """Another rank that waits; its count rises as long as it lives."""

    def __init__(self, *, other: str | None, living: bool = True) -> None:
        self.own: str | None = None
        self.other, self.living, self.count = other, living, 0

    def publish(self, text: str) -> bool:
        self.own = text
        return True

    def read(self) -> list[str | None]:
        self.count += self.living
        other = self.other and f'["{self.other}", 3, 1.0, "far", {self.count}]'
        return [self.own, other]


def watch(
    heartbeat: Heartbeat, board: FakeBoard | None, *, end_after: float = 0.4
) -> tuple[list[str], list[int]]:
    """Run a watchdog until it ends the process, or has had the time for that."""
    said: list[str] = []
    codes: list[int] = []
    over = threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        over.set()

    dog = Watchdog(
        heartbeat,
        board,
        rank=0,
        host="here",
        report_after=0.2,
        end_after=end_after,
        leave=leave,
        say=said.append,
    ).start()
    over.wait(60 if end_after else 1.5)
    dog.stop()
    return said, codes


@pytest.mark.parametrize(
    ("board", "expected"),
    [
        (FakeBoard(other=stall.READING), "rank 1 on far is still at 'reading the batch of step 3'"),
        (FakeBoard(other=stall.READING, living=False), "rank 1 on far does not answer"),
        (FakeBoard(other=None), "rank 1 does not answer"),
        (None, "rank 0 waits in 'forward and backward of step 3'"),
    ],
)
def test_a_standstill_is_reported_and_then_ended(board: FakeBoard | None, expected: str) -> None:
    heartbeat = Heartbeat()
    heartbeat.at(stall.COMPUTING, 3)
    said, codes = watch(heartbeat, board)
    assert codes == [1]
    assert "rank 0 on here has been at 'forward and backward of step 3'" in said[0]
    assert "over.wait(" in said[0]  # the main thread's stack
    assert expected in said[1]
    assert expected in said[-1]
    assert said[-1].splitlines()[-1].startswith("error: nothing has moved for stall_timeout = 0.4")


def test_a_long_save_is_reported_but_not_ended() -> None:
    heartbeat = Heartbeat()
    heartbeat.at(stall.SAVING, 3)
    said, codes = watch(heartbeat, None, end_after=0)
    assert "has been at 'saving of step 3'" in said[0]
    assert len(said) == 2  # once for the place, not at every look
    dog = Watchdog(
        heartbeat, None, rank=0, host="h", report_after=0, end_after=0.01, leave=codes.append
    ).start()
    threading.Event().wait(0.3)
    dog.stop()
    assert codes == []


def test_a_long_save_is_ended_if_a_rank_no_longer_answers() -> None:
    heartbeat = Heartbeat()
    heartbeat.at(stall.SAVING, 3)
    for silent in (FakeBoard(other=stall.SAVING, living=False), FakeBoard(other=None)):
        said, codes = watch(heartbeat, silent)
        assert codes == [1]
        assert "rank 1" in said[-1]
        assert "does not answer" in said[-1]
    codes = []
    dog = Watchdog(
        heartbeat,
        FakeBoard(other=stall.SAVING),
        rank=0,
        host="here",
        report_after=0,
        end_after=0.2,
        leave=codes.append,
        say=lambda text: None,
    ).start()
    threading.Event().wait(1.5)
    dog.stop()
    assert codes == []


def test_nothing_runs_if_both_are_switched_off() -> None:
    before = threading.active_count()
    Watchdog(Heartbeat(), None, rank=0, host="h", report_after=0, end_after=0).start().stop()
    assert threading.active_count() == before
