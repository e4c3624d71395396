"""Keys of evaluation and generation arrive where they count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import runs
from support.lone_job import Alone

import megatron.mixing  # noqa: F401
from megatron.config import Config, load_config
from megatron.launch.stop import StopFlag
from megatron.training import evaluation, generation
from megatron.training.generation import decoding_of
from megatron.training.inference import OpenModel, task_request


class FoundError(Exception):
    """Carries what was asked for."""


def configured(folder: Path, **changes: Any) -> Config:
    content = runs.config(
        folder / "data", folder / "run", tokenizer_type="CharLevelTokenizer", **changes
    )
    return load_config([str(runs.write_config(folder / "config.yml", content))])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let opening a model say how many rows it was asked for."""

    def create(*_: Any, rows: int | None, **__: Any) -> OpenModel:
        raise FoundError(rows)

    monkeypatch.setattr(OpenModel, "create", create)


@pytest.mark.option("eval_batch_size", "generation_batch_size")
@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("rows", [None, 3])
def test_rows_of_a_pass(tmp_path: Path, rows: int | None) -> None:
    sizes = {} if rows is None else {"eval_batch_size": rows, "generation_batch_size": rows}
    config = configured(tmp_path, text_gen_type="unconditional", eval_tasks=[], **sizes)
    for work, options in (
        (evaluation._Evaluator, (config, None, print)),
        (generation.generate_run, (config, None, StopFlag(), print)),
    ):
        with pytest.raises(FoundError) as found:
            work(*options)
        assert found.value.args == (rows,)


@pytest.mark.option("eval_bootstrap_iters")
def test_resamples_of_standard_errors(tmp_path: Path) -> None:
    assert task_request(configured(tmp_path)).bootstrap_iters == 10_000
    config = configured(tmp_path, eval_bootstrap_iters=70, eval_limit=5)
    assert task_request(config).bootstrap_iters == 70
    assert task_request(config, most_resamples=50).bootstrap_iters == 50
    assert task_request(config).limit == 5


@pytest.mark.option("stop_strings")
def test_what_ends_a_text(tmp_path: Path) -> None:
    config = configured(tmp_path, stop_strings=["\n\n", "END"], top_k=5)
    decoding = decoding_of(config.generation, seed=1, stop_token=0)
    assert decoding.stop == ("\n\n", "END")
    assert (decoding.sampling.temperature, decoding.sampling.top_k) == (1.0, 5)


@pytest.mark.option("eval_all_checkpoints")
def test_one_checkpoint_or_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int | None] = []

    class Evaluator:
        """Notes what is measured."""

        def __init__(self, *_: Any) -> None:
            measured.clear()

        def measure(self, step: int | None) -> evaluation.Measured:
            measured.append(step)
            return evaluation.Measured(step=step or 9)

        def path(self, kind: str) -> Path:
            return tmp_path / f"{kind}.json"

        def close(self) -> None:
            pass

    monkeypatch.setattr(evaluation, "_Evaluator", Evaluator)
    monkeypatch.setattr(evaluation, "saved_steps", lambda _: [2, 4])
    for given, steps in ((False, [None]), (True, [2, 4])):
        config = configured(tmp_path, eval_perplexity="valid", eval_all_checkpoints=given)
        assert evaluation.evaluate_run(config, Alone(), StopFlag(), print) == 0
        assert measured == steps
