"""A reference's losses are the same from its model and from its store, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import relayout, runs
from support.pool import RankPools
from support.scored import PROXY, REFERENCE, gathered, references, scored, write

from megatron.config import load_config
from megatron.data.loss_header import read_header
from megatron.model.gpt import GPT
from megatron.training.domains import open_domains
from megatron.training.scoring import ScoreRequest

STEPS = 3
HALF = 2.0**-11  # relative error of rounding to float16

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"model_parallel_size": 2},
    "sequence": {"model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipe_parallel_size": 2},
    "zero3": {"zero_optimization": {"stage": 3}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pools: RankPools) -> Path:
    """Data, and a reference that was trained on two tensor ranks."""
    folder = tmp_path_factory.mktemp("reference")
    runs.make_data(folder / "data", documents=60)
    file = write(folder, "reference", "reference", model_parallel_size=2, **REFERENCE)
    assert pools.call(relayout.train, 2, file) == [0, 0]
    return folder


def proxy(folder: Path, name: str, **changes: Any) -> Path:
    mixing = {"method": "doremi", **changes.pop("mixing")}
    return write(folder, name, f"proxy-{name}", mixing=mixing, **{**PROXY, **changes})


@pytest.fixture(scope="module")
def store(folder: Path, pools: RankPools) -> Path:
    """Scored on two data ranks."""
    file = proxy(folder, "score", mixing={"reference": "unused"})
    request = ScoreRequest(checkpoint=str(folder / "reference"), out=str(folder / "store"), block=3)
    for code, _ in pools.call(scored, 2, file, request):
        assert code == 0
    return folder / "store"


def plain(folder: Path, windows: np.ndarray) -> np.ndarray:
    """Compute the reference's losses [n, S] with the whole model in this process."""
    config = load_config([str(folder / "reference" / "config.yml")])
    model = GPT(config.model, seed=0).eval()
    whole, *_ = folder.glob("proxy-*/reference/global_step6.universal")
    for name, parameter in model.named_parameters():
        stored = torch.load(whole / "zero" / name / "fp32.pt", weights_only=False)["param"]
        with torch.no_grad():
            parameter[: len(stored)] = stored  # the vocabulary may be padded
    tokens = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        hidden, weight = model(tokens[:, :-1])
        logits = hidden @ weight[:120].T
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
    return losses.view(len(windows), -1).numpy()


def test_model_and_store_agree_in_every_layout(folder: Path, store: Path, pools: RankPools) -> None:
    online = {
        name: proxy(folder, name, mixing={"reference": str(folder / "reference")}, **layout)
        for name, layout in LAYOUTS.items()
    }
    stored = {
        f"{name}-store": proxy(
            folder, f"{name}-store", mixing={"reference_losses": str(store)}, **layout
        )
        for name, layout in LAYOUTS.items()
    }
    results = pools.call(references, 2, {**online, **stored}, STEPS)
    expected = gathered(results, "data")
    assert expected.shape == (STEPS * 8, 16)
    assert expected.std() > 0.5
    for name in LAYOUTS:
        found = gathered(results, name)
        assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max(), name
        looked_up = gathered(results, f"{name}-store")
        assert np.array_equal(looked_up, gathered(results, "data-store")), name
        assert (np.abs(looked_up - expected) <= HALF * expected + 1e-6).all(), name
        # What is asked for twice is run once.
        for result in results:
            assert result[name]["tokens"] == STEPS * 8 * 16
            assert result[f"{name}-store"]["tokens"] == 0
            assert result[name]["identity"] == read_header(store, "").model_hash

    opened = _opened(load_config([str(online["data"])]))
    plans = pools.call(sample_ids, 1, online["data"], STEPS)[0]
    windows = np.array([opened[name].sample(epoch, sample) for name, epoch, sample in plans])
    assert np.abs(plain(folder, windows) - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    "layout",
    [{"pipe_parallel_size": 2}, pytest.param({"model_parallel_size": 2}, marks=pytest.mark.slow)],
    ids=["pipeline", "tensor"],
)
def test_bf16_is_near_fp32(folder: Path, pools: RankPools, layout: dict[str, Any]) -> None:
    mixing = {"reference": str(folder / "reference")}
    (name,) = layout
    files = {
        "fp32": proxy(folder, f"fp32-{name}", mixing=mixing),
        "bf16": proxy(folder, f"bf16-{name}", mixing=mixing, bf16={"enabled": True}, **layout),
    }
    results = pools.call(references, 2, files, 2)
    near, expected = gathered(results, "bf16"), gathered(results, "fp32")
    assert 0 < np.abs(near - expected).mean() < 0.02
    assert np.abs(near - expected).max() < 0.1


