"""What a run says of its reference before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import runs

import megatron.mixing  # noqa: F401
from megatron.checkpoint.store import CheckpointStore
from megatron.config import Config, load_config
from megatron.data.loss_header import StoreHeader, describe_domain
from megatron.data.loss_store import stream_starts
from megatron.data.loss_writing import BlockWriter, mark_scored, prepare_store
from megatron.data.sampler import Sampler
from megatron.errors import NeomixError
from megatron.training.check import preflight
from megatron.training.compatible import model_facts
from megatron.training.reference import RECORD_NAME, _keep_to
from megatron.training.reference_checkpoint import find_reference
from megatron.training.reference_options import epochs_read, least_samples, open_for_scoring


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "data"
    runs.make_data(folder, documents=60)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(
    here: Path,
    data: Path,
    *,
    step: int = 5,
    layout: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    **changes: Any,
) -> Config:
    """Leave what a training run leaves, its weights apart."""
    content = runs.config(data, here / "ref", **{"mixing": {"method": "static"}, **changes})
    config = load_config([str(runs.write_config(here / "ref.yml", content))])
    store = CheckpointStore(here / "ref" / "checkpoints")
    store.begin(step)
    file = store.temporary_path(step) / "weights.pt"
    file.write_bytes(b"weights")
    store.commit(
        step,
        store.seal_files([file]),
        layout={"zero_stage": 1, **(layout or {})},
        config_hash="",
        fingerprints={},
        extra=extra or {"model": model_facts(config)},
    )
    (here / "ref" / "config.yml").write_text(config.resolved_yaml(), encoding="utf-8")
    return config


def proxy(here: Path, data: Path, **changes: Any) -> Config:
    mixing = {"method": "doremi", "reference": "ref", **changes.pop("mixing", {})}
    mixing = {key: value for key, value in mixing.items() if value is not None}
    content = runs.config(data, here / "run", mixing=mixing, **changes)
    return load_config([str(runs.write_config(here / "proxy.yml", content))])


def refused(config: Config, *words: str) -> None:
    with pytest.raises(NeomixError) as error:
        preflight(config, world_size=2, gpus=0)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not Path(config.run_dir).exists()


def test_a_reference_of_another_size_is_taken(here: Path, data: Path) -> None:
    trained(here, data, num_layers=3, hidden_size=16)
    preflight(proxy(here, data), world_size=2, gpus=0).domains.close()
    for place in ("ref/checkpoints", "ref/checkpoints/global_step5"):
        config = proxy(here, data, mixing={"reference": place})
        preflight(config, world_size=2, gpus=0).domains.close()


def test_a_reference_that_is_not_there_is_told_how_to_make(here: Path, data: Path) -> None:
    refused(
        proxy(here, data),
        "mixing.reference: no reference model in ref",
        "./deepy.py train.py YOUR_CONFIGS --set run_dir=ref",
    )
    refused(
        proxy(here, data, mixing={"reference": "runs/quickstart"}),
        "make it with: ./deepy.py train.py -d configs local/quickstart mixing/odm",
    )
    (here / "ref" / "checkpoints").mkdir(parents=True)
    refused(proxy(here, data), "no reference model in ref", "run_dir=ref")
    refused(
        proxy(here, data, mixing={"reference": None, "reference_losses": "losses"}),
        "losses holds no loss store",
        "python tools/score_data.py YOUR_CONFIGS --checkpoint REFERENCE_RUN --out losses",
    )
    refused(proxy(here, data, mixing={"reference": None}), "reference", "tools/score_data.py")


@pytest.mark.parametrize(
    ("reference", "run", "words"),
    [
        ({"vocab_size": 121}, {}, ("vocab_size (reference 121, run 120)",)),
        ({"seq_length": 32}, {}, ("seq_length (reference 32, run 16)",)),
        (
            {"num_attention_heads": 1},
            {"model_parallel_size": 2},
            ("model_parallel_size: 2 does not divide", "num_attention_heads (1)", "a loss store"),
        ),
        (
            {"num_layers": 1},
            {"pipe_parallel_size": 2},
            ("pipe_parallel_size: 2 is above", "num_layers (1)", "a loss store"),
        ),
        ({"step": 0}, {}, ("is of step 0",)),
        ({"layout": {"zero_stage": 0}}, {}, ("ZeRO stage 0",)),
        (
            {"extra": {"model": {"num_layers": 7}}},
            {},
            ("num_layers (checkpoint 7, configuration 2)",),
        ),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(
    here: Path, data: Path, reference: dict[str, Any], run: dict[str, Any], words: tuple[str, ...]
) -> None:
    trained(here, data, **reference)
    refused(proxy(here, data, **run), *words)


def test_other_tokenizers_are_refused(here: Path, data: Path) -> None:
    for name, text in (("one", "{}"), ("two", "{ }"), ("same", "{}")):
        (here / f"{name}.json").write_text(text)
    own = {"tokenizer_type": "HFTokenizer"}
    trained(here, data, vocab_file="one.json", **own)
    reference = find_reference("ref", verified=False, say=print)
    from megatron.training.reference_checkpoint import check_reference

    check_reference(reference, proxy(here, data, vocab_file="same.json", **own))
    with pytest.raises(NeomixError, match=r"vocab_file .*one\.json.*two\.json"):
        check_reference(reference, proxy(here, data, vocab_file="two.json", **own))
    with pytest.raises(NeomixError, match=r"tokenizer_type .*'HFTokenizer'.*'CharLevelTokenizer'"):
        check_reference(reference, proxy(here, data, tokenizer_type="CharLevelTokenizer"))


def test_the_runs_own_folder_and_a_lost_configuration_are_refused(here: Path, data: Path) -> None:
    trained(here, data)
    with pytest.raises(NeomixError, match=r"own folder.*--set run_dir=runs/doremi"):
        preflight(
            proxy(here, data).model_copy(
                update={
                    "checkpoint": proxy(here, data).checkpoint.model_copy(update={"run_dir": "ref"})
                }
            ),
            world_size=2,
            gpus=0,
        )
    (here / "ref" / "config.yml").unlink()
    refused(proxy(here, data), "config.yml of the run that wrote", "ref")


def test_a_checkpoint_and_its_universal_form_are_one_model(here: Path, data: Path) -> None:
    config = trained(here, data)
    found = find_reference("ref", verified=True, say=print)
    source = {name: entry.sha256 for name, entry in found.manifest.files.items()}
    store = CheckpointStore(here / "whole" / "checkpoints")
    store.begin(5)
    file = store.temporary_path(5) / "other.pt"
    file.write_bytes(b"other")
    facts = {"model": model_facts(config), "source": source}
    store.commit(
        5,
        store.seal_files([file]),
        layout={"universal": True},
        config_hash="",
        fingerprints={},
        extra=facts,
    )
    (here / "whole" / "config.yml").write_text(config.resolved_yaml(), encoding="utf-8")
    assert find_reference("whole", verified=True, say=print).identity == found.identity
    trained(here, data, step=6)
    newest = find_reference("ref", verified=False, say=print)
    assert newest.manifest.step == 6
    assert newest.identity != found.identity
    assert find_reference("ref", step=5, verified=False, say=print).identity == found.identity


def make_store(here: Path, config: Config, epochs: int) -> None:
    """Leave what scoring leaves."""
    config, domains = open_for_scoring(config, world_size=2, gpus=0)
    folder = here / "losses"
    header = prepare_store(
        folder,
        StoreHeader(
            seq_length=16,
            epoch_offset=True,
            seed=config.training.seed,
            vocab_size=120,
            precision="fp32",
            model_hash="m",
            model={"checkpoint": "somewhere/global_step5"},
            domains={
                part.name: describe_domain(part, split="80,10,10", epochs=epochs)
                for part in domains.train
            },
        ),
    )
    with BlockWriter(folder, header.domains) as writer:
        for part in domains.train:
            for epoch in range(epochs):
                windows = part.epoch(epoch).windows
                starts = stream_starts(part, windows, np.arange(windows.count))
                writer.write(part.name, epoch, starts, np.ones((windows.count, 16)))
                header = mark_scored(folder, header, part.name, epoch, windows.count)
    domains.close()


def test_a_store_must_reach_to_the_runs_end(here: Path, data: Path) -> None:
    def stored(iters: int, **changes: Any) -> Config:
        mixing = {"reference": None, "reference_losses": "losses", **changes.pop("mixing", {})}
        return proxy(here, data, train_iters=iters, mixing=mixing, **changes)

    make_store(here, stored(10), 1)
    # 8 samples a step, a third of them each; the smallest domain has some 310 windows.
    preflight(stored(100), world_size=2, gpus=0).domains.close()
    remedy = "python tools/score_data.py YOUR_CONFIGS --checkpoint somewhere/global_step5"
    refused(stored(200), "the run will read about", f"{remedy} --out losses --epochs 2")
    refused(stored(100, seed=9), "seed (store 1234, run 9)")
    refused(stored(100, split="70,20,10"), "split of 'walk' (store '80,10,10', run '70,20,10')")
    # Data that ends ends the run; nobody can tell what a guardrail's fallback draws.
    stops = stored(200, mixing={"on_exhausted": "stop"})
    preflight(stops, world_size=2, gpus=0).domains.close()
    make_store(here, stored(10), 2)
    preflight(stored(200), world_size=2, gpus=0).domains.close()


@pytest.mark.parametrize("draw", ["apportion", "multinomial"])
@pytest.mark.parametrize("unit", ["sample", "micro_batch", "step"])
def test_forecasts_bound_what_is_really_drawn(here: Path, data: Path, draw: str, unit: str) -> None:
    mixing = {"draw": draw, "unit": unit}
    config = proxy(here, data, train_iters=300, mixing=mixing)
    config, domains = open_for_scoring(config, world_size=2, gpus=0)
    weights = np.array([0.6, 0.3, 0.1])
    sampler = Sampler(
        domains.names,
        domains.train,
        seed=1,
        global_batch=8,
        micro_batch=2,
        unit=unit,  # type: ignore[arg-type]
        draw=draw,  # type: ignore[arg-type]
        on_exhausted="repeat",
    )
    for step in range(1, 301):
        sampler.plan(step, weights)
    least = least_samples(config, domains, weights, world_size=2)
    most = epochs_read(config, domains, weights, world_size=2)
    for index, domain in enumerate(domains.train):
        seen = int(sampler.samples_seen[index])
        assert least[domain.name] <= seen
        assert seen <= sum(domain.num_windows(epoch) for epoch in range(most[domain.name]))
        if draw == "apportion":
            assert seen - least[domain.name] <= 2 * 8 * (1 + np.log(3))
    domains.close()


def test_a_run_keeps_to_the_reference_that_it_began_with(here: Path, data: Path) -> None:
    config = proxy(here, data)
    runtime: Any = SimpleNamespace(rank=0, broadcast=lambda value: value)
    record = here / "run" / RECORD_NAME
    _keep_to(config, runtime, "a" * 64, "ref")
    # Nothing is saved yet: the run begins anew.
    _keep_to(config, runtime, "b" * 64, "other")
    assert json.loads(record.read_text()) == {"model": "b" * 64, "place": "other"}
    store = CheckpointStore(here / "run" / "checkpoints")
    store.begin(1)
    store.commit(1, {}, layout={}, config_hash="", fingerprints={}, extra={})
    # The same model in another form.
    _keep_to(config, runtime, "b" * 64, "losses")
    with pytest.raises(NeomixError, match=r"began with the reference model b{16} .*a{16} "):
        _keep_to(config, runtime, "a" * 64, "ref")
    record.unlink()
    _keep_to(config, runtime, "a" * 64, "ref")
