from __future__ import annotations

from megatron.launch.outcome import RankEnd, culprit, explain


def end(rank: int, code: int, at: float = 0.0, *tail: str) -> RankEnd:
    return RankEnd(
        rank=rank, code=code, at=at, tail=list(tail), log=f"rank_{rank}.log", seen=rank == 0
    )


def test_the_first_to_fail_decides() -> None:
    ends = [end(0, 1, 2.0), end(1, 7, 1.0), end(2, 0, 0.5), end(3, 143, 0.1)]
    assert culprit(ends) is ends[1]
    assert culprit([ends[2], ends[3]]) is ends[3]
    assert culprit([ends[2]]) is None
    assert culprit([]) is None


def test_causes_come_before_consequences() -> None:
    bereft = end(0, 1, 1.0, "RuntimeError: Connection closed by peer [127.0.0.1]:1", "")
    error, killed, aborted = end(1, 7, 2.0, "boom"), end(2, -9, 3.0), end(3, -6, 1.5)
    assert culprit([bereft, error]) is error
    assert culprit([bereft, error, aborted]) is aborted
    assert culprit([bereft, error, aborted, killed]) is killed
    assert culprit([bereft]) is bereft


def test_signals_count_as_a_shell_counts_them() -> None:
    assert end(0, -9).exit_code == 137
    assert end(0, -15).exit_code == 143
    assert end(0, 7).exit_code == 7


def test_a_rank_that_was_shown_is_not_repeated() -> None:
    guilty = end(0, 1, 0.0, "ValueError: x")
    assert explain(guilty, [guilty]) == []


def test_an_agreed_error_is_not_repeated() -> None:
    ends = [end(0, 2, 1.0, "error: x"), end(1, 2, 0.5, "error: x", "")]
    assert explain(ends[1], ends) == []
    assert explain(end(1, 2, 0.5, "error: y"), ends)[-1] == "error: y"


def test_the_last_traceback_is_shown_whole() -> None:
    tail = ["noise", "Traceback (most recent call last):", "  old", "more noise"]
    tail += ["Traceback (most recent call last):", '  File "x"', "ValueError: boom"]
    guilty = end(3, 1, 0.0, *tail)
    lines = explain(guilty, [end(0, 0), guilty])
    assert lines[0] == (
        "deepy: rank 3 failed with exit code 1; its last words (all of them: rank_3.log):"
    )
    assert lines[1:] == tail[4:]


def test_a_silent_or_killed_rank_is_named() -> None:
    assert explain(end(1, 3), []) == [
        "deepy: rank 1 failed with exit code 3 and said nothing; its output: rank_1.log"
    ]
    assert "killed by SIGSEGV; its output" in explain(end(1, -11), [])[0]
    assert "killed by SIGKILL (often the kernel, out of memory)" in explain(end(1, -9), [])[0]
    assert "killed by signal 99" in explain(end(1, -99), [])[0]
    assert explain(end(1, 143), []) == []