@pytest.mark.slow
def test_all_kinds_of_ranks_at_once(folder: Path, pools: RankPools) -> None:
    mixing = {"reference": str(folder / "reference")}
    cube = {"model_parallel_size": 2, "pipe_parallel_size": 2, "sequence_parallel": True}
    small, large = (
        proxy(folder, name, mixing=mixing, **layout)
        for name, layout in (("one", {}), ("cube", cube))
    )
    expected = gathered(pools.call(references, 1, {"all": small}, 2), "all")
    found = gathered(pools.call(references, 8, {"all": large}, 2), "all")
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def sample_ids(rank: int, world: int, file: Path, steps: int) -> list[tuple[str, int, int]]:
    """Return the samples of a run's first steps, in the order of the global batches."""
    from support.training import Harness

    harness = Harness(file)
    found = []
    for step in range(1, steps + 1):
        planned = harness.parts.planner.take(step)
        assert planned is not None
        found += planned.plan.sample_ids(harness.domains.names)
    harness.close()
    return found


def _opened(config: Any) -> dict[str, Any]:
    opened = open_domains(
        config.domains,
        split=config.split,
        seq_length=config.model.context_length,
        seed=config.training.seed,
    )
    return dict(zip(opened.names, opened.train, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "pipeline",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tensor", "sequence", "zero3")),
    ],
)
def test_scoring_in_another_layout_gives_the_same_store(
    folder: Path, store: Path, pools: RankPools, name: str
) -> None:
    file = proxy(folder, f"score-{name}", mixing={"reference": "unused"}, **LAYOUTS[name])
    out = folder / f"store-{name}"
    request = ScoreRequest(checkpoint=str(folder / "reference"), out=str(out), block=50)
    for code, _ in pools.call(scored, 2, file, request):
        assert code == 0
    assert_same_losses(out, store)


def assert_same_losses(one: Path, other: Path) -> None:
    """Check that two stores hold the same, but for the last bit where rounding falls so."""
    assert read_header(one, "") == read_header(other, "")
    for scores in read_header(one, "").domains.values():
        first, second = (np.fromfile(path / scores.file, "<f2") for path in (one, other))
        assert np.array_equal(np.isnan(first), np.isnan(second))
        # The first token of a stream is never predicted, nor are those before the first window.
        assert np.isfinite(first).sum() == 16 * sum(scores.windows)
        known = np.isfinite(first)
        distance = np.abs(first[known].view(np.int16) - second[known].view(np.int16))
        assert distance.max() <= 1


def test_what_was_stopped_goes_on_in_another_layout(
    folder: Path, store: Path, pools: RankPools
) -> None:
    out = folder / "stopped"
    request = ScoreRequest(checkpoint=str(folder / "reference"), out=str(out), block=2)
    files = [
        proxy(folder, f"stop-{number}", mixing={"reference": "unused"}, **layout)
        for number, layout in enumerate(({}, {"model_parallel_size": 2}))
    ]
    for file in files:
        results = pools.call(scored, 2, file, request, True)
        assert [code for code, _ in results] == [143, 143]
    scores = read_header(out, "").domains["walk"]
    # A block of two micro-batches of two rows: on two data ranks, then on one.
    assert scores.scored[0] == 2 * 2 * 2 + 2 * 2
    # What is scored is left alone.
    losses = np.memmap(out / scores.file, "<f2", mode="r+", shape=(scores.tokens,))
    done = np.isfinite(losses)
    assert done.sum() == 12 * 16
    kept = losses.copy()
    losses[done] = 7.0
    losses.flush()
    for code, _ in pools.call(scored, 2, files[0], request):
        assert code == 0
    assert (losses[done] == 7.0).all()
    losses[done] = kept[done]
    losses.flush()
    assert_same_losses(out, store)
